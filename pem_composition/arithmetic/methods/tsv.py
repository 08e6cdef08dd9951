"""TSV-M: singular vectors of all updates side by side, orthogonalised against interference.

    dW_t = U_t S_t V_t^T;   f = U* diag(S_1, ..., S_T) V*^T
    U* = P Q^T from [U_1 ... U_T] = P D Q^T, V* alike

Every update keeps its r_t singular triples: with fewer or more (the published share min(O, I)/T)
the vectors of a low-rank update are not determined. Equal to the dense computation, at the cost of
the QR of O x K and I x K numbers, K = sum r_t: an update's vectors come from its own factors.
Matrices of a core are for the methods that take another one's result. Source: Gargiulo et al. 2024
(arXiv:2412.00081).

Shape suffixes: T modules, P and Q dimensions of the core, O outputs, I inputs, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.delta import thin_qr
from pem_composition.arithmetic.geometry import spectrum
from pem_composition.arithmetic.methods.core import Core, orthogonalised, svd
from pem_composition.arithmetic.terms import Factor


def on_factors(terms: Sequence[Factor]) -> list[Factor]:
    """f(w_1 B_1 A_1, ..., w_T B_T A_T) as factors of its numerical rank, values split evenly.

    A zero result keeps one direction, with the value zero.
    """
    (Q_B, R_B), (Q_A, R_A) = thin_qr(terms)
    ranks = [len(t.A_RI) for t in terms]
    own = zip(torch.split(R_A, ranks, dim=1), torch.split(R_B, ranks, dim=1), strict=True)
    parts = [spectrum([Factor(1.0, A.mT, B)]) for A, B in own]  # in coordinates of the two bases
    U = orthogonalised(torch.cat([p.U_OK for p in parts], dim=1))
    V = orthogonalised(torch.cat([p.V_IK for p in parts], dim=1))
    merged = (U * torch.cat([p.s_K for p in parts])) @ V.mT
    return [Core(Q_B, Q_A, merged[None]).factor(merged)]


def tsv(M_TPQ: Tensor) -> Tensor:
    """The merged core matrix, (P, Q)."""
    left, sizes, right = zip(*[svd(M) for M in M_TPQ], strict=True)
    U = orthogonalised(torch.cat(left, dim=1))
    V = orthogonalised(torch.cat([v.mT for v in right], dim=1))
    return (U * torch.cat(sizes)) @ V.mT
