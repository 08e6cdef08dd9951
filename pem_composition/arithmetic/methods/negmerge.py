"""NegMerge: the mean of the entries on whose sign all modules agree, to be negated.

    f = 1/T sum_t dW_t * 1[sign(dW_1) = ... = sign(dW_T), none of them 0]

For modules trained on one forget set with different hyperparameters: what they agree on is what
they forget, and no single one has to be chosen. ``negate(negmerge(a, b, c), s)`` is the published
unlearning. Source: Kim et al. 2025 (arXiv:2410.05583).
"""

from __future__ import annotations

from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule


def negmerge(entries: Entries, draws: Draws) -> Rule:
    """The mean of the entries of unanimous sign."""

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        unanimous = X_TNI.sign().sum(0).abs() == len(X_TNI)
        mean: Tensor = X_TNI.mean(0) * unanimous
        return mean

    return rule
