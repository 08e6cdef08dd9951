"""``pem gram``: Gram matrices of a module's layer inputs, for ``merge.py -w regmean``."""

from __future__ import annotations

from dataclasses import dataclass

from pem_composition.arithmetic.statistics import GRAM
from pem_composition.cli import statistics

NAME = "gram"
HELP = "Gram matrices of a module's layer inputs on its task, for merge.py -w regmean"
EXAMPLES = """
  pem gram --model_name_or_path minilm --adapter runs/rte --task_name rte --data_dir glue \
      --output_dir runs/rte-gram
  python merge.py -a runs/rte runs/mnli -p runs/merged -w regmean -f runs/rte-gram runs/mnli-gram
"""


@dataclass(frozen=True, kw_only=True)
class Config(statistics.Flags):
    """Flags of pem gram."""


def run(config: Config) -> int:
    """Compute and write."""
    return statistics.run(config, GRAM)
