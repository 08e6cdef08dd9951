"""Losses that are means over the rows of the global batch, whatever the number of processes.

Shapes: B rows of this process, C classes; n real rows of the global batch. A row whose label is
IGNORED is filler and counts nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pem_composition.training.batches import IGNORED


def classification_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """sum_i CE(logits_i, label_i) / n;  logits (B, C), labels (B,)."""
    total = F.cross_entropy(
        outputs["logits"].float(), labels, ignore_index=IGNORED, reduction="sum"
    )
    return total / _count(labels, num_items_in_batch)


def regression_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """sum_i (logit_i - score_i)^2 / n;  logits (B, 1), labels (B,)."""
    errors = outputs["logits"].float().squeeze(-1) - labels.float()
    return (errors.square() * labels.ne(IGNORED)).sum() / _count(labels, num_items_in_batch)


def _count(labels: Tensor, given: Tensor | int | None) -> Tensor | int:
    return labels.ne(IGNORED).sum() if given is None else given
