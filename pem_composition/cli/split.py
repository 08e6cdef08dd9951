"""``pem split``: two skewed halves of a training set, as the paper's split_data.sh makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pem_composition.training.config import RowFlags

NAME = "split"
HELP = "divide a training set into two halves with different class shares"
EXAMPLES = """
  pem split --task_name rte --data_dir glue --share 0.8 --output_dir halves/rte
  pem split --task_name mnli --data_dir glue --key_class neutral --samples 4000 \\
      --validation_size 500 --output_dir halves/mnli
"""


@dataclass(frozen=True, kw_only=True)
class Config(RowFlags):
    """Flags of ``pem split``."""

    output_dir: Path = field(metadata={"metavar": "OUT", "help": "directory to write"})
    task_name: str | None = field(
        default=None, metadata={"help": "a GLUE task, snli or a domain of sentiment"}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with train and dev files or of such folders; or an offline name"},
    )
    train_file: Path | None = field(
        default=None,
        metadata={"help": "training rows: jsonl, json, csv, tsv, parquet; .gz .bz2 .xz .zip"},
    )
    key_class: str | None = field(
        default=None,
        metadata={"help": "class to skew, by word or number; default: 0; regression: high or low"},
    )
    share: float = field(
        default=0.8, metadata={"help": "part of the key class's rows that goes to half 0"}
    )
    samples: int | None = field(
        default=None, metadata={"help": "rows of both halves together, stratified; default: all"}
    )
    validation_size: int = field(
        default=0, metadata={"help": "rows carved out first as validation.jsonl, stratified"}
    )
    seed: int = field(default=42, metadata={"help": "decides which rows, and their order"})
    reference_rule: bool = field(
        default=False, metadata={"help": "take rows in file order, as the reference code does"}
    )
    overwrite: bool = field(
        default=False, metadata={"short": "-o", "help": "replace an existing output"}
    )


def run(config: Config) -> int:
    """Write the halves and print what is in them."""
    from pem_composition.tasks.data import TRAIN, VALIDATION, load_task
    from pem_composition.tasks.split import SplitConfig, make_split, write_split

    data = load_task(
        config.task_name,
        train_file=config.train_file,
        data_dir=config.data_dir,
        reading=config.reading(),
        splits=(TRAIN, VALIDATION),
    )
    split = make_split(
        data,
        SplitConfig(
            key_class=config.key_class,
            share=config.share,
            samples=config.samples,
            validation_size=config.validation_size,
            seed=config.seed,
            reference_rule=config.reference_rule,
        ),
    )
    write_split(split, config.output_dir, overwrite=config.overwrite)
    _print(split.record, config, data.notes)
    return 0


def _print(record: Mapping[str, Any], config: Config, notes: tuple[str, ...]) -> None:
    """One line per file, then the share reached and by which rule."""
    for note in notes:
        print(f"note: {note}")
    rows, source = record["source"]["rows"], record["source"]["name"]
    used = record["parts"]["all"]["rows"]
    print(f"{record['task']}: {used} of {rows} rows of {source}, seed {record['seed']}")
    for name, part in record["parts"].items():
        counts = ", ".join(f"{label} {count}" for label, count in part["counts"].items())
        share = f"{part['key_share_of_rows']:.3f} {record['key_class']}"
        print(f"  {name + '.jsonl':<17} {part['rows']:>6} rows   {counts}   ({share})")
    print(
        f"half 0 has {record['share_reached']:.3f} of the rows of {record['key_class']!r} "
        f"(asked {record['share_asked']}), rule: {record['rule']}"
    )
    if record["rule"] == "complement":
        print("  (the key class does not fit into a half at this share, so the others were skewed)")
    print(f"written to {config.output_dir}")
