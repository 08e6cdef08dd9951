"""``pem fisher``: the diagonal Fisher of a module on its task, for ``merge.py -w fisher``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pem_composition.arithmetic.statistics import FISHER
from pem_composition.cli import statistics
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pem_composition.adapters import Attachment
    from pem_composition.evaluation.evaluator import Evaluator

NAME = "fisher"
HELP = "diagonal Fisher of a module on its task, which merge.py -w fisher weighs parameters by"
EXAMPLES = """
  pem fisher --model_name_or_path minilm --adapter runs/rte --task_name rte --data_dir glue \
      --output_dir runs/rte-fisher
  python merge.py -a runs/rte runs/mnli -p runs/merged -w fisher -f runs/rte-fisher runs/mnli-fisher
"""


@dataclass(frozen=True, kw_only=True)
class Config(statistics.Flags):
    """Flags of pem fisher."""

    expectation: Literal["exact", "empirical"] = flag(
        "exact",
        "over the model's own answers (exact), or the row's label alone (empirical)",
    )


def run(config: Config) -> int:
    """Compute and write."""

    def compute(
        model: nn.Module,
        attachment: Attachment,
        evaluator: Evaluator,
        progress: Callable[[int], None],
    ) -> dict[str, Tensor]:
        from pem_composition.merging.fisher import diagonal, parameters_of

        return diagonal(
            model, parameters_of(attachment), evaluator,
            expectation=config.expectation, progress=progress,
        )  # fmt: skip

    return statistics.run(config, FISHER, {"expectation": config.expectation}, compute)
