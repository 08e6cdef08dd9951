"""Compress-then-merge: project all updates on shared bases of R columns, merge there.

    U (O, R), V (I, R) maximise sum_t norm(U^T (l_t / norm(dW_t)) dW_t V)^2   (Tucker-2)
    l_t = beta norm(dW_t) + (1 - beta) mean_s norm(dW_s)
    f = U g(U^T dW_1 V, ..., U^T dW_T V) V^T

The result has rank at most R by construction, where merging first and truncating after loses what
the truncation cuts. With beta = 0 every update has the same say about the bases, with 1 its norm.
U and V are found in the core by orthogonal iteration (HOOI), started from the higher-order SVD.
With R at least the size of the core nothing is lost. Source: the published code,
github.com/ZhengbaoHe/compress-then-merge.

Shape suffixes: T modules, P and Q dimensions of the core, R columns of the bases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.core import Core, svd
from pem_composition.arithmetic.terms import Factor

ITERATIONS = 1000
TOLERANCE = 1e-12


def ctm(core: Core, rank: int, beta: float, inner: Callable[[Tensor], Tensor]) -> Factor:
    """U g(...) V^T as factors of rank at most ``rank``; ``inner`` merges (T, R, R) to (R, R)."""
    U_PR, V_QR = bases(_rescaled(core.M_TPQ, beta), rank)
    merged_RR = inner(U_PR.mT @ core.M_TPQ @ V_QR)
    return Core(core.U_OP @ U_PR, core.V_IQ @ V_QR, core.M_TPQ[:, :0]).factor(merged_RR)


def _rescaled(M_TPQ: Tensor, beta: float) -> Tensor:
    norms = torch.linalg.matrix_norm(M_TPQ)
    target = beta * norms + (1 - beta) * norms.mean()
    scaled: Tensor = M_TPQ * (target / torch.where(norms > 0, norms, 1.0))[:, None, None]
    return scaled


def bases(M_TPQ: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Tucker-2: orthonormal U (P, R) and V (Q, R) that keep most of the energy."""
    U, V = _leading(M_TPQ, rank), _leading(M_TPQ.mT, rank)
    energy = -1.0
    for _ in range(ITERATIONS):
        U = _leading(M_TPQ @ V, rank)
        V = _leading(M_TPQ.mT @ U, rank)
        kept = float((U.mT @ M_TPQ @ V).square().sum())
        if kept - energy <= TOLERANCE * kept:
            break
        energy = kept
    return U, V


def _leading(X_TPN: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors of the T matrices side by side."""
    U, _, _ = svd(torch.cat(list(X_TPN), dim=1), at_least=1)
    return U[:, :rank]
