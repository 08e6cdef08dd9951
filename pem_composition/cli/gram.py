"""``pem gram``: Gram matrices of a module's layer inputs, for ``merge.py -w regmean``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition.arithmetic.statistics import GRAM
from pem_composition.cli import statistics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pem_composition.adapters import Attachment
    from pem_composition.evaluation.evaluator import Evaluator

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

    def compute(
        model: nn.Module,
        attachment: Attachment,
        evaluator: Evaluator,
        progress: Callable[[int], None],
    ) -> dict[str, Tensor]:
        from pem_composition.adapters.plan import check_layers
        from pem_composition.errors import PEMError
        from pem_composition.merging.gram import gram

        if attachment.pem.kind != "lora":
            raise PEMError.build(
                config.adapter, "RegMean merges LoRA modules", found=f"kind {attachment.pem.kind}"
            )
        return gram(model, check_layers(model, attachment.pem), evaluator, progress=progress)

    return statistics.run(config, GRAM, {}, compute)
