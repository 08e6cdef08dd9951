"""Fold modules into the base weights, in place and reversibly: see ``placement``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pem_composition.adapters.layer import is_conv1d
from pem_composition.adapters.locate import (
    check_model,
    linear_layers,
    names_of,
    plain_tensors,
    renaming,
)
from pem_composition.adapters.placement import Placement, apart, changed, placed_on
from pem_composition.adapters.plan import (
    check_base,
    check_layers,
    check_weights,
    head_of,
    stacks_of,
)
from pem_composition.arithmetic.operand import check_module
from pem_composition.checkpoint.changes import Change, changes_of, with_saved
from pem_composition.config import IN_BASE, expert_of, whole_layers
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM


class Folded(AbstractContextManager["Folded"]):
    """A module inside the base weights; a context manager that takes it out again.

    ``swap(pem)`` puts another module in its place, ``restore()`` takes it out.
    """

    def __init__(self, model: nn.Module, pem: PEM, *, head: str = "load") -> None:
        self.model, self.pem, self._head = model, pem, head
        self.placement = Placement(model, changes_with_head(model, pem, head))

    def swap(self, pem: PEM) -> Folded:
        """Replace the folded module by another one, recomputed from the base's own weights."""
        self.placement.replace(changes_with_head(self.model, pem, self._head))
        self.pem = pem
        return self

    def restore(self) -> None:
        """Take the module out: weights and head are again those from before, bit for bit."""
        self.placement.remove()

    def __exit__(self, *exc: object) -> None:
        self.restore()


def fold(
    model: nn.Module,
    pem: PEM,
    *,
    permanent: bool = False,
    head: str = "load",
    allow_base_mismatch: bool = False,
) -> Folded | None:
    """Add a module to the base weights, in place: W += scaling B A, W *= l, theta += delta.

    What becomes of each weight is said in ``checkpoint.changes``, for models in memory and in
    files. Several modules can be folded one after another; each can be swapped or restored on its
    own; of several heads the last one counts.

    Args:
        permanent: keep no originals and return None; otherwise a ``Folded`` that can undo it.
        head: "load" copies the module's head into the model, "ignore" leaves the model's.
        allow_base_mismatch: take a module that records another base than the model was loaded from.

    Raises:
        IncompatibleModules: a layer, shape or head of the module, or its base, is another.
    """
    check_model(model)
    check_module("module", pem)
    if not allow_base_mismatch:
        check_weights(model, pem)
    if not permanent:
        return Folded(model, pem, head=head)
    changes = changes_with_head(model, pem, head)
    placed, live = placed_on(model), plain_tensors(model)
    if any(live[name] in placed.originals for name in changes):
        raise PEMError.build(
            "fold", "other modules are folded reversibly into this model", do="restore them first"
        )
    groups = apart(model, changes, placed.own)
    placed.untie(model, groups)
    for name in (n for group in groups for n in group):
        del placed.own[name]  # for good
    live = plain_tensors(model)
    with torch.no_grad():
        for parameter, change in {live[n]: change for n, change in changes.items()}.items():
            parameter.copy_(changed(parameter, change))
    return None


def check_fold(model: nn.Module, pem: PEM) -> None:
    """What ``fold`` refuses, without changing the model.

    Raises:
        IncompatibleModules: see ``fold``.
    """
    changes_with_head(model, pem, "load")


def changes_with_head(model: nn.Module, pem: PEM, head: str) -> dict[str, Change]:
    """What the module makes of each parameter, the parts that it saves whole included."""
    return saved_on(model, pem, live_changes(model, pem), head_of(model, pem, head))


def saved_on(
    model: nn.Module, pem: PEM, changes: Mapping[str, Change], head: Mapping[str, Tensor]
) -> dict[str, Change]:
    """Changes of layers on top of the parts that the module saves whole."""
    live, users = plain_tensors(model), names_of(model)
    in_base = pem.config.extra.get(IN_BASE) or ()
    return with_saved(changes, head, in_base, lambda name: users[live[name]])


def live_changes(model: nn.Module, pem: PEM) -> dict[str, Change]:
    """Parameter of the model -> what the module makes of it; everything is checked first."""
    check_base(model, pem)
    return _full_changes(model, pem) if pem.kind == "full" else _layer_changes(model, pem)


def _layer_changes(model: nn.Module, pem: PEM) -> dict[str, Change]:
    names = check_layers(model, pem)
    layers, live = linear_layers(model), plain_tensors(model)
    stacks = stacks_of(model, pem, names)
    for name in whole_layers(names.values()):
        _refuse_quantised(f"layer {name}", layers[name].weight)
        if f"{name}.weight" not in live:
            raise IncompatibleModules.build(
                f"layer {name}",
                "computes its weight, which folding could not change",
                found="a parametrised layer",
                expected="a weight that is a parameter",
                do="attach the module instead of folding it",
            )

    def transposed(name: str) -> bool:
        return stacks.transposed(name) if expert_of(name) else is_conv1d(layers[name])

    return changes_of(pem, names, transposed, live)


def _refuse_quantised(where: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise IncompatibleModules.build(
            where,
            "is quantised, and a module cannot be folded into it",
            found=weight.dtype,
            expected="floating point weights",
            do="attach the module instead, or load the base without quantisation",
        )


def _full_changes(model: nn.Module, pem: PEM) -> dict[str, Change]:
    """A tied parameter changes under all its names, where the module has one of them only."""
    deltas = pem.adapter_tensors()
    live = plain_tensors(model)
    names = renaming(model, [n.removesuffix(".delta") for n in deltas], live, "parameter")
    changes: dict[str, Change] = {}
    first: dict[Tensor, Change] = {}
    for name, target in names.items():
        delta, parameter = deltas[f"{name}.delta"], live[target]
        _refuse_quantised(f"parameter {target}", parameter)
        if delta.shape != parameter.shape:
            _raise_shape(target, delta, parameter)
        changes[target] = Change(delta=delta)
        first.setdefault(parameter, changes[target])
    return {n: changes.get(n, first[t]) for n, t in live.items() if t in first}


def _raise_shape(name: str, found: Tensor, expected: Tensor) -> None:
    raise IncompatibleModules.build(
        f"parameter {name}",
        "shapes differ",
        found=f"{tuple(found.shape)} in the module",
        expected=f"{tuple(expected.shape)} in the model",
        do="use the base model the module was trained on",
    )
