"""TSV-M: singular vectors of all updates side by side, orthogonalised against interference.

    dW_t = U_t S_t V_t^T;   f = U* diag(S_1, ..., S_T) V*^T
    U* = P Q^T from [U_1 ... U_T] = P D Q^T, V* alike

Every update keeps its r_t singular triples: with fewer or more (the published share min(O, I)/T)
the vectors of a low-rank update are not determined. Equal to the dense computation, at the cost of
one SVD of O x K and I x K numbers, K = sum r_t: an update's vectors come from its own factors.
Matrices of a core are for the methods that take another one's result. Source: Gargiulo et al. 2024
(arXiv:2412.00081).

Shape suffixes: T modules, P and Q dimensions of the core, O outputs, I inputs, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.geometry import spectrum
from pem_composition.arithmetic.methods.core import orthogonalised, svd
from pem_composition.arithmetic.terms import Factor


def on_factors(terms: Sequence[Factor]) -> list[Factor]:
    """f(w_1 B_1 A_1, ..., w_T B_T A_T) as factors of its numerical rank, values split evenly.

    A zero result keeps one direction, with the value zero.
    """
    parts = [spectrum([t]) for t in terms]
    U_OK = orthogonalised(torch.cat([p.U_OK for p in parts], dim=1))
    V_IK = orthogonalised(torch.cat([p.V_IK for p in parts], dim=1))
    # Where the vectors of several updates are dependent, so are the columns: the rank is smaller.
    found = spectrum([Factor(1.0, V_IK.mT, U_OK * torch.cat([p.s_K for p in parts]))])
    if not found.rank:
        return [Factor(1.0, V_IK.new_zeros(1, len(V_IK)), U_OK.new_zeros(len(U_OK), 1))]
    root_K = found.s_K.sqrt()
    return [Factor(1.0, root_K[:, None] * found.V_IK.mT, found.U_OK * root_K)]


def tsv(M_TPQ: Tensor) -> Tensor:
    """The merged core matrix, (P, Q)."""
    left, sizes, right = zip(*[svd(M) for M in M_TPQ], strict=True)
    U = orthogonalised(torch.cat(left, dim=1))
    V = orthogonalised(torch.cat([v.mT for v in right], dim=1))
    return (U * torch.cat(sizes)) @ V.mT
