"""``pem answer``: answers of a causal language model to a file of instructions, as JSON lines."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import json_lines
from pem_composition.cli.answering import AnswerFlags
from pem_composition.cli.causal import CausalFlags
from pem_composition.cli.lines import check_free
from pem_composition.cli.resumed import identity_of, partial_path, resume
from pem_composition.training.config import flag, required

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pem_composition.tasks.data import Example
    from pem_composition.tasks.instructions import Template

NAME = "answer"
HELP = "answer a file of instructions by beam search, with or without a module"
EXAMPLES = """
  pem answer --model_name_or_path huggyllama/llama-7b --adapter runs/alpaca --load_in_8bit \\
      --instruction_file toxic.jsonl --output_file answers/toxic.jsonl
  pem answer --model_name_or_path smollm2-135m-instruct --template chat --num_beams 1 \\
      --repetition_penalty 1.1 --instruction_file xstest.jsonl --output_file answers/xstest.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Config(CausalFlags, AnswerFlags):
    """Flags of ``pem answer``."""

    instruction_file: Path = required(
        "instructions: a table with columns instruction (or prompt) and, if there are, "
        "input and output, or Self-Instruct's instances"
    )
    output_file: Path = required("where the answers go: one line {instruction, answer, ...} each")
    overwrite: bool = flag(False, "replace an existing --output_file")

    def __post_init__(self) -> None:
        self.check_load()
        self.check_answering()


def run(config: Config) -> int:
    """Answer every instruction; the file appears when all answers are there.

    A run that was stopped goes on behind the last batch that it wrote.
    """
    from pem_composition.tasks.instructions import get_template

    template, examples = get_template(config.template), config.read(config.instruction_file)
    check_free(config.output_file, config.overwrite)
    identity = {
        **identity_of(config), **template.content(), "search": asdict(config.search),
        "rows": [(e.text, e.text_pair, e.label, e.row_id) for e in examples],
    }  # fmt: skip
    begin = time.perf_counter()
    batches, before = resume(
        config.output_file, identity, lambda skip: _answered(config, template, examples, skip)
    )
    seconds = time.perf_counter() - begin
    # The longest instructions are answered first; the file has them in their own order.
    rows = [
        row
        for _, row in sorted(
            (pair for batch in batches for pair in batch), key=lambda pair: pair[0]
        )
    ]
    count = json_lines.write(config.output_file, rows)
    partial_path(config.output_file).unlink(missing_ok=True)
    new = sum(row["new_tokens"] for batch in batches[before:] for _, row in batch)
    known = sum(map(len, batches[:before]))
    told = f" and {known} answers written before" if known else ""
    print(
        f"{config.output_file}: {count} answers, {new} tokens ({new / seconds:.0f} per "
        f"second){told}, {sum(row['ended'] for row in rows)} ended"
    )
    return 0


def _answered(
    config: Config, template: Template, examples: list[Example], skip: int
) -> Iterator[list[Any]]:
    """The model, loaded; then batches of (place, answer), all but the first ``skip``."""
    from pem_composition.evaluation.instructions import answer_batches

    model, tokenizer = config.load()
    with config.precision(model):
        found = answer_batches(
            model, tokenizer, examples, template, config.search,
            batch_size=config.batch_size, name=str(config.instruction_file), skip=skip,
        )  # fmt: skip
        for batch in found:
            yield [[place, answer._asdict()] for place, answer in batch.items()]
