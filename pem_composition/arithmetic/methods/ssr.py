"""SSR: RegMean with an update whose rows lie in the span of the modules' own.

    dW minimises sum_k c_k norm((dW - dW_k) X_k)^2 over dW = B A,   A = [A_1; ...; A_T]

    B = [w_1 B_1 ... w_T B_T] R,   R = Q (G + e I)^-1
    G = sum_k c_k S_k,   S_k = A X_k X_k^T A^T,   rows k of Q = rows k of c_k S_k

The statistics S_k are what the modules see of the inputs of module k's task: (sum r)^2 numbers per
layer, where RegMean's Gram matrices have d_in^2. With sum r >= d_in independent rows it is RegMean
(with off_diagonal = 1). e = ridge * mean diagonal of G; with ridge = 0, the pseudo-inverse. The
published ridge is 1e-4 itself, for means over tokens. Source: SSR-Merge (arXiv:2606.10617) and its
code, github.com/nagara214/SSR-Merge.

Shape suffixes: K sum of ranks, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.methods.regmean import divided
from pem_composition.arithmetic.terms import Factor
from pem_composition.errors import PEMError


def ssr(
    terms: Sequence[Factor],
    seen: Sequence[Tensor],
    shares: Sequence[float],
    *,
    ridge: float,
    layer: str,
) -> Factor:
    """One term of weight 1 and rank sum r_i, in float64.

    Args:
        terms: the updates w_i B_i A_i.
        seen: S_i (K, K), its blocks in the order of the terms.
        shares: c_i >= 0, how much module i's inputs count.
        ridge: as a share of the mean diagonal of G.

    Raises:
        PEMError: statistics of another size than the modules' ranks.
    """
    A_KI = torch.cat([t.A_RI.double() for t in terms])
    width = len(A_KI)
    total, wanted, start = torch.zeros(width, width, dtype=torch.float64), [], 0
    for term, S_KK, share in zip(terms, seen, shares, strict=True):
        if S_KK.shape != (width, width):
            raise PEMError.build(
                f"statistics of {layer}", "do not fit the modules' ranks", found=tuple(S_KK.shape),
                expected=(width, width), do="compute them again with pem gram --merge_with",
            )  # fmt: skip
        stop = start + len(term.A_RI)
        total += share * S_KK.double()
        wanted.append(share * S_KK[start:stop].double())
        start = stop
    total += ridge * total.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    rounding = max(torch.finfo(S.dtype).eps for S in seen)
    R_KK = divided(torch.cat(wanted), total, rounding)
    B_OK = torch.cat([t.B_OR.double() * t.weight for t in terms], dim=1)
    return Factor(1.0, A_KI, B_OK @ R_KK)
