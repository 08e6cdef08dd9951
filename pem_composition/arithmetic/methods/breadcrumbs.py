"""Model Breadcrumbs: of each update neither the largest entries nor the small ones.

    f = sum_t dW_t * m_t,   m_t = 1 for the entries of rank g n < rank <= (g + d) n by magnitude

d is the density, g gamma, n the entries of the layer. Source: Davari and Belilovsky 2023
(arXiv:2312.06795). With g n < 1 nothing is cut from the top (an empty slice there wipes the whole
update in mergekit).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule, largest, magnitudes, share


def breadcrumbs(entries: Entries, draws: Draws, *, density: float, gamma: float) -> Rule:
    """The sum of the updates without outliers and without small entries."""
    size, between = entries.shape[0] * entries.shape[1], share(entries, density)
    outliers = min(int(gamma * size), size - between)
    kept = largest(entries, magnitudes, outliers + between)
    top = largest(entries, magnitudes, outliers) if outliers else []

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        sizes = X_TNI.abs()
        masks = torch.stack([k.mask(start, s) for k, s in zip(kept, sizes, strict=True)])
        if top:
            masks &= ~torch.stack([k.mask(start, s) for k, s in zip(top, sizes, strict=True)])
        return (X_TNI * masks).sum(0)

    return rule
