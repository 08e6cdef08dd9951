"""``pem answer``: answers of a causal language model to a file of instructions, as JSON lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from pem_composition.cli.answering import AnswerFlags
from pem_composition.cli.causal import CausalFlags
from pem_composition.cli.lines import check_free, write_lines
from pem_composition.training.config import flag

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

    instruction_file: Path = field(
        metadata={
            "help": "instructions: a table with columns instruction (or prompt) and, if there are, "
            "input and output, or Self-Instruct's instances"
        }
    )
    output_file: Path = field(
        metadata={"help": "where the answers go: one line {instruction, answer, ...} each"}
    )
    overwrite: bool = flag(False, "replace an existing --output_file")

    def __post_init__(self) -> None:
        self.check_load()
        self.check_answering()


def run(config: Config) -> int:
    """Answer every instruction; the file appears when all answers are there."""
    from pem_composition.tasks.instructions import get_template

    template, examples = get_template(config.template), config.read(config.instruction_file)
    check_free(config.output_file, config.overwrite)
    from pem_composition.evaluation.instructions import answers

    model, tokenizer = config.load()
    begin = time.perf_counter()
    with config.precision(model):
        found = answers(
            model, tokenizer, examples, template, config.search,
            batch_size=config.batch_size, name=str(config.instruction_file),
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    count = write_lines(config.output_file, (answer._asdict() for answer in found))
    tokens = sum(answer.new_tokens for answer in found)
    print(
        f"{config.output_file}: {count} answers, {tokens} tokens ({tokens / seconds:.0f} per "
        f"second), {sum(answer.ended for answer in found)} ended"
    )
    return 0
