"""Magnitude pruning: of each update only the largest entries.

    f(dW_1, ..., dW_T) = sum_t top_d(dW_t)

top_d keeps the floor(d n) entries of greatest absolute value of a layer's n (at least one; of
equal ones the first in row-major order). Source: Han et al. 2015 (arXiv:1506.02626) for pruning,
PEFT's magnitude_prune for the sum. On core matrices these are not the published entries of dW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule, largest, magnitudes, share


def trimmed(entries: Entries, density: float) -> Rule:
    """The block of all T matrices with their small entries set to zero, (T, N, I)."""
    chosen = largest(entries, magnitudes, share(entries, density))

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        masks = [c.mask(start, x.abs()) for c, x in zip(chosen, X_TNI, strict=True)]
        return X_TNI * torch.stack(masks)

    return rule


def magnitude(entries: Entries, draws: Draws, *, density: float) -> Rule:
    """The sum of the pruned updates."""
    trim = trimmed(entries, density)
    return lambda start, X_TNI: trim(start, X_TNI).sum(0)
