"""Delta-space arithmetic on low-rank factors: exact, and no dense matrix is ever formed.

A layer's update is dW = sum_k w_k B_k A_k. Everything here works on the factors: sums by
concatenation, norms and best low-rank approximations through thin QR of the stacked factors and
a small core. All norms are computed in float64.

Shape suffixes: I inputs, O outputs, R rank of one term, K sum of ranks, C core size <= K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.ranks import Rank, is_share
from pem_composition.arithmetic.terms import Factor, LayerError
from pem_composition.errors import PEMError

BLOCK = 1024  # outputs or inputs that are widened to float64 at a time
KEPT = 1e-8  # a sum of products may cancel to this share of its bound: 1e-7 of it is rounding
SMALLEST_SQUARE = 1e-200  # below it products of doubles may underflow


def concatenate(terms: Sequence[Factor], scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors (A, B) of rank sum_k r_k with scaling * B A = sum_k w_k B_k A_k.

    A stacks the A_k; B places (w_k / scaling) B_k side by side. Exact up to the rounding of that
    product; a term whose weight equals the scaling is copied bit for bit.

    Examples:
        >>> B = torch.tensor([[1.0], [0.0]])
        >>> a = Factor(0.5, torch.tensor([[2.0, 0.0]]), B)
        >>> b = Factor(1.0, torch.tensor([[0.0, 3.0]]), B)
        >>> A_KI, B_OK = concatenate([a, b])
        >>> (B_OK @ A_KI).tolist()  # 0.5 B_a A_a + B_b A_b
        [[1.0, 3.0], [0.0, 0.0]]
    """
    A_KI = torch.cat([t.A_RI for t in terms], dim=0)
    B_OK = torch.cat([t.B_OR for t in terms], dim=1)
    weights_K = _weights(terms) / scaling
    if bool((weights_K != 1.0).any()):
        for B_NK in torch.split(B_OK, BLOCK):
            B_NK.copy_(B_NK.double() * weights_K)
    return A_KI, B_OK


def truncate(terms: Sequence[Factor], rank: Rank) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors (A, B): B A minimises ||B A - sum_k w_k B_k A_k||_F.

    [w_1 B_1 ... ] = Q_B R_B and [A_1; ...]^T = Q_A R_A (thin QR), U S V^T = SVD(R_B R_A^T);
    B = Q_B U sqrt(S), A = sqrt(S) V^T Q_A^T. Source: Eckart and Young 1936 on the core. The rank
    of the result is at most sum_k r_k, I and O. Of a share, it is ``kept_rank``.

    Examples:
        >>> B = torch.tensor([[1.0], [0.0]])
        >>> a = Factor(0.5, torch.tensor([[2.0, 0.0]]), B)
        >>> b = Factor(1.0, torch.tensor([[0.0, 3.0]]), B)
        >>> A_RI, B_OR = truncate([a, b], rank=1)  # the sum has rank 1: nothing is lost
        >>> torch.allclose(B_OR @ A_RI, torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        True
    """
    (Q_B, R_B), (Q_A, R_A) = thin_qr(terms)
    core = R_B @ R_A.mT
    check_double(core)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    k = kept_rank(S, rank)
    root = S[:k].sqrt()
    dtype = widest([x for t in terms for x in (t.A_RI, t.B_OR)])
    A_RI = (root[:, None] * Vh[:k]) @ Q_A.mT
    B_OR = Q_B @ (U[:, :k] * root)
    return A_RI.to(dtype).contiguous(), B_OR.to(dtype).contiguous()


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """float64 if any of them is, as in a sum of them; else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_double(numbers: Tensor) -> None:
    """Refuse sums and squares of updates that float64 does not hold.

    Raises:
        PEMError: a number is infinite, or none.
    """
    if not bool(numbers.isfinite().all()):
        raise PEMError.build(
            "delta space", "the sum of the updates is too large for a double",
            do="choose smaller coefficients",
        )  # fmt: skip


def kept_rank(S_K: Tensor, rank: Rank, energy: float | None = None) -> int:
    """How many singular values a layer keeps: ``rank``, or those of a share x of the energy.

        min {k >= 1 : s_1^2 + ... + s_k^2 >= x E},   E = sum_i s_i^2

    Args:
        S_K: singular values, largest first.
        energy: E, where S_K are only some of them; K + 1 is the answer where they do not suffice.

    Examples:
        >>> S = torch.tensor([3.0, 2.0, 1.0])  # energies 9, 4, 1 of 14
        >>> kept_rank(S, 2), kept_rank(S, 0.5), kept_rank(S, 0.95)
        (2, 1, 3)
    """
    if not is_share(rank):
        return min(int(rank), len(S_K))
    largest = float(S_K[0]) if len(S_K) else 0.0
    if not largest:
        return min(1, len(S_K))
    sums_K = (S_K.double() / largest).square().cumsum(0)
    total = float(sums_K[-1]) if energy is None else energy / largest / largest
    return 1 + int(sums_K.lt(rank * total).sum())


def rank_of(terms: Sequence[Factor], rank: Rank) -> int:
    """``kept_rank`` of sum_k w_k B_k A_k."""
    (_, R_B), (_, R_A) = thin_qr(terms)
    return kept_rank(torch.linalg.svdvals(R_B @ R_A.mT), rank)


def norm(terms: Sequence[Factor]) -> float:
    """Frobenius norm of sum_k w_k B_k A_k.

    Examples:
        >>> B = torch.tensor([[1.0], [0.0]])
        >>> a = Factor(0.5, torch.tensor([[2.0, 0.0]]), B)
        >>> b = Factor(1.0, torch.tensor([[0.0, 3.0]]), B)
        >>> round(norm([a, b]) ** 2, 6)  # 1^2 + 3^2
        10.0
    """
    return _norm(terms, _products(terms)) if terms else 0.0


def thin_qr(terms: Sequence[Factor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(Q_B, R_B) of [w_1 B_1, ...] and (Q_A, R_A) of [A_1; ...]^T, in float64.

    Examples:
        >>> B = torch.tensor([[1.0], [0.0]])
        >>> a = Factor(0.5, torch.tensor([[2.0, 0.0]]), B)
        >>> b = Factor(1.0, torch.tensor([[0.0, 3.0]]), B)
        >>> (Q_B, R_B), (Q_A, R_A) = thin_qr([a, b])
        >>> dense = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
        >>> torch.allclose(Q_B @ R_B @ R_A.mT @ Q_A.mT, dense)
        True
    """
    B_OK, A_KI = _stacked(terms)
    q_b, q_a = torch.linalg.qr(B_OK), torch.linalg.qr(A_KI.mT)
    return (q_b.Q, q_b.R), (q_a.Q, q_a.R)


def _stacked(terms: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """[w_1 B_1, ...] and [A_1; ...] in float64."""
    B_OK = torch.cat([t.B_OR.double() * t.weight for t in terms], dim=1)
    return B_OK, torch.cat([t.A_RI.double() for t in terms], dim=0)


def _products(terms: Sequence[Factor], rows_KK: Tensor | None = None) -> Tensor:
    """(B^T B) * (A A^T) of the stacked factors, (K, K) float64: its sum is the squared norm.

    The block of some terms is that of these terms alone.

    Args:
        rows_KK: A A^T where it is known.
    """
    rows_KK = _gram([t.A_RI for t in terms], 0) if rows_KK is None else rows_KK
    weights_K = _weights(terms)
    return torch.outer(weights_K, weights_K) * _gram([t.B_OR for t in terms], 1) * rows_KK


def _weights(terms: Sequence[Factor]) -> Tensor:
    """w_k of every column of the stacked B."""
    return torch.tensor([t.weight for t in terms for _ in t.A_RI], dtype=torch.float64)


def _gram(factors: Sequence[Tensor], side: int) -> Tensor:
    """Inner products of all columns (side 1) or rows (side 0) of these factors, in float64.

    They are widened a block of BLOCK outputs or inputs at a time, which stays in the cache.
    """
    width = sum(x.shape[side] for x in factors)
    total_KK = torch.zeros(width, width, dtype=torch.float64)
    for blocks in zip(*(torch.split(x, BLOCK, dim=1 - side) for x in factors), strict=True):
        X = torch.cat(blocks, dim=side).double()
        total_KK += X.mT @ X if side else X @ X.mT
    return total_KK


def _norm(terms: Sequence[Factor], products_KK: Tensor) -> float:
    """Norm of the terms: the root of the products' sum where that keeps its digits, else by QR.

    The sum's rounding is at most 2 max(O, I) eps (sum_k sqrt(p_kk))^2, by Cauchy-Schwarz. Sums that
    cancel below KEPT of that square, or whose squares leave the range of a double, are left to
    ||R_B R_A^T||_F of the thin QR factors.
    """
    square = float(products_KK.sum())
    bound = float(products_KK.diagonal().sqrt().sum()) ** 2
    if SMALLEST_SQUARE < KEPT * bound < square < math.inf:
        return math.sqrt(square)
    if not any(t.weight and t.B_OR.count_nonzero() for t in terms):
        return 0.0
    B_OK, A_KI = _stacked(terms)
    R_B, R_A = (torch.linalg.qr(x, mode="r").R for x in (B_OK, A_KI.mT))
    core = R_B @ R_A.mT
    largest = float(core.abs().max())
    inside = 0.0 < largest < math.inf
    return largest * float(torch.linalg.matrix_norm(core / largest)) if inside else largest


def factor_error(written: Factor, expression: Sequence[Factor]) -> LayerError:
    """Error of written factors against sum_k w_k B_k A_k.

    Examples:
        >>> B = torch.tensor([[1.0], [0.0]])
        >>> a = Factor(0.5, torch.tensor([[2.0, 0.0]]), B)
        >>> b = Factor(1.0, torch.tensor([[0.0, 3.0]]), B)
        >>> round(factor_error(a, [a, b]).error, 6)  # b is missing
        3.0
    """
    width = sum(len(t.A_RI) for t in expression)
    rest_OK = _difference(written, expression)
    if rest_OK is None:
        terms = [*expression, written._replace(weight=-written.weight)]
        products = _products(terms)
        error, own = _norm(terms, products), products[:width, :width]
    else:
        rows_KK = _gram([written.A_RI], 0)
        own, error = _products(expression, rows_KK), 0.0
        if rest_OK.count_nonzero():
            rest = [Factor(1.0, written.A_RI, rest_OK)]
            error = _norm(rest, _products(rest, rows_KK))
    sizes, start = 0.0, 0
    for t in expression:
        stop = start + len(t.A_RI)
        sizes += _norm([t], own[start:stop, start:stop])
        start = stop
    return LayerError(error, _norm(expression, own), sizes)


def _difference(written: Factor, expression: Sequence[Factor]) -> Tensor | None:
    """w B - [w_1 B_1, ...] in float64 where both have the same stacked A, None where they have not.

    Equal columns cancel in it without rounding.
    """
    sizes = [len(t.A_RI) for t in expression]
    same = sum(sizes) == len(written.A_RI) and all(
        torch.equal(A, t.A_RI)
        for A, t in zip(torch.split(written.A_RI, sizes), expression, strict=True)
    )
    if not same:
        return None
    rest_OK = written.B_OR.double() * written.weight
    for rest_OR, t in zip(torch.split(rest_OK, sizes, dim=1), expression, strict=True):
        rest_OR.sub_(t.B_OR, alpha=t.weight)
    return rest_OK


def tensor_error(written: Tensor, expression: Iterable[tuple[float, Tensor]]) -> LayerError:
    """Error of a written tensor against sum_k w_k t_k, elementwise kinds ((IA)^3 minus 1, full).

    Examples:
        >>> tensor_error(torch.tensor([3.0, 0.0]), [(0.5, torch.tensor([2.0, 0.0]))]).error
        2.0
    """
    terms = [w * t.double() for w, t in expression]
    exact = torch.stack(terms).sum(0) if terms else torch.zeros_like(written, dtype=torch.float64)
    error = float((written.double() - exact).norm())
    return LayerError(error, float(exact.norm()), sum(float(t.norm()) for t in terms))
