"""What delta space computes with: low-rank terms, errors of layers. No torch.

Shape suffixes: I inputs, O outputs, R rank of one term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Factor(NamedTuple):
    """One low-rank term: weight * B A.

    Examples:
        >>> import torch
        >>> term = Factor(0.5, torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
        >>> (term.weight * term.B_OR @ term.A_RI).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    weight: float
    A_RI: Tensor
    B_OR: Tensor


class LayerError(NamedTuple):
    """Absolute error of one layer and the norms it is judged by, all Frobenius.

    Examples:
        >>> LayerError(error=0.5, norm=2.0, terms=3.0).relative
        0.25
    """

    error: float  # ||written - expression||
    norm: float  # ||expression||
    terms: float  # sum of the norms of the expression's terms

    @property
    def relative(self) -> float:
        """error / ||expression||; where that cancels to zero, error / sum of the terms' norms."""
        reference = self.terms if self.norm <= 1e-12 * self.terms else self.norm
        return self.error / reference if reference else 0.0
