"""``pem gram``: Gram matrices of a module's layer inputs, for merge.py -w regmean and ssr."""

from __future__ import annotations

from dataclasses import dataclass

from pem_composition.arithmetic.statistics import GRAM, SUBSPACE
from pem_composition.cli import module_rows
from pem_composition.flag_declarations import flag

NAME = "gram"
HELP = "Gram matrices of a module's layer inputs on its task, for merge.py -w regmean or ssr"
EXAMPLES = """
  pem gram --model_name_or_path minilm --adapter runs/rte --task_name rte --data_dir glue \
      --output_dir runs/rte-gram
  python merge.py -a runs/rte runs/mnli -p runs/merged -w regmean -f runs/rte-gram runs/mnli-gram
  pem gram --model_name_or_path minilm --adapter runs/rte --task_name rte --data_dir glue \
      --merge_with runs/mnli runs/cola --output_dir runs/rte-seen
"""


@dataclass(frozen=True, kw_only=True)
class Config(module_rows.Flags):
    """Flags of pem gram."""

    merge_with: tuple[str, ...] = flag(
        (),
        "the other modules of the merge: only what their A and the module's own see of the inputs "
        "is written, (sum of ranks)^2 numbers per layer, for -w ssr",
        metavar="DIR",
    )


def run(config: Config) -> int:
    """Compute and write."""
    what = SUBSPACE if config.merge_with else GRAM
    return module_rows.run(config, what, merge_with=config.merge_with)
