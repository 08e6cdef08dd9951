"""RegMean: the update whose outputs are nearest to every module's outputs on its own inputs.

    dW minimises sum_i c_i || (dW - dW_i) X_i ||_F^2,   G_i = X_i X_i^T  (inputs as columns)

    dW = (sum_i c_i dW_i G_i) (sum_i c_i G_i)^-1

Adding the base's W to dW and every dW_i changes nothing, so this is the published rule on whole
weights. With dW_i = w_i B_i A_i it keeps its low rank without a dense matrix:

    dW = [w_1 B_1 ... w_T B_T] [c_1 A_1 G_1; ...; c_T A_T G_T] (sum_i c_i G_i)^-1

of rank at most sum r_i. Off-diagonal entries of the G_i are scaled down, which keeps the inverse
from following the noise of few rows. Source: Jin et al. 2023 (arXiv:2212.09849).

Shape suffixes: I inputs, O outputs, R rank of one term, K sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pem_composition.arithmetic.terms import Factor
from pem_composition.errors import PEMError


def regmean(
    terms: Sequence[Factor],
    grams: Sequence[Tensor],
    shares: Sequence[float],
    *,
    off_diagonal: float,
    layer: str,
) -> Factor:
    """One term of weight 1 and rank sum r_i, in float64.

    Args:
        terms: the updates w_i B_i A_i.
        grams: G_i (I, I).
        shares: c_i >= 0, how much module i's inputs count.
        off_diagonal: factor of the entries of the G_i outside the diagonal.

    Raises:
        PEMError: a Gram matrix of another size than the layer's inputs.
    """
    rows, total = [], None
    for term, gram, share in zip(terms, grams, shares, strict=True):
        width = term.A_RI.shape[1]
        if gram.shape != (width, width):
            raise PEMError.build(
                f"Gram matrix of {layer}", "does not fit the layer", found=tuple(gram.shape),
                expected=(width, width), do="compute it again with pem gram",
            )  # fmt: skip
        G_II = share * shrunk(gram.double(), off_diagonal)
        total = G_II if total is None else total + G_II
        rows.append(term.A_RI.double() @ G_II)
    assert total is not None
    rounding = max(torch.finfo(gram.dtype).eps for gram in grams)
    A_KI = divided(torch.cat(rows), total, rounding)
    B_OK = torch.cat([t.B_OR.double() * t.weight for t in terms], dim=1)
    return Factor(1.0, A_KI, B_OK)


def shrunk(G_II: Tensor, off_diagonal: float) -> Tensor:
    """G with its off-diagonal entries multiplied by a factor."""
    return off_diagonal * G_II + (1.0 - off_diagonal) * torch.diag(G_II.diagonal())


def divided(A_KI: Tensor, G_II: Tensor, rounding: float) -> Tensor:
    """A G^-1 for a symmetric G; where G is singular but for rounding, with its pseudo-inverse.

    Independent roundings of I^2 entries move an eigenvalue by some sqrt(I) of them. G is singular
    where a pivot of its correlation matrix, whose diagonal is 1, is no more than that.

    Args:
        rounding: relative, of an entry of G as it was stored.
    """
    noise = 4 * len(G_II) ** 0.5 * rounding
    scale = G_II.diagonal().sqrt()
    C_II = G_II / torch.outer(scale, scale)
    L, info = torch.linalg.cholesky_ex(C_II)
    if int(info) == 0 and float(L.diagonal().min()) ** 2 > noise:
        return torch.cholesky_solve((A_KI / scale).mT, L).mT / scale
    inverse: Tensor = torch.linalg.pinv(G_II, hermitian=True, rtol=noise)
    return A_KI @ inverse
