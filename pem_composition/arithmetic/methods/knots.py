"""KnOTS: merge the updates' rows in a common column space.

    [dW_1 ... dW_T] = U S [V_1^T ... V_T^T];   f = U g(S V_1^T, ..., S V_T^T)

g is a method that works entry by entry, here on K x I matrices in input coordinates; with a sum
it changes nothing. Source: Stoica et al. 2024 (arXiv:2410.19735).

In factors: with dW_t = Q M_t V^T (``core``) the left singular vectors of [M_1 ... M_T] are those
of the dense matrix, and S V_t^T = U^T dW_t. What is formed is K x I per module, never O x I or
O x T I. Coefficients scale the updates beforehand, each its own (the published code multiplies
every module by the first weight).

Shape suffixes: I inputs, O outputs, T modules, P columns of U, at most the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from pem_composition.arithmetic.methods.core import Core, svd
from pem_composition.arithmetic.methods.entries import Entries, Rule, Stacked, merged
from pem_composition.arithmetic.terms import Factor


def knots(core: Core, inner: Callable[[Entries], Rule]) -> Factor:
    """U g(...) as factors; ``core.U_OP`` are the axes of [dW_1 ... dW_T] already."""
    rows_TPI = core.M_TPQ @ core.V_IQ.mT
    entries = Stacked(rows_TPI)
    left, S, right = svd(merged(entries, inner(entries)), at_least=1)
    root = S.sqrt()
    return Factor(1.0, root[:, None] * right, core.U_OP @ (left * root))
