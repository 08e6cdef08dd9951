"""TSV-M: singular vectors of all updates side by side, orthogonalised against interference.

    dW_t = U_t S_t V_t^T;   f = U* diag(S_1, ..., S_T) V*^T
    U* = P Q^T from [U_1 ... U_T] = P D Q^T, V* alike

Every update keeps its r_t singular triples: with fewer or more (the published share min(O, I)/T)
the vectors of a low-rank update are not determined. Computed in the core, which holds all of the
vectors; equal to the dense computation. Source: Gargiulo et al. 2024 (arXiv:2412.00081).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.core import orthogonalised, svd


def tsv(M_TPQ: Tensor) -> Tensor:
    """The merged core matrix, (P, Q)."""
    left, sizes, right = zip(*[svd(M) for M in M_TPQ], strict=True)
    U = orthogonalised(torch.cat(left, dim=1))
    V = orthogonalised(torch.cat([v.mT for v in right], dim=1))
    return (U * torch.cat(sizes)) @ V.mT
