"""``pem fisher``: the diagonal Fisher of a module on its task, for ``merge.py -w fisher``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pem_composition.arithmetic.statistics import FISHER
from pem_composition.cli import module_rows
from pem_composition.flag_declarations import flag

NAME = "fisher"
HELP = "diagonal Fisher of a module on its task, which merge.py -w fisher weighs parameters by"
EXAMPLES = """
  pem fisher --model_name_or_path minilm --adapter runs/rte --task_name rte --data_dir glue \
      --output_dir runs/rte-fisher
  python merge.py -a runs/rte runs/mnli -p runs/merged -w fisher -f runs/rte-fisher runs/mnli-fisher
"""


@dataclass(frozen=True, kw_only=True)
class Config(module_rows.Flags):
    """Flags of pem fisher."""

    expectation: Literal["exact", "empirical"] = flag(
        "exact",
        "over the model's own answers (exact), or the row's label alone (empirical)",
    )


def run(config: Config) -> int:
    """Compute and write."""
    return module_rows.run(config, FISHER, expectation=config.expectation)
