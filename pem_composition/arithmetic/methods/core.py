"""The shared core of low-rank updates: small matrices that hold all of them, without loss.

For the updates dW_t = w_t B_t A_t of one layer, U is an orthonormal basis of the columns of
[B_1 ... B_T] and V one of the rows of the stacked A_t; M_t = U^T dW_t V, and U M_t V^T is dW_t to
rounding. Source: core space merging (arXiv:2509.17786).

The bases are the principal axes of the updates, the left singular vectors of [dW_1 ... dW_T] and
the right ones of the stacked dW_t. The published ones are the singular vectors of the stacked
factors, which span the same spaces but turn with the way B A is split in two; entry by entry
methods depend on that turn. With these axes a result depends on the updates alone (and on signs
of axes, under which every method here is equivariant).

Shape suffixes: I inputs, O outputs, T modules, K sum of ranks, P and Q dimensions of the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pem_composition.arithmetic.delta import check_double
from pem_composition.arithmetic.terms import Factor

# Directions below this share of the largest singular value are float64 rounding, not update.
ROUNDING = 1e-12


class Core(NamedTuple):
    """U (O, P) and V (I, Q) with orthonormal columns, M (T, P, Q)."""

    U_OP: Tensor
    V_IQ: Tensor
    M_TPQ: Tensor

    def factor(self, merged_PQ: Tensor) -> Factor:
        """U f(M) V^T as factors of f(M)'s numerical rank, its singular values split evenly.

        A zero result keeps one direction, with the value zero.
        """
        left, S, right = svd(merged_PQ, at_least=1)
        root = S.sqrt()
        return Factor(1.0, (root[:, None] * right) @ self.V_IQ.mT, self.U_OP @ (left * root))


def core_of(terms: Sequence[Factor]) -> Core:
    """The core of the updates w_t B_t A_t, in float64."""
    Q_B, R_B = torch.linalg.qr(torch.cat([t.B_OR.double() for t in terms], dim=1))
    Q_A, R_A = torch.linalg.qr(torch.cat([t.A_RI.double() for t in terms]).mT)
    ends = [0]
    for t in terms:
        ends.append(ends[-1] + t.A_RI.shape[0])
    parts = list(zip((t.weight for t in terms), ends[:-1], ends[1:], strict=True))
    U, V = _axes(R_B, R_A, parts), _axes(R_A, R_B, parts)
    L, R = U.mT @ R_B, V.mT @ R_A
    M_TPQ = torch.stack([w * L[:, a:b] @ R[:, a:b].mT for w, a, b in parts])
    return Core(Q_B @ U, Q_A @ V, M_TPQ)


def _axes(left: Tensor, right: Tensor, parts: Sequence[tuple[float, int, int]]) -> Tensor:
    """Left singular vectors of [w_t L_t R_t^T] of the directions that are there; at least one.

    With R_t = Q_t S_t they are those of [w_t L_t S_t^T], which has r_t columns a module in place of
    K: the products beside each other differ from it by orthonormal rows alone.
    """
    columns = [
        w * left[:, a:b] @ torch.linalg.qr(right[:, a:b], mode="r").R.mT for w, a, b in parts
    ]
    stacked = torch.cat(columns, dim=1)
    check_double(stacked.square().sum())  # methods take the squares
    return svd(stacked, at_least=1)[0]


def svd(matrix: Tensor, *, scale: float = 0.0, at_least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the numerical rank.

    Args:
        scale: size of what the matrix was computed from, where that may have cancelled; values
            below ROUNDING times the larger of it and S[0] are no directions.
        at_least: this many directions are kept even so.

    Raises:
        PEMError: see ``check_double``.
    """
    check_double(matrix)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    largest = float(S[0]) if len(S) else 0.0
    smallest = ROUNDING * max(scale, largest)
    rank = max(at_least, int(S.gt(smallest).sum()))
    return U[:, :rank], S[:rank], Vh[:rank]


def orthogonalised(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, P Q^T of P D Q^T (orthogonal Procrustes).

    Where the columns are dependent it is the partial isometry on their span, which unlike P Q^T
    over the null space is determined by them.
    """
    P, _, Qh = svd(columns)
    return P @ Qh
