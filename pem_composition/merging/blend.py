"""A model that computes with sum_i c_i dW_i, where the c_i are a tensor that gradients reach.

Delta space, one coefficient per module and layer (or one per module):

    LoRA      y = W x + b + sum_i c_i s_i B_i A_i x
    (IA)^3    y = (1 + sum_i c_i (l_i - 1)) * (W x + b),  or the factor on x

The layers are those of the plain model, changed by hooks; nothing is folded, so moving the
coefficients costs nothing and a backward pass ends at them.

Shape suffixes: T modules, L layers (or 1), K sum of ranks, I inputs, O outputs, D scaled side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pem_composition.adapters.inject import attached
from pem_composition.adapters.plan import check_base, check_layers, refuse_experts
from pem_composition.arithmetic.compatible import check_linear
from pem_composition.config import IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM


class Blend(AbstractContextManager["Blend"]):
    """The modules in a model, weighted by ``coefficients``; a context manager that takes them out.

    Attributes:
        layers: names of the layers, as the modules call them; the columns of ``coefficients``.
        coefficients: (T, L) or (T, 1), set by the caller at any time before a forward pass.

    Raises:
        IncompatibleModules: a layer or shape does not fit the model.
        PEMError: whole models, which have no layers to weigh, or a model that holds modules.
    """

    def __init__(self, model: nn.Module, modules: Sequence[PEM]) -> None:
        _check(model, modules)
        self.model = model
        self.layers = tuple(sorted({layer for m in modules for layer in m.layers}))
        self.coefficients = torch.ones(len(modules), 1)
        self._flags = {p: p.requires_grad for p in model.parameters()}
        self._handles: list[Any] = []
        for m in modules:
            check_linear(m)
            refuse_experts(m, "coefficients are not learned over experts of a stack")
        names = [check_layers(model, m) for m in modules]
        for place, layer in enumerate(self.layers):
            holders = [t for t, m in enumerate(modules) if layer in names[t]]
            target = model.get_submodule(names[holders[0]][layer])
            terms = [modules[t] for t in holders]
            self._handles.append(_hook(target, layer, terms, self._reader(holders, place)))
        model.requires_grad_(requires_grad=False)

    def _reader(self, holders: Sequence[int], place: int) -> Callable[[], Tensor]:
        """Gives the layer's coefficients of the modules that have it."""

        def read() -> Tensor:
            column = place if self.coefficients.shape[1] > 1 else 0
            return self.coefficients[list(holders), column]

        return read

    def close(self) -> None:
        """Take the modules out; ``requires_grad`` is as before."""
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._handles, self._flags = [], {}

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check(model: nn.Module, modules: Sequence[PEM]) -> None:
    if attached(model):
        raise PEMError.build(
            "model", "holds modules", found=", ".join(attached(model)), do="detach them first"
        )
    for module in modules:
        check_base(model, module)
        if module.kind == "full":
            raise PEMError.build(
                module.name, "coefficients are learned over LoRA and (IA)^3 modules",
                found="a whole model", do="use pem search",
            )  # fmt: skip


def _hook(target: nn.Module, layer: str, modules: Sequence[PEM], read: Callable[[], Tensor]) -> Any:
    config = modules[0].config
    if isinstance(config, LoraConfig):
        return target.register_forward_hook(_low_rank(target, layer, modules, read))
    assert isinstance(config, IA3Config)
    sides = {m.config.scales_input(layer) for m in modules if isinstance(m.config, IA3Config)}
    if len(sides) > 1:
        raise IncompatibleModules.build(
            f"layer {layer}", "(IA)^3 placements differ", found="inputs and outputs scaled",
            expected="one placement", do="train all with one placement",
        )  # fmt: skip
    weight = next(target.parameters())
    change_TD = torch.stack([m.tensors[f"{layer}.ia3"].to(weight) - 1.0 for m in modules])

    def factor() -> Tensor:
        return 1.0 + read().to(weight) @ change_TD

    if sides.pop():
        return target.register_forward_pre_hook(lambda _m, args: (args[0] * factor(), *args[1:]))
    return target.register_forward_hook(lambda _m, _args, y: y * factor())


def _low_rank(
    target: nn.Module, layer: str, modules: Sequence[PEM], read: Callable[[], Tensor]
) -> Callable[..., Tensor]:
    weight = next(target.parameters())
    A = [m.tensors[f"{layer}.lora_A"] for m in modules]
    B = [
        m.tensors[f"{layer}.lora_B"] * m.config.scaling(layer)
        for m in modules
        if isinstance(m.config, LoraConfig)
    ]
    A_KI, B_OK = torch.cat(A).to(weight), torch.cat(B, dim=1).to(weight)
    ranks = torch.tensor([len(a) for a in A])

    def hook(_module: nn.Module, arguments: tuple[Any, ...], y: Tensor) -> Tensor:
        c_K = read().to(weight).repeat_interleave(ranks.to(weight.device))
        return y + F.linear(F.linear(arguments[0], A_KI) * c_K, B_OK)

    return hook
