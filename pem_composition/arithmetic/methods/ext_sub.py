"""Ext-Sub: subtract of an anti-expert only what it does not share with an expert, row by row.

    f(a, b) = a - ext(b),   ext(b) = b - <u, b> u / norm(u)^2,   u = a / norm(a) + b / norm(b)

for every row a of dW_1 (the expert) and b of dW_2 (the anti-expert). u bisects the angle between
the two, and <u, b> / norm(u)^2 is norm(b) / 2 whatever the angle, so that

    f(a, b) = (1 + norm(b) / (2 norm(a))) a - b / 2

Each row of the result is a sum of the two rows: on LoRA factors it is exact, of rank r_1 + r_2,
without a dense matrix. Where one of the rows is zero nothing is shared, and f = a - b; there the
published code divides by zero. Coefficients (1, s) subtract s times as much. A row is one output of
a LoRA layer, a stored row of a matrix, or the whole of a vector.
Source: Hu et al. 2024 (arXiv:2308.08090) and its code, github.com/HITsz-TMG/Ext-Sub.

Shape suffixes: N rows of a block, O outputs, I inputs, R rank of one term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule
from pem_composition.arithmetic.terms import Factor


def ext_sub(entries: Entries, draws: Draws) -> Rule:
    """The expert's rows less what the anti-expert's have of their own."""

    def rule(start: int, X_TNI: Tensor) -> Tensor:
        x_N, y_N = _weights(*torch.linalg.vector_norm(X_TNI, dim=2))
        return x_N[:, None] * X_TNI[0] + y_N[:, None] * X_TNI[1]

    return rule


def on_factors(terms: Sequence[Factor]) -> list[Factor]:
    """The same on two low-rank updates: their B with rows scaled, in float64."""
    wide = [Factor(1.0, t.A_RI.double(), t.weight * t.B_OR.double()) for t in terms]
    weights = _weights(*map(_row_norms, wide))
    return [t._replace(B_OR=w_O[:, None] * t.B_OR) for w_O, t in zip(weights, wide, strict=True)]


def _weights(a_N: Tensor, b_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the two rows, from their norms."""
    both = (a_N > 0) & (b_N > 0)
    ratio_N = torch.where(both, b_N / torch.where(both, a_N, 1.0), 0.0)
    return 1.0 + ratio_N / 2, torch.where(both, -0.5, -1.0).to(ratio_N)


def _row_norms(term: Factor) -> Tensor:
    """Norm of every row of B A, by the triangle of A^T = Q R: norm(B R^T)."""
    R_RR = torch.linalg.qr(term.A_RI.mT, mode="r").R
    norms_O: Tensor = torch.linalg.vector_norm(term.B_OR @ R_RR.mT, dim=1)
    return norms_O
