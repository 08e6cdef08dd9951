"""SVC: singular values of a merged update divided by how often the modules' share is counted.

    g(dW_1, ..., dW_T) = sum_r s_r u_r v_r^T,   a_r^t = u_r^T dW_t,   a_r = u_r^T g = s_r v_r^T
    p_r^t = <a_r, a_r^t> / norm(a_r^t)^2
    f = sum_r s_r n_r / (sum_t max(alpha, p_r^t)) u_r v_r^T

g is the sum, or another method that does not depend on coordinates. p_r^t is 1 where g keeps what
module t does along u_r, and above 1 where g counts it several times. The sum over t and its number
of terms n_r are over the modules that do anything along u_r: of the others p_r^t is 0/0. The guard
in FusionBench's code counts those as alpha; a layer that one of two modules lacks then grows 1.8
times. Its result for a sum scaled by x, with the modules' own updates left as they are, is this one
with alpha / x: alpha 0.1 at the factor 0.3 is 0.33 here.

Caveat: where a_r^t is small, p_r^t can be any number, and the result follows noise.
Source: arXiv:2602.05536.

Shape suffixes: T modules, P and Q dimensions of the core, K directions of g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.core import ROUNDING, svd


def svc(M_TPQ: Tensor, inner: Callable[[Tensor], Tensor], *, alpha: float) -> Tensor:
    """The calibrated core matrix (P, Q); ``inner`` merges (T, P, Q) to (P, Q)."""
    largest = torch.linalg.matrix_norm(M_TPQ).max()
    U_PK, S_K, Vh_KQ = svd(inner(M_TPQ), scale=float(largest))
    responses_TKQ = U_PK.mT @ M_TPQ
    squares_TK = responses_TKQ.square().sum(2)
    there_TK = squares_TK > (ROUNDING * largest) ** 2
    along_TK = (responses_TKQ * (S_K[:, None] * Vh_KQ)).sum(2)
    p_TK = along_TK / torch.where(there_TK, squares_TK, 1.0)
    counted_K = (p_TK.clamp(min=alpha) * there_TK).sum(0)
    factor_K = there_TK.sum(0) / torch.where(counted_K > 0, counted_K, 1.0)
    calibrated: Tensor = (U_PK * (S_K * factor_K)) @ Vh_KQ
    return calibrated
