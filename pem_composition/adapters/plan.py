"""Checks before anything in a model is touched: does this module fit this model?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pem_composition.adapters.heads import check_head, head_parameter_names
from pem_composition.adapters.layer import features, is_linear
from pem_composition.adapters.locate import (
    expert_layers,
    linear_layers,
    plain_modules,
    plain_tensors,
    renaming,
)
from pem_composition.checkpoint import base_identity
from pem_composition.checkpoint.changes import ExpertStacks, check_fits
from pem_composition.config import IA3Config, LoraConfig, expert_of, targets_of
from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.module import PEM

HEAD_CHOICES = ("load", "ignore")


def check_base(model: nn.Module, pem: PEM) -> None:
    """Raise IncompatibleModules where the module says it belongs to another architecture."""
    own = getattr(getattr(model, "config", None), "model_type", None)
    if pem.base.model_type is not None and own is not None and pem.base.model_type != own:
        raise IncompatibleModules.build(
            f"module {pem.name}",
            "belongs to another architecture",
            found=f"{pem.base.model_type} module",
            expected=own,
            do="load the base model that the module was trained on",
        )


def check_weights(model: nn.Module, pem: PEM) -> None:
    """Raise IncompatibleModules where module and model were made from other base weights.

    The fingerprint of the model's checkpoint, where it is at hand, against the recorded one.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name or pem.base.fingerprint is None:
        return
    own = base_identity(name).fingerprint
    if own is not None and own != pem.base.fingerprint:
        raise IncompatibleModules.build(
            f"module {pem.name}",
            "belongs to another base model",
            found=f"{pem.base.name} ({pem.base.fingerprint[:12]})",
            expected=f"{name} ({own[:12]})",
            do="load its own base, or pass allow_base_mismatch=True",
        )


def check_layers(model: nn.Module, pem: PEM) -> dict[str, str]:
    """Module's layer name -> model's, after checking that every layer is there and fits.

    Raises:
        IncompatibleModules: a layer is missing, not linear, of another shape, or never called.
    """
    modules, parameters = plain_modules(model), plain_tensors(model)
    known = modules.keys() | expert_layers(model) if any(map(expert_of, pem.layers)) else modules
    names = renaming(model, pem.layers, known, "layer")
    stacks_of(model, pem, names)
    for name, live in names.items():
        if expert_of(live):
            continue
        layer = modules[live]
        if not is_linear(layer):
            raise IncompatibleModules.build(
                f"layer {live}",
                "cannot be adapted",
                found=type(layer).__name__,
                expected="nn.Linear or Conv1D",
            )
        check_fits(pem, name, live, features(layer), parameters)
    _check_complete(model, pem, set(names.values()))
    return names


def refuse_experts(pem: PEM, what: str) -> None:
    """Refuse experts of a stack where every layer must be a module with an input of its own.

    Raises:
        IncompatibleModules: naming one.
    """
    experts = [n for n in pem.layers if expert_of(n)]
    if experts:
        raise IncompatibleModules.build(
            f"module {pem.name}", what, found=f"an update of {experts[0]}",
            expected="updates of linear layers alone", do="use a method that needs no data",
        )  # fmt: skip


def stacks_of(model: nn.Module, pem: PEM, names: Mapping[str, str]) -> ExpertStacks:
    """The model's stacks of experts that the module adapts, checked.

    Raises:
        IncompatibleModules: a stack of another shape, or in no floating point dtype.
    """
    stacks = sorted({expert[0] for n in names.values() if (expert := expert_of(n))})
    live = plain_tensors(model) if stacks else {}
    modules = plain_modules(model) if stacks else {}
    for name in stacks:
        if not live[name].is_floating_point():
            raise IncompatibleModules.build(
                f"parameter {name}", "is quantised, and cannot be adapted", found=live[name].dtype,
                expected="floating point weights", do="load the base without quantisation",
            )  # fmt: skip
    shapes = {n: tuple(live[n].shape) for n in stacks}
    return ExpertStacks(
        pem, names, shapes, lambda holder: bool(getattr(modules[holder], "is_transposed", False))
    )


def _check_complete(model: nn.Module, pem: PEM, adapted: set[str]) -> None:
    """Every layer that the targets name has tensors: a module that lost some acts in part only."""
    assert isinstance(pem.config, LoraConfig | IA3Config)
    # A layer's whole name is its alone, though another's ends so.
    targets = frozenset(pem.config.target_modules) - frozenset(pem.layers)
    heads = {*head_parameter_names(model), *pem.head_names}
    skip = {name.rpartition(".")[0] for name in heads} | adapted
    for name in linear_layers(model):
        if name not in skip and targets_of(name, targets):
            raise IncompatibleModules.build(
                f"module {pem.name}",
                f"no tensors for layer {name}, which its target_modules name",
                found=f"{len(adapted)} layers",
                expected=f"every layer named {', '.join(sorted(targets))}",
                do="restore its file, or name the layers in full in target_modules",
            )


def head_of(model: nn.Module, pem: PEM, choice: str) -> dict[str, Tensor]:
    """Head tensors to load ({} with ``ignore``), checked against the model."""
    if choice not in HEAD_CHOICES:
        raise UsageError.build(
            "head", "unknown choice", found=repr(choice), expected=" or ".join(HEAD_CHOICES)
        )
    head = pem.head_tensors() if choice == "load" else {}
    check_head(model, head)
    return head
