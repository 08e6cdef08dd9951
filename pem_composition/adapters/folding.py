"""Fold modules into the base weights, in place and reversibly.

The original of each changed parameter is kept; every change of the folded modules recomputes the
parameter from it, so swapping numbers a thousand times does not drift and ``restore`` gives the
base back bit for bit.

Shape suffixes: I d_in, O d_out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from pem_composition.adapters.heads import HeadSlot
from pem_composition.adapters.layer import is_conv1d
from pem_composition.adapters.locate import linear_layers, plain_tensors, renaming
from pem_composition.adapters.plan import check_base, check_layers, check_weights, head_of
from pem_composition.config import IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM

Update = Callable[[Tensor], Tensor]
Updates = dict[Tensor, Update]  # live parameter -> what the module makes of its (float32) value


class FoldStack:
    """Originals of a model's changed parameters, and the modules folded into them, in order."""

    def __init__(self) -> None:
        self.originals: dict[Tensor, Tensor] = {}
        self.entries: list[Updates] = []

    def replace(self, old: Updates | None, new: Updates | None) -> None:
        """Put ``new`` where ``old`` was (None: nothing there) and recompute what changes."""
        for parameter in new or {}:
            self.originals.setdefault(parameter, parameter.detach().clone())
        position = next((i for i, e in enumerate(self.entries) if e is old), len(self.entries))
        self.entries[position : position + 1] = [] if new is None else [new]
        for parameter in {**(old or {}), **(new or {})}:
            self._recompute(parameter)

    @torch.no_grad()
    def _recompute(self, parameter: Tensor) -> None:
        updates = [e[parameter] for e in self.entries if parameter in e]
        if updates:
            parameter.copy_(_apply(self.originals[parameter], updates))
        else:
            parameter.copy_(self.originals.pop(parameter))


def _apply(original: Tensor, updates: list[Update]) -> Tensor:
    """The updated value in the original's dtype; accumulated in float32 (float64 stays float64)."""
    value = original if original.dtype == torch.float64 else original.float()
    for update in updates:
        value = update(value)
    return value.to(original.dtype)


class Folded:
    """A module inside the base weights; a context manager that takes it out again.

    ``swap(pem)`` puts another module in its place, ``restore()`` takes it out.
    """

    def __init__(self, model: nn.Module, pem: PEM, *, head: str = "load", stack: FoldStack) -> None:
        self.model, self.pem, self._head, self._stack = model, pem, head, stack
        self._updates: Updates | None = None
        self._slot: HeadSlot | None = None
        self.swap(pem)

    def swap(self, pem: PEM) -> Folded:
        """Replace the folded module by another one, recomputed from the base's own weights."""
        updates = updates_of(self.model, pem)
        tensors = head_of(self.model, pem, self._head)
        if self._slot is not None:
            self._slot.restore()
        self._stack.replace(self._updates, updates)
        self._slot = HeadSlot(self.model, tensors) if tensors else None
        self._updates, self.pem = updates, pem
        return self

    def restore(self) -> None:
        """Take the module out: weights and head are again those from before, bit for bit."""
        if self._updates is None:
            return
        if self._slot is not None:
            self._slot.restore()
        self._stack.replace(self._updates, None)
        self._updates = self._slot = None

    def __enter__(self) -> Folded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

    Output scaling multiplies the rows of W and the bias, input scaling the columns. Several
    modules can be folded one after another; each can be swapped or restored on its own.

    Args:
        permanent: keep no originals and return None; otherwise a ``Folded`` that can undo it.
        head: "load" copies the module's head into the model, "ignore" leaves the model's.
        allow_base_mismatch: take a module that records another base than the model was loaded from.

    Raises:
        IncompatibleModules: a layer, shape or head of the module, or its base, is another.
    """
    if not allow_base_mismatch:
        check_weights(model, pem)
    stack: FoldStack = model.__dict__.setdefault("_pem_folds", FoldStack())
    if not permanent:
        return Folded(model, pem, head=head, stack=stack)
    updates, tensors = updates_of(model, pem), head_of(model, pem, head)
    if stack.entries:
        raise PEMError.build(
            "fold", "other modules are folded reversibly into this model", do="restore them first"
        )
    with torch.no_grad():
        for parameter, update in updates.items():
            parameter.copy_(_apply(parameter, [update]))
    if tensors:
        HeadSlot(model, tensors)
    return None


def check_fold(model: nn.Module, pem: PEM, *, head: str = "load") -> None:
    """What ``fold`` refuses, without changing the model.

    Raises:
        IncompatibleModules: see ``fold``.
    """
    updates_of(model, pem)
    head_of(model, pem, head)


def updates_of(model: nn.Module, pem: PEM) -> Updates:
    """What the module does to each live parameter of the model; everything is checked first."""
    check_base(model, pem)
    return _full_updates(model, pem) if pem.kind == "full" else _layer_updates(model, pem)


def _layer_updates(model: nn.Module, pem: PEM) -> Updates:
    names = check_layers(model, pem)
    layers, users = linear_layers(model), _users(model)
    updates: Updates = {}
    for name, live in names.items():
        layer = layers[live]
        _refuse_quantised(f"layer {live}", layer.weight)
        _refuse_shared(f"layer {live}", users.get(layer.weight, []))
        if isinstance(pem.config, LoraConfig):
            A, B = pem.tensors[f"{name}.lora_A"], pem.tensors[f"{name}.lora_B"]
            updates[layer.weight] = _add_product(A, B, pem.config.scaling(name), is_conv1d(layer))
            continue
        assert isinstance(pem.config, IA3Config)
        l_D, scales_input = pem.tensors[f"{name}.ia3"], pem.config.scales_input(name)
        updates[layer.weight] = _scale(l_D, rows=scales_input == is_conv1d(layer))
        if not scales_input and layer.bias is not None:
            updates[layer.bias] = _scale(l_D, rows=False)
    return updates


def _refuse_quantised(where: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise IncompatibleModules.build(
            where,
            "is quantised, and a module cannot be folded into it",
            found=weight.dtype,
            expected="floating point weights",
            do="attach the module instead, or load the base without quantisation",
        )


def _users(model: nn.Module) -> dict[Tensor, list[str]]:
    """Names under which each tensor of the model stands."""
    users: dict[Tensor, list[str]] = {}
    for name, tensor in plain_tensors(model).items():
        users.setdefault(tensor, []).append(name)
    return users


def _refuse_shared(where: str, users: Sequence[str]) -> None:
    if not users:
        raise IncompatibleModules.build(
            where,
            "computes its weight, which folding could not change",
            found="a parametrised layer",
            expected="a weight that is a parameter",
            do="attach the module instead of folding it",
        )
    if len(users) > 1:
        raise IncompatibleModules.build(
            where,
            "shares its weight, which folding would change everywhere",
            found=" = ".join(users),
            do="attach the module instead of folding it",
        )


def _add_product(A_RI: Tensor, B_OR: Tensor, scaling: float, transposed: bool) -> Update:
    def update(weight: Tensor) -> Tensor:
        change = scaling * (B_OR.to(weight) @ A_RI.to(weight))
        return weight + (change.T if transposed else change)

    return update


def _scale(l_D: Tensor, *, rows: bool) -> Update:
    return lambda value: value * (l_D.to(value)[:, None] if rows else l_D.to(value))


def _full_updates(model: nn.Module, pem: PEM) -> Updates:
    deltas = pem.adapter_tensors()
    live = plain_tensors(model)
    names = renaming(model, [n.removesuffix(".delta") for n in deltas], live, "parameter")
    seen: dict[Tensor, str] = {}
    for name, target in names.items():
        delta, parameter = deltas[f"{name}.delta"], live[target]
        _refuse_quantised(f"parameter {target}", parameter)
        if delta.shape != parameter.shape:
            _raise_shape(target, delta, parameter)
        first = seen.setdefault(parameter, name)
        if not torch.equal(deltas[f"{first}.delta"], delta):
            raise IncompatibleModules.build(
                f"parameter {target}",
                f"is tied to {names[first]}, but their deltas differ",
                do="load the base model with untied weights",
            )
    return {p: _add(deltas[f"{name}.delta"]) for p, name in seen.items()}


def _add(delta: Tensor) -> Update:
    return lambda value: value + delta.to(value)


def _raise_shape(name: str, found: Tensor, expected: Tensor) -> None:
    raise IncompatibleModules.build(
        f"parameter {name}",
        "shapes differ",
        found=f"{tuple(found.shape)} in the module",
        expected=f"{tuple(expected.shape)} in the model",
        do="use the base model the module was trained on",
    )
