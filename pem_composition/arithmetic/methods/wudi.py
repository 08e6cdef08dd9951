"""WUDI and ACTMat: the update that every module's own update interferes with least.

    D minimises sum_t w_t norm((D - dW_t) dW_t^T)^2 + e norm(D - S)^2,   S = sum_t dW_t

    D = (sum_t w_t dW_t dW_t^T dW_t + e S) (G + e I)^-1,   G = sum_t w_t dW_t^T dW_t

w_t = 1 / norm(dW_t)^2 (WUDI) or 1 (ACTMat): RegMean with the Gram matrix of the inputs estimated
from the update itself. e = ridge mean(g), g the eigenvalues of G that are not zero. With ridge = 0
this is the closed form (and the pseudo-inverse); a large ridge gives the sum S.

The ridge is towards S, where the published optimiser starts and near which its few steps of small
size stay. Without it the closed form explodes where the modules share nearly one A: G is then
almost singular in the directions in which the rows of the A_t differ. Where the rows of all A_t are
independent (sum r_t <= I) and ridge = 0, the minimum is zero and unique: D acts on the rows of
each A_t as module t does, and w_t has no influence.

All of it holds in the core: D = U f(M_1, ..., M_T) V^T. Per layer that costs the QR of the stacked
factors, O((O + I) K^2), and one SVD of T P x Q numbers, O(T K^3), K the sum of ranks; no O x I and
no I x I matrix is formed. Sources: Cheng et al. 2025 (arXiv:2503.08099), by gradient descent;
the closed form and ACTMat: arXiv:2604.01329.

Shape suffixes: T modules, P and Q dimensions of the core, O outputs, I inputs, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.core import svd


def wudi(M_TPQ: Tensor, *, ridge: float) -> Tensor:
    """The merged core matrix (P, Q), every module with weight 1 / norm(dW_t)^2."""
    squares = M_TPQ.square().sum((1, 2))
    return _least_interference(M_TPQ, 1.0 / torch.where(squares > 0, squares, 1.0), ridge)


def actmat(M_TPQ: Tensor, *, ridge: float) -> Tensor:
    """The merged core matrix (P, Q), every module with weight 1."""
    return _least_interference(M_TPQ, torch.ones(len(M_TPQ), dtype=M_TPQ.dtype), ridge)


def _least_interference(M_TPQ: Tensor, weights_T: Tensor, ridge: float) -> Tensor:
    """D by the SVD of the stacked roots of G, which keeps twice the digits that G itself would."""
    root_TPQ = weights_T.sqrt()[:, None, None] * M_TPQ
    U, S_K, Vh_KQ = svd(torch.cat(list(root_TPQ)))  # G = V S^2 V^T
    own_PTP = torch.cat(list(root_TPQ @ M_TPQ.mT), dim=1)  # sum_t w_t M M^T M = own U S V^T
    energy_K = S_K.square()
    e = ridge * energy_K.mean() if len(S_K) else 0.0
    above_PK = own_PTP @ U * S_K + e * (M_TPQ.sum(0) @ Vh_KQ.mT)
    merged: Tensor = above_PK / (energy_K + e) @ Vh_KQ
    return merged
