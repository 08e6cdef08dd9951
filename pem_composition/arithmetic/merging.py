"""What a merging method gives for modules, and the sums that other programs compute of them.

``method_sums`` computes the methods' own; both are of the modules' tensors by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pem_composition.arithmetic.algebra import role_of, weighted_sum
from pem_composition.arithmetic.methods.parity import peft_linear
from pem_composition.arithmetic.methods.registry import PEFT_LINEAR, REFERENCE_DETOXIFY, Choice
from pem_composition.arithmetic.updates import (
    cast,
    check_shapes,
    factor_config,
    union_config,
)
from pem_composition.config import AdapterConfig, LoraConfig
from pem_composition.errors import PEMError

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.operand import Operand
    from pem_composition.arithmetic.terms import LayerError

Judge = Callable[[Mapping[str, "Tensor"]], "LayerError"]  # rounded tensors -> error of the layer


@dataclass(frozen=True)
class Written:
    """What a method writes: each layer is rounded and judged before the next is computed.

    So no layer's own result in float64 is kept.

    Attributes:
        dtype: of what is written, see ``updates.cast``.
        certify: whether layers are judged.
        errors: of each layer, rounded, against the method's own result.
    """

    dtype: str | None
    certify: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, LayerError] = field(default_factory=dict)

    def take(self, layer: str, tensors: Mapping[str, Tensor], judge: Judge) -> None:
        """Round, keep and judge a layer's tensors."""
        rounded = cast(tensors, self.dtype)
        self.tensors.update(rounded)
        if self.certify:
            self.errors[layer] = judge(rounded)


def split(coefficients: Sequence[float], choice: Choice) -> tuple[Sequence[float], Sequence[float]]:
    """What scales the updates, and the modules' shares of the result."""
    if not choice.entry.shares:
        return coefficients, ()
    total = sum(coefficients)
    return [1.0] * len(coefficients), [c / total for c in coefficients]


class OtherSum(NamedTuple):
    """What another program writes, and the coefficients it thereby means for the updates."""

    tensors: dict[str, Tensor]
    config: AdapterConfig
    coefficients: list[float]


def merge_as(modules: Sequence[Operand], coefficients: Sequence[float], choice: Choice) -> OtherSum:
    """The sum of another program, ``parity``.

    Raises:
        PEMError: ranks differ, or a module that the program gets wrong by more than its rule.
    """
    if choice.method == REFERENCE_DETOXIFY:
        weigh = choice.entry.function()
        held = [m.adapter_tensors() for m in modules]
        tensors = {
            n: weighted_sum([t[n] for t in held], weigh(role_of(n), coefficients)) for n in held[0]
        }
        return OtherSum(tensors, modules[0].config, list(coefficients))
    if choice.method != PEFT_LINEAR:
        weights = list(choice.entry.function()(coefficients, **choice.as_dict()))
        held = [m.adapter_tensors() for m in modules]
        tensors = {n: weighted_sum([t[n] for t in held], weights) for n in held[0]}
        return OtherSum(tensors, modules[0].config, weights)
    _check_peft(modules)
    tensors = {}
    for name in sorted({n for m in modules for n in m.adapter_names}):
        layer, _, role = name.rpartition(".")
        parts = [
            (m.tensors[name], peft_linear(role, c, _scaling(m, layer)))
            for m, c in zip(modules, coefficients, strict=True)
            if name in m.tensors
        ]
        check_shapes([t for t, _ in parts])
        tensors[name] = weighted_sum([t for t, _ in parts], [w for _, w in parts])
    layers = sorted({layer for m in modules for layer in m.layers})
    lora = modules[0].kind == "lora"
    config = factor_config(modules, tensors, layers, 1.0) if lora else union_config(modules)
    return OtherSum(tensors, config, list(coefficients))


def _scaling(module: Operand, layer: str) -> float:
    return module.config.scaling(layer) if isinstance(module.config, LoraConfig) else 1.0


def _check_peft(modules: Sequence[Operand]) -> None:
    for m in modules:
        if isinstance(m.config, LoraConfig) and m.config.use_rslora:
            raise PEMError.build(
                m.name, "PEFT keeps use_rslora in what it merges, which inflates it by sqrt(r)",
                found="use_rslora", do="merge without --as (--space delta is exact)",
            )  # fmt: skip
