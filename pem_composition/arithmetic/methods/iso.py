"""Isotropic merging: the directions of the sum, all with the same singular value.

    Iso-C:    sum_t dW_t = U S V^T;  f = mean(S) U V^T
    Iso-CTS:  the leading directions of the sum and, for every update, those of what remains of
              dW_t outside them; all orthogonalised, with the mean of their singular values

Source: Marczak et al. 2025 (arXiv:2502.04959), defined there for updates of full rank. On
low-rank updates the dense computation is ill-posed: the directions outside the updates' span are
rounding noise, and so is what the mean runs over. Here both run over the directions that are
there: the numerical rank of the sum, and of each remainder, in the core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.core import orthogonalised, svd


def iso_c(M_TPQ: Tensor) -> Tensor:
    """The sum with equal singular values, (P, Q)."""
    U, S, Vh = svd(M_TPQ.sum(0), scale=_scale(M_TPQ))
    return _mean(S) * (U @ Vh)


def iso_cts(M_TPQ: Tensor, *, common: float) -> Tensor:
    """Common and task-specific directions with equal singular values, (P, Q).

    Of K = min(P, Q) directions T n come from the remainders, n = round(K (1 - common) / T) each,
    and the rest from the sum, as far as there are that many.
    """
    tasks, directions = M_TPQ.shape[0], min(M_TPQ.shape[1:])
    each = round((directions - int(directions * common)) / tasks)
    each = min(each, directions // tasks)
    scale = _scale(M_TPQ)
    U, S, Vh = svd(M_TPQ.sum(0), scale=scale)
    shared = directions - tasks * each
    parts = [(U[:, :shared], S[:shared], Vh[:shared])]
    outside = torch.eye(len(U), dtype=U.dtype) - parts[0][0] @ parts[0][0].mT
    for M in M_TPQ:
        u, s, vh = svd(outside @ M, scale=scale)
        parts.append((u[:, :each], s[:each], vh[:each]))
    left, sizes, right = zip(*parts, strict=True)
    U_star = orthogonalised(torch.cat(left, dim=1))
    V_star = orthogonalised(torch.cat([v.mT for v in right], dim=1))
    return _mean(torch.cat(sizes)) * (U_star @ V_star.mT)


def _scale(M_TPQ: Tensor) -> float:
    return float(torch.linalg.matrix_norm(M_TPQ).max())


def _mean(S: Tensor) -> Tensor:
    return S.sum() / max(1, len(S))
