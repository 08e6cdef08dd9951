"""DARE: drop entries at random and rescale the rest.

    X_t = dW_t * m_t / d,   m_t entrywise 1 with probability d (density), else 0
    dare: f = sum_t X_t         dare_ties: f = the elected mean of TIES over the X_t

E[X_t] = dW_t. Source: Yu et al. 2023 (arXiv:2311.03099), whose drop rate is 1 - d. The masks
depend on seed, layer, position of the module and entry alone, so that neither the order of layers
nor the size of blocks changes them; the order of the modules does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule
from pem_composition.arithmetic.methods.ties import elected_mean


def dropped(draws: Draws, density: float) -> Rule:
    """The block of all T matrices with entries dropped and the rest divided by the density."""

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        keep = uniform_like(draws, start, X_TNI) < density
        return torch.where(keep, X_TNI / density, 0.0)

    return rule


def uniform_like(draws: Draws, start: int, X_TNI: Tensor) -> Tensor:
    """A number in [0, 1) for every entry of a block that begins at row ``start``."""
    modules, rows, width = X_TNI.shape
    return torch.stack(
        [draws.uniform(t, start * width, rows * width).view(rows, width) for t in range(modules)]
    )


def dare(entries: Entries, draws: Draws, *, density: float, seed: int) -> Rule:
    """The sum of the dropped and rescaled updates."""
    drop = dropped(draws, density)
    return lambda start, X_TNI: drop(start, X_TNI).sum(0)


def dare_ties(entries: Entries, draws: Draws, *, density: float, election: str, seed: int) -> Rule:
    """The elected mean of the dropped and rescaled updates."""
    drop = dropped(draws, density)
    return lambda start, X_TNI: elected_mean(drop(start, X_TNI), election)
