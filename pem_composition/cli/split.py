"""``pem split``: two skewed halves of a training set, as the paper's split_data.sh makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pem_composition.flag_declarations import flag, required, seed_flag
from pem_composition.tasks.data import TRAIN, VALIDATION, RowFiles, load_task
from pem_composition.tasks.halves import SplitConfig, make_split, write_split
from pem_composition.training.training_flags import RowFlags

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

    output_dir: Path = required("directory to write", metavar="OUT")
    task_name: str | None = flag(None, "a GLUE task, snli or a domain of sentiment")
    data_dir: str | None = flag(
        None, "folder with train and dev files or of such folders; or an offline name"
    )
    train_file: Path | None = flag(
        None, "training rows: jsonl, json, csv, tsv, parquet; .gz .bz2 .xz .zip"
    )
    key_class: str | None = flag(
        None, "class to skew, by word or number; default: 0; regression: high or low"
    )
    share: float = flag(0.8, "part of the key class's rows that goes to half 0")
    samples: int | None = flag(None, "rows of both halves together, stratified; default: all")
    validation_size: int = flag(0, "rows carved out first as validation.jsonl, stratified")
    seed: int = seed_flag("decides which rows, and their order")
    reference_rule: bool = flag(False, "take rows in file order, as the reference code does")
    overwrite: bool = flag(False, "replace an existing output", short="-o")


def run(config: Config) -> int:
    """Write the halves and print what is in them."""
    data = load_task(
        config.task_name,
        RowFiles(
            train_file=config.train_file, data_dir=config.data_dir, splits=(TRAIN, VALIDATION)
        ),
        reading=config.reading(),
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
