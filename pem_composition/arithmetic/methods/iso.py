"""Isotropic merging: the directions of the sum, all with the same singular value.

    Iso-C:    sum_t dW_t = U S V^T;  f = mean(S) U V^T
    Iso-CTS:  the leading directions of the sum and, for every update, those of what remains of
              dW_t outside them; all orthogonalised, with the mean of their singular values

Source: Marczak et al. 2025 (arXiv:2502.04959), defined there for updates of full rank. On
low-rank updates the dense computation is ill-posed: the directions outside the updates' span are
rounding noise, and so is what the mean runs over. Here both run over the directions that are
there: the numerical rank of the sum, and of each remainder, in the core.

Equal singular values leave open which directions a lower rank keeps. It keeps those whose own
values, before they were made equal, are the largest; the value that all get stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.core import orthogonalised, svd


def iso_c(M_TPQ: Tensor, *, rank: int | None = None) -> Tensor:
    """The sum with equal singular values, (P, Q), of at most ``rank``."""
    U, S, Vh = svd(M_TPQ.sum(0), scale=_scale(M_TPQ))
    return _levelled(U, S, Vh.mT, rank)


def iso_cts(M_TPQ: Tensor, *, common: float, rank: int | None = None) -> Tensor:
    """Common and task-specific directions with equal singular values, (P, Q), at most ``rank``.

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
    return _levelled(U_star, torch.cat(sizes), V_star, rank)


def _levelled(U_PK: Tensor, S_K: Tensor, V_QK: Tensor, rank: int | None) -> Tensor:
    """sum_k mean(S) u_k v_k^T; of a rank above the one asked for, only the k of the largest S."""
    mean = S_K.sum() / max(1, len(S_K))
    whole: Tensor = mean * (U_PK @ V_QK.mT)
    if rank is None or len(svd(whole)[1]) <= rank:
        return whole
    kept = S_K.argsort(descending=True, stable=True)[:rank]
    cut: Tensor = mean * (U_PK[:, kept] @ V_QK[:, kept].mT)
    return cut


def _scale(M_TPQ: Tensor) -> float:
    return float(torch.linalg.matrix_norm(M_TPQ).max())
