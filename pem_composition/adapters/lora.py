"""Low-rank adaptation of a linear layer.

Shape suffixes: N rows (batch x tokens), I d_in, O d_out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pem_composition.adapters.layer import AdapterLayer
from pem_composition.config import expert_of


class LoraFactors(nn.Module):
    """One module's share of a layer: adds multiplier * scaling * B A dropout(x).

    Args:
        lora_A: (R, I).
        lora_B: (O, R).
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout: probability, applied to the input of A only.
        mask: (O, R) of zeros and ones or None; entries of B outside it count as zero and get no
            gradient (the query and value blocks of a fused projection).
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        *,
        dropout: float = 0.0,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.multiplier = 1.0
        self.active = True
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", mask, persistent=False)

    def effective(self) -> dict[str, Tensor]:
        """Role -> tensor as the forward pass uses it."""
        return {"lora_A": self.lora_A, "lora_B": self._B()}

    def _B(self) -> Tensor:
        return self.lora_B if self.mask is None else self.lora_B * self.mask

    def forward(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """y + scaling * B A dropout(x), computed in the dtype of the factors."""
        dtype = self.lora_A.dtype
        down_NR = F.linear(self.dropout(x_NI.to(dtype)), self.lora_A)
        return torch.addmm(
            y_NO.to(dtype), down_NR, self._B().t(), alpha=self.multiplier * self.scaling
        )


class LoraExperts(AdapterLayer):
    """A module that holds stacks of experts (E, ., .), computing with updates of their matrices.

    W_e + sum_m multiplier_m * scaling_m * B_m A_m in the place of every W_e, for one forward pass;
    a stack that holds W^T gets the transposed updates. An adapter's name ends in the parameter and
    the expert, ``default:down_proj[3]``.

    Args:
        transposed: of every stack that is adapted.
    """

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base = base
        self.transposed: dict[str, bool] = {}
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The base's own forward pass on the changed stacks."""
        updates: dict[str, dict[int, list[LoraFactors]]] = {}
        for name, adapter in self.adapters.items():
            expert = expert_of(name.rpartition(":")[2])
            if adapter.active and expert is not None:
                updates.setdefault(expert[0], {}).setdefault(expert[1], []).append(adapter)
        changed = {name: self._changed(name, own) for name, own in updates.items()}
        return torch.func.functional_call(self.base, changed, arguments, named)

    def _changed(self, name: str, adapters: dict[int, list[LoraFactors]]) -> Tensor:
        stack: Tensor = getattr(self.base, name)
        rows = []
        for i, W in enumerate(stack):
            for adapter in adapters.get(i, ()):
                dW = adapter.multiplier * adapter.scaling * (adapter.lora_B @ adapter.lora_A)
                W = W.to(dW.dtype) + (dW.mT if self.transposed[name] else dW)
            rows.append(W.to(stack.dtype))
        return torch.stack(rows)


class LoraLinear(AdapterLayer):
    """Frozen linear layer plus the sum of its active low-rank updates.

    y = W x + b + sum_m multiplier_m * scaling_m * B_m A_m dropout(x),   x (..., I) -> y (..., O)

    A float32 adapter on a bfloat16 base works: x and y are cast to the adapter's dtype and the
    result back. With B = 0 the output is the base layer's, bit for bit (fl(y + s * 0) = y).
    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685); scaling alpha / sqrt(r): Kalajdzievski
    2023 (arXiv:2312.03732).
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        active = [a for a in self.adapters.values() if a.active]
        if not active:
            return y
        x_NI, y_NO = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        for adapter in active:
            y_NO = adapter(x_NI, y_NO)
        return y_NO.to(y.dtype).reshape(y.shape)
