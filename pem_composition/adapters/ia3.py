"""(IA)^3: a learned vector scales what enters or leaves a linear layer.

Shape suffixes: I d_in, O d_out, D the scaled side (O, or I where the input is scaled).
"""

from __future__ import annotations

from functools import reduce
from operator import mul

import torch
from torch import Tensor, nn

from pem_composition.adapters.layer import AdapterLayer


class IA3Vector(nn.Module):
    """One module's vector on a layer: 1 + multiplier * (l - 1).

    Args:
        ia3: (D,).
        scales_input: True to scale the layer's input, False to scale its output.
        mask: (D,) of bool or None; entries outside it count as one and get no gradient (the query
            part of a fused projection).
    """

    def __init__(
        self, ia3: Tensor, *, scales_input: bool = False, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self.ia3 = nn.Parameter(ia3)
        self.scales_input = scales_input
        self.multiplier = 1.0
        self.active = True
        self.register_buffer("mask", mask, persistent=False)

    def effective(self) -> dict[str, Tensor]:
        """Role -> tensor as the forward pass uses it (multiplier apart)."""
        if self.mask is None:
            return {"ia3": self.ia3}
        return {"ia3": torch.where(self.mask, self.ia3, torch.ones_like(self.ia3))}

    def forward(self) -> Tensor:
        """The factor to multiply with, (D,)."""
        l_D = self.effective()["ia3"]
        return l_D if self.multiplier == 1.0 else 1.0 + self.multiplier * (l_D - 1.0)


class IA3Linear(AdapterLayer):
    """Frozen linear layer whose output or input is scaled by the product of its active vectors.

    y = l * (W x + b)   or   y = W (l * x) + b,   x (..., I) -> y (..., O)

    Several modules multiply; each may scale either side. With l = 1 the output is the base
    layer's, bit for bit. Source: Liu et al. 2022, section 3.3 (arXiv:2205.05638).
    """

    def forward(self, x: Tensor) -> Tensor:
        l_I, l_O = self._scale(inputs=True), self._scale(inputs=False)
        if l_I is not None:
            x = (x * l_I).to(x.dtype)
        y = self.base(x)
        return y if l_O is None else (y * l_O).to(y.dtype)

    def _scale(self, *, inputs: bool) -> Tensor | None:
        vectors = [a() for a in self.adapters.values() if a.active and a.scales_input == inputs]
        return reduce(mul, vectors) if vectors else None
