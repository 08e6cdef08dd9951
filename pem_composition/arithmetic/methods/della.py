"""DELLA: drop entries at random, small ones more often; elect a sign; average what agrees.

Within a row of n entries let rank 0 be the smallest absolute value and n - 1 the greatest:

    p = d - e/2 + e * rank / (n - 1),   X_t = dW_t * m_t / p,   m_t ~ Bernoulli(p)
    f = the elected mean of TIES over the X_t

d is the density, e epsilon. E[X_t] = dW_t. Source: Deep et al. 2024 (arXiv:2406.11617), MagPrune.
Entries of equal magnitude are ranked by position. Draws as in DARE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.dare import uniform_like
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule
from pem_composition.arithmetic.methods.ties import elected_mean


def della(
    entries: Entries, draws: Draws, *, density: float, epsilon: float, election: str, seed: int
) -> Rule:
    """The elected mean of the pruned updates."""

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        p = keep_probabilities(X_TNI, density, epsilon)
        keep = uniform_like(draws, start, X_TNI) < p
        return elected_mean(torch.where(keep, X_TNI / p, 0.0), election)

    return rule


def keep_probabilities(X_TNI: Tensor, density: float, epsilon: float) -> Tensor:
    """d - e/2 for the smallest entry of each row, d + e/2 for the greatest; d in a row of one."""
    width = X_TNI.shape[-1]
    if width == 1:
        return torch.full_like(X_TNI, density)
    rank = X_TNI.abs().argsort(dim=-1, stable=True).argsort(dim=-1).double()
    return density - epsilon / 2 + epsilon * rank / (width - 1)
