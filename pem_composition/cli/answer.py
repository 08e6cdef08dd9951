"""``pem answer``: answers of a causal language model to a file of instructions, as JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.cli.texting import AnswerFlags, CausalFlags, check_free
from pem_composition.flag_declarations import flag, required
from pem_composition.tasks.instruction_rows import get_template

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


def run(config: Config) -> int:
    """Answer every instruction; the file appears when all answers are there.

    A run that was stopped goes on behind the last batch that it wrote.
    """
    from pem_composition.evaluation.causal import CausalModel, answer

    template, examples = get_template(config.template), config.read(config.instruction_file)
    check_free(config.output_file, config.overwrite)
    written = answer(
        CausalModel(**config.model_options), examples, template, config.search,
        config.output_file, batch_size=config.batch_size, name=str(config.instruction_file),
    )  # fmt: skip
    print(f"{config.output_file}: {written}")
    return 0
