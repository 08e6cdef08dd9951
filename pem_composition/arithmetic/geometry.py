"""Geometry of updates: norms, ranks, angles and signs of dW = sum_k w_k B_k A_k, from factors.

Exact in float64 up to rounding. The only thing that is as large as dW, its signs, is visited in
blocks of rows.

Shape suffixes: I inputs, O outputs, R rank of one term, C core size, K numerical rank; N entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pem_composition.arithmetic.delta import check_double, thin_qr
from pem_composition.arithmetic.terms import Factor

BLOCK_ENTRIES = 1 << 20  # of a dense block of rows: 8 MB in float64
EPS = torch.finfo(torch.float64).eps


class Spectrum(NamedTuple):
    """The part of an SVD above rounding: dW = U diag(s) V^T."""

    U_OK: Tensor
    s_K: Tensor  # descending
    V_IK: Tensor

    @property
    def rank(self) -> int:
        """Numerical rank: singular values above max(O, I) * eps * s_1."""
        return int(self.s_K.numel())

    @property
    def norm(self) -> float:
        """||dW||_F."""
        return float(self.s_K.norm())

    @property
    def spectral_norm(self) -> float:
        """||dW||_2, the largest singular value."""
        return float(self.s_K[0]) if self.rank else 0.0

    @property
    def stable_rank(self) -> float:
        """||dW||_F^2 / ||dW||_2^2, between 1 and the rank; 0 for dW = 0.

        Source: Rudelson and Vershynin 2007 (arXiv:math/0503442).
        """
        return (self.norm / self.spectral_norm) ** 2 if self.rank else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j: the entropy rank; 0 for dW = 0.

        Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
        """
        p_K = self.s_K / self.s_K.sum()
        return float(torch.exp(-(p_K * p_K.log()).sum())) if self.rank else 0.0


def spectrum(terms: Sequence[Factor]) -> Spectrum:
    """SVD of sum_k w_k B_k A_k through thin QR of the stacked factors and a small core."""
    (Q_B, R_B), (Q_A, R_A) = thin_qr(terms)
    core_CC = R_B @ R_A.mT
    check_double(core_CC)
    U_CC, s_C, Vh_CC = torch.linalg.svd(core_CC, full_matrices=False)
    floor = max(Q_B.shape[0], Q_A.shape[0]) * EPS * float(s_C[0]) if s_C.numel() else 0.0
    k = int((s_C > floor).sum())
    return Spectrum(Q_B @ U_CC[:, :k], s_C[:k], Q_A @ Vh_CC[:k].mT)


def inner(a: Sequence[Factor], b: Sequence[Factor]) -> float:
    """<dW_a, dW_b>_F = sum_kl w_k w_l sum((B_k^T B_l) * (A_k A_l^T))."""
    total = 0.0
    for x in a:
        for y in b:
            gram_RR = x.B_OR.double().mT @ y.B_OR.double()
            other_RR = x.A_RI.double() @ y.A_RI.double().mT
            total += x.weight * y.weight * float((gram_RR * other_RR).sum())
    return total


def inner_products(terms: Sequence[Factor]) -> Tensor:
    """``inner`` of every two terms, (T, T) float64."""
    rows = [[inner([s], [t]) for t in terms] for s in terms]
    return torch.tensor(rows, dtype=torch.float64)


def principal_angles(U: Tensor, W: Tensor) -> Tensor:
    """Angles (radians, ascending) between the spans of two orthonormal bases (N, K_a), (N, K_b).

    Cosines are the singular values of U^T W; angles below 45 degrees come from sines, which keep
    their digits there. Source: Bjoerck and Golub 1973, "Numerical methods for computing angles
    between linear subspaces".
    """
    if U.shape[1] < W.shape[1]:
        U, W = W, U
    overlap = U.mT @ W
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(W - U @ overlap).clamp(max=1.0).flip(0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def overlap(angles: Tensor) -> float:
    """Mean squared cosine of the principal angles: 1 for nested subspaces, 0 for orthogonal ones.

    Two random subspaces of dimensions k <= l in n dimensions have l / n on average.
    """
    return float(angles.cos().square().mean()) if angles.numel() else 0.0


class Signs(NamedTuple):
    """How the entries of two updates agree in sign; sums over layers are sums of these."""

    entries: int = 0
    opposite: int = 0  # entries where one is positive and the other negative
    product: float = 0.0  # sum |x y|
    opposite_product: float = 0.0  # sum |x y| over the opposite entries

    @property
    def conflict(self) -> float:
        """Share of the entries with opposite signs; one half for unrelated updates."""
        return self.opposite / self.entries if self.entries else 0.0

    @property
    def weighted_conflict(self) -> float:
        """The same share, every entry weighted by |x y|: what cancels in <dW_a, dW_b>."""
        return self.opposite_product / self.product if self.product else 0.0

    def plus(self, other: Signs) -> Signs:
        """Both together."""
        return Signs(
            self.entries + other.entries,
            self.opposite + other.opposite,
            self.product + other.product,
            self.opposite_product + other.opposite_product,
        )


def signs(a: Sequence[Factor], b: Sequence[Factor]) -> Signs:
    """Sign agreement of two updates of one layer, over blocks of rows of the dense matrices."""
    total = Signs()
    for x, y in zip(row_blocks(a), row_blocks(b), strict=True):
        total = total.plus(tensor_signs(x, y))
    return total


def tensor_signs(x: Tensor, y: Tensor) -> Signs:
    """Sign agreement of two tensors, entry by entry."""
    x, y = x.double(), y.double()
    opposite = ((x > 0) & (y < 0)) | ((x < 0) & (y > 0))
    product = (x * y).abs()
    against = float(product[opposite].sum())
    return Signs(x.numel(), int(opposite.sum()), float(product.sum()), against)


def row_blocks(terms: Sequence[Factor]) -> Iterator[Tensor]:
    """sum_k w_k B_k A_k, some rows at a time."""
    rows, columns = terms[0].B_OR.shape[0], terms[0].A_RI.shape[1]
    step = max(1, BLOCK_ENTRIES // columns)
    for start in range(0, rows, step):
        parts = [t.weight * t.B_OR[start : start + step].double() @ t.A_RI.double() for t in terms]
        yield torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
