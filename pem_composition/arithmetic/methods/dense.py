"""The published, dense form of entry by entry methods on low-rank updates, in bounded memory.

The result f(dW_1, ..., dW_T) of a layer has full rank, so it is compressed: the best rank-R
approximation if the layer has at most EXACT entries (one dense SVD), else the randomised one by
subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061; OVERSAMPLING more columns,
POWERS rounds), which needs products with f only. f is never held whole then: its rows are made
again for every pass, block by block (``entries``), beside matrices of R + OVERSAMPLING columns.
The error of what is written is exact either way: one more pass over the rows.

Shape suffixes: I inputs, O outputs, N rows of a block, R rank, C columns of the sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.delta import kept_rank
from pem_composition.arithmetic.methods.core import ROUNDING
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Entries, Rule, blocks, merged
from pem_composition.arithmetic.ranks import Rank, is_share
from pem_composition.arithmetic.terms import Factor, LayerError

EXACT = 2**22
OVERSAMPLING = 10
POWERS = 3
FIRST_COLUMNS = 64  # of a sketch that grows until it holds a share of the energy


def compressed(
    entries: Entries, rule: Rule, rank: Rank, draws: Draws, *, exact: bool | None = None
) -> Factor:
    """Factors of an approximation of f of rank R at most, with singular values split evenly.

    Of a share of f's energy, the fewest that keep it; a sketch grows until its directions do.

    Args:
        exact: by one dense SVD, or (False) the randomised one; default: as the size says.
    """
    rows, width = entries.shape
    if exact or (exact is None and rows * width <= EXACT):
        U, S, Vh = torch.linalg.svd(merged(entries, rule), full_matrices=False)
        k = kept_rank(S, rank)
    else:
        U, S, Vh, k = _leading(entries, rule, rank, draws)
    k = min(k, max(1, int(S.gt(ROUNDING * float(S[0])).sum())))
    root = S[:k].sqrt()
    return Factor(1.0, root[:, None] * Vh[:k], U[:, :k] * root)


def _leading(
    entries: Entries, rule: Rule, rank: Rank, draws: Draws
) -> tuple[Tensor, Tensor, Tensor, int]:
    """U, S, V^T of leading directions of f, and how many of them the rank asks for."""
    most = min(entries.shape)
    if not is_share(rank):
        U, S, Vh = _sketched(entries, rule, min(int(rank) + OVERSAMPLING, most), draws)
        return U, S, Vh, kept_rank(S, rank)
    energy = sum(float(rule(start, block).square().sum()) for start, block in blocks(entries))
    columns = min(FIRST_COLUMNS, most)
    while True:
        U, S, Vh = _sketched(entries, rule, columns, draws)
        k = kept_rank(S, rank, energy)
        if k <= len(S) or columns == most:
            return U, S, Vh, k
        columns = min(2 * columns, most)


def _sketched(
    entries: Entries, rule: Rule, columns: int, draws: Draws
) -> tuple[Tensor, Tensor, Tensor]:
    width = entries.shape[1]
    start_IC = draws.uniform("sketch", 0, width * columns).view(width, columns) - 0.5
    Q_OC = torch.linalg.qr(_times(entries, rule, start_IC)).Q
    for _ in range(POWERS):
        Q_IC = torch.linalg.qr(_transposed_times(entries, rule, Q_OC)).Q
        Q_OC = torch.linalg.qr(_times(entries, rule, Q_IC)).Q
    U, S, Vh = torch.linalg.svd(_transposed_times(entries, rule, Q_OC).mT, full_matrices=False)
    return Q_OC @ U, S, Vh


def _times(entries: Entries, rule: Rule, X_IC: Tensor) -> Tensor:
    """f X, (O, C)."""
    return torch.cat([rule(start, block) @ X_IC for start, block in blocks(entries)])


def _transposed_times(entries: Entries, rule: Rule, X_OC: Tensor) -> Tensor:
    """f^T X, (I, C)."""
    total = torch.zeros(entries.shape[1], X_OC.shape[1], dtype=torch.float64)
    for start, block in blocks(entries):
        rows = rule(start, block)
        total += rows.mT @ X_OC[start : start + len(rows)]
    return total


def error(entries: Entries, rule: Rule, written: Factor) -> LayerError:
    """Error of written factors against f, Frobenius."""
    B_OR, A_RI = written.B_OR.double() * written.weight, written.A_RI.double()
    wrong = norm = 0.0
    for start, block in blocks(entries):
        exact = rule(start, block)
        difference = exact - B_OR[start : start + len(exact)] @ A_RI
        wrong += float(difference.square().sum())
        norm += float(exact.square().sum())
    return LayerError(wrong**0.5, norm**0.5, norm**0.5)
