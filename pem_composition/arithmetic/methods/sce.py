"""SCE: select entries of great variance, weigh modules by their energy, erase minority signs.

    X_t = dW_t where the variance over t is among the d n greatest, else 0
    w_t = sum X_t^2 / sum_s sum X_s^2;   g = sign(sum_t X_t)
    f = sum_{t: sign(X_t) = g} w_t X_t / sum_{t: sign(X_t) = g} w_t

Source: Wan et al. 2024 (arXiv:2408.07990). One module alone has no variance: all its entries are
selected. w_t are per layer and not negative, so the quotient is a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.delta import check_double
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule, blocks, largest, share
from pem_composition.arithmetic.methods.ties import agreeing


def sce(entries: Entries, draws: Draws, *, density: float) -> Rule:
    """The weighted mean of the selected entries of elected sign."""
    select = _selection(entries, density)
    energy = torch.zeros(entries.count, dtype=torch.float64)
    for start, X in blocks(entries):
        energy += select(start, X).square().sum((1, 2))
    check_double(energy)
    w_T11 = energy[:, None, None]

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        selected = select(start, X_TNI)
        w = agreeing(selected, "total") * w_T11
        total = w.sum(0)
        return (selected * w).sum(0) / torch.where(total > 0, total, 1.0)

    return rule


def _selection(entries: Entries, density: float) -> Rule:
    """The block of all T matrices with entries of small variance set to zero."""
    count = share(entries, density)
    if entries.count == 1 or count == entries.shape[0] * entries.shape[1]:
        return lambda start, X_TNI: X_TNI
    (chosen,) = largest(entries, _variance, count)
    return lambda start, X_TNI: X_TNI * chosen.mask(start, _variance(start, X_TNI)[0])


def _variance(start: int, X_TNI: Tensor) -> Tensor:
    return X_TNI.var(dim=0, correction=0)[None]
