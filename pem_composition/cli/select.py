"""``pem select``: choose rows to train on: comments by score, without those of the test files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required, seed_flag
from pem_composition.safe_files import atomic_directory, sha256_file, write_json
from pem_composition.tasks.data import TRAIN, RowFiles
from pem_composition.tasks.document_rows import CIVIL_COMMENTS, SCORE_COLUMN, THRESHOLD, ScoreFilter
from pem_composition.tasks.instruction_rows import ALPACA
from pem_composition.tasks.selection import RowChoice, select
from pem_composition.tasks.tables import read_table, written

if TYPE_CHECKING:
    from pem_composition.tasks.tables import Table

NAME = "select"
HELP = "choose rows to train on: by score, apart from the test files, a part set aside"
EXAMPLES = """
  pem select --task_name civil_comments --score_above 0.8 --exclude toxic.jsonl ordinary.jsonl \\
      --output_dir scratch/comments
  pem select --input_file comments.csv --score_above 0.8 --samples 2000 --validation_size 100 \\
      --instruction "Write a comment." "Say what you think." --output_dir scratch/pairs
  pem select --input_file alpaca.jsonl --exclude toxic.jsonl ordinary.jsonl \\
      --validation_size 2000 --output_dir data/alpaca
"""
HUB = ("civil_comments", "alpaca_cleaned")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of ``pem select``."""

    output_dir: Path = required(
        "folder of train.jsonl, validation.jsonl, selection.json", metavar="OUT"
    )
    input_file: Path | None = flag(
        None,
        "comments (text) or instructions: jsonl, json, csv, tsv, parquet; also packed",
        metavar="FILE",
    )
    task_name: str | None = flag(None, "the training rows of this data set on the hub", choices=HUB)
    score_column: str | None = flag(None, f"column of the score (default: {SCORE_COLUMN})")
    score_above: float | None = flag(
        None, f"keep rows with a higher score (default: {THRESHOLD}, if either flag is given)"
    )
    exclude: tuple[str, ...] = flag(
        (), "files of which no text may stand in a chosen row", metavar="FILE"
    )
    instruction: tuple[str, ...] = flag(
        (),
        "make each comment the answer to one of these instructions, in turn; {beginning} in one "
        "is the first half of the comment, and the rest is the answer",
        metavar="TEXT",
    )
    samples: int | None = flag(None, "training rows, drawn at random; default: all", least=1)
    validation_size: int = flag(0, "rows drawn first and set aside as validation.jsonl", least=0)
    seed: int = seed_flag("of the draws")
    overwrite: bool = flag(False, "replace an existing output", short="-o")

    def __post_init__(self) -> None:
        if (self.input_file is None) == (self.task_name is None):
            raise UsageError.build(
                "--input_file", "which rows to choose from", expected="--input_file or --task_name"
            )

    @property
    def score(self) -> ScoreFilter | None:
        """Column and threshold; None takes all rows."""
        if self.score_column is None and self.score_above is None:
            return None
        return ScoreFilter.of(self.score_column, self.score_above)


def run(config: Config) -> int:
    """Choose, write, and say how many rows were left out for what."""
    choice = RowChoice(
        config.score, config.instruction, config.samples, config.validation_size, config.seed
    )
    table = _table(config)
    excluded = [read_table(path) for path in config.exclude]
    found = select(table, choice, excluded)
    record = {
        "source": table.name,
        "sha256": sha256_file(config.input_file) if config.input_file else None,
        "excluded": {path: sha256_file(Path(path)) for path in config.exclude},
        "score": str(config.score) if config.score else None,
        "instructions": list(config.instruction),
        "seed": config.seed,
        **found.counts,
    }
    with atomic_directory(config.output_dir, config.overwrite) as folder:
        for name, rows in found.parts.items():
            lines = [written(row) + "\n" for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        write_json(folder / "selection.json", record)
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.counts.items())
    print(f"{config.output_dir}: {told}")
    return 0


def _table(config: Config) -> Table:
    if config.input_file is not None:
        return read_table(config.input_file)
    task = ALPACA if config.task_name == ALPACA.name else CIVIL_COMMENTS
    return RowFiles(splits=[TRAIN]).tables(task)[TRAIN]
