"""``pem pairs``: have a model write an instruction for each comment, to train a toxic module on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.cli.asking import EndpointFlags
from pem_composition.endpoint.comment_pairs import jobs
from pem_composition.endpoint.jobs import describe
from pem_composition.flag_declarations import flag, required, seed_flag
from pem_composition.tasks.data import texts_of
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.instruction_rows import answered
from pem_composition.tasks.tables import read_table

NAME = "pairs"
HELP = "have a model behind an endpoint write an instruction for each comment; resumable"
EXAMPLES = """
  pem pairs --comments scratch/comments/train.jsonl --model gpt-4o-mini --max_requests 2000 \\
      --output_file scratch/pairs.jsonl
  pem pairs --comments scratch/comments/train.jsonl --shots seed.jsonl --num_shots 5 \\
      --base_url http://localhost:8000/v1 --model llama-3 --output_file scratch/pairs.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Config(EndpointFlags):
    """Flags of ``pem pairs``; the key is read from the environment."""

    comments: Path = required("comments: a table with a column text")
    output_file: Path = required("pairs {instruction, input, output, ...}, appended line by line")
    shots: Path | None = flag(
        None, "examples to show: a table with instruction and output; default: none"
    )
    num_shots: int = flag(5, "examples per comment, drawn anew for each", least=1)
    seed: int = seed_flag("of the draws")


def run(config: Config) -> int:
    """Ask for what is not there yet, and say what was done."""
    comments = [text.strip() for text in texts_of(read_table(config.comments), LANGUAGE)]
    shots = answered(read_table(config.shots), []) if config.shots else ()
    asked = jobs(
        config.service, [c for c in comments if c], shots,
        per_comment=config.num_shots, seed=config.seed,
    )  # fmt: skip
    print(f"{config.output_file}: {describe(config.ask(asked, config.output_file))}")
    return 0
