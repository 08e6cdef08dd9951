"""Delta-space arithmetic on low-rank factors: exact, and no dense matrix is ever formed.

A layer's update is dW = sum_k w_k B_k A_k. Everything here works on the factors: sums by
concatenation, norms and best low-rank approximations through thin QR of the stacked factors and
a small core. All norms are computed in float64.

Shape suffixes: I inputs, O outputs, R rank of one term, K sum of ranks, C core size <= K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pem_composition.errors import PEMError

KEPT = 1e-8  # a sum of products may cancel to this share of its bound: 1e-7 of it is rounding
SMALLEST_SQUARE = 1e-200  # below it products of doubles may underflow


class Factor(NamedTuple):
    """One low-rank term: weight * B A."""

    weight: float
    A_RI: Tensor
    B_OR: Tensor


def concatenate(terms: Sequence[Factor], scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors (A, B) of rank sum_k r_k with scaling * B A = sum_k w_k B_k A_k.

    A stacks the A_k; B places (w_k / scaling) B_k side by side. Exact up to the rounding of that
    product; a term whose weight equals the scaling is copied bit for bit.
    """
    A_KI = torch.cat([t.A_RI for t in terms], dim=0)
    B_OK = torch.cat([_scaled(t.B_OR, t.weight / scaling) for t in terms], dim=1)
    return A_KI, B_OK


def _scaled(B: Tensor, weight: float) -> Tensor:
    return B if weight == 1.0 else (B.double() * weight).to(B.dtype)


def truncate(terms: Sequence[Factor], rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors (A, B): B A minimises ||B A - sum_k w_k B_k A_k||_F.

    [w_1 B_1 ... ] = Q_B R_B and [A_1; ...]^T = Q_A R_A (thin QR), U S V^T = SVD(R_B R_A^T);
    B = Q_B U sqrt(S), A = sqrt(S) V^T Q_A^T. Source: Eckart and Young 1936 on the core. The rank
    of the result is at most sum_k r_k, I and O.
    """
    (Q_B, R_B), (Q_A, R_A) = thin_qr(terms)
    core = R_B @ R_A.mT
    if not bool(core.isfinite().all()):
        raise PEMError.build("delta space", "the sum of the updates is too large for a double")
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    root = S[:rank].sqrt()
    dtype = terms[0].A_RI.dtype
    A_RI = (root[:, None] * Vh[:rank]) @ Q_A.mT
    B_OR = Q_B @ (U[:, :rank] * root)
    return A_RI.to(dtype).contiguous(), B_OR.to(dtype).contiguous()


def norm(terms: Sequence[Factor]) -> float:
    """Frobenius norm of sum_k w_k B_k A_k."""
    if not terms:
        return 0.0
    stack = _Stack.of(terms)
    return stack.norm(stack.products())


def thin_qr(terms: Sequence[Factor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(Q_B, R_B) of [w_1 B_1, ...] and (Q_A, R_A) of [A_1; ...]^T, in float64."""
    stack = _Stack.of(terms)
    q_b, q_a = torch.linalg.qr(stack.B_OK), torch.linalg.qr(stack.A_KI.mT)
    return (q_b.Q, q_b.R), (q_a.Q, q_a.R)


class _Stack(NamedTuple):
    """sum_k w_k B_k A_k as one product [w_1 B_1, ...] [A_1; ...], in float64."""

    B_OK: Tensor
    A_KI: Tensor

    @classmethod
    def of(cls, terms: Sequence[Factor]) -> _Stack:
        """Filled block by block: no term is widened apart from its place."""
        (outputs, _), (_, inputs) = terms[0].B_OR.shape, terms[0].A_RI.shape
        width = sum(len(t.A_RI) for t in terms)
        B_OK = torch.empty(outputs, width, dtype=torch.float64)
        A_KI = torch.empty(width, inputs, dtype=torch.float64)
        start = 0
        for t in terms:
            stop = start + len(t.A_RI)
            B_OK[:, start:stop].copy_(t.B_OR).mul_(t.weight)
            A_KI[start:stop] = t.A_RI
            start = stop
        return cls(B_OK, A_KI)

    def part(self, start: int, stop: int) -> _Stack:
        """Columns start to stop of B with their rows of A."""
        return _Stack(self.B_OK[:, start:stop], self.A_KI[start:stop])

    def products(self) -> Tensor:
        """(B^T B) * (A A^T), whose sum is ||B A||_F^2; a block's sum is that of its part."""
        return (self.B_OK.mT @ self.B_OK) * (self.A_KI @ self.A_KI.mT)

    def norm(self, products_KK: Tensor) -> float:
        """||B A||_F: the root of the products' sum where that keeps its digits, else by thin QR.

        Rounding of the sum is at most 2 max(O, I) eps (sum_k sqrt(p_kk))^2, by Cauchy-Schwarz. Sums
        that cancel below KEPT of that square, or whose squares leave the range of a double, are
        left to ||R_B R_A^T||_F.
        """
        square = float(products_KK.sum())
        bound = float(products_KK.diagonal().sqrt().sum()) ** 2
        if SMALLEST_SQUARE < KEPT * bound < square < math.inf:
            return math.sqrt(square)
        if not self.B_OK.any():
            return 0.0
        R_B, R_A = (torch.linalg.qr(x, mode="r").R for x in (self.B_OK, self.A_KI.mT))
        return float(torch.linalg.matrix_norm(R_B @ R_A.mT))


class LayerError(NamedTuple):
    """Absolute error of one layer and the norms it is judged by, all Frobenius."""

    error: float  # ||written - expression||
    norm: float  # ||expression||
    terms: float  # sum of the norms of the expression's terms

    @property
    def relative(self) -> float:
        """error / ||expression||; where that cancels to zero, error / sum of the terms' norms."""
        return _ratio(self.error, self.norm, self.terms)


def factor_error(written: Factor, expression: Sequence[Factor]) -> LayerError:
    """Error of written factors against sum_k w_k B_k A_k."""
    both = _Stack.of([*expression, written._replace(weight=-written.weight)])
    width = len(both.A_KI) - len(written.A_RI)
    exact, negated = both.part(0, width), both.part(width, len(both.A_KI))
    if torch.equal(exact.A_KI, negated.A_KI):  # equal B then cancel without rounding
        difference = _Stack(exact.B_OK + negated.B_OK, exact.A_KI)
        products, own = difference.products(), exact.products()
    else:
        difference, products = both, both.products()
        own = products[:width, :width]
    terms, start = 0.0, 0
    for t in expression:
        stop = start + len(t.A_RI)
        terms += exact.part(start, stop).norm(own[start:stop, start:stop])
        start = stop
    return LayerError(difference.norm(products), exact.norm(own), terms)


def tensor_error(written: Tensor, expression: Iterable[tuple[float, Tensor]]) -> LayerError:
    """Error of a written tensor against sum_k w_k t_k, elementwise kinds ((IA)^3 minus 1, full)."""
    terms = [w * t.double() for w, t in expression]
    exact = torch.stack(terms).sum(0) if terms else torch.zeros_like(written, dtype=torch.float64)
    error = float((written.double() - exact).norm())
    return LayerError(error, float(exact.norm()), sum(float(t.norm()) for t in terms))


def total_error(layers: Mapping[str, LayerError]) -> float:
    """Relative error over all layers: sqrt(sum error^2) / sqrt(sum norm^2)."""
    error, exact, terms = (math.hypot(*(v[i] for v in layers.values())) for i in range(3))
    return _ratio(error, exact, terms)


def _ratio(error: float, exact: float, terms: float) -> float:
    cancelled = exact <= 1e-12 * terms
    reference = terms if cancelled else exact
    return error / reference if reference else 0.0
