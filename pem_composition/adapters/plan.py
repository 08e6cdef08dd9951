"""Checks before anything in a model is touched: does this module fit this model?"""

from __future__ import annotations

from torch import Tensor, nn

from pem_composition.adapters.heads import check_head, head_parameter_names
from pem_composition.adapters.layer import features, is_linear
from pem_composition.adapters.locate import (
    linear_layers,
    plain_modules,
    plain_tensors,
    renaming,
)
from pem_composition.checkpoint import base_identity
from pem_composition.checkpoint.changes import check_fits
from pem_composition.config import IA3Config, LoraConfig, targets_of
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
    names = renaming(model, pem.layers, modules, "layer")
    for name, live in names.items():
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


def _check_complete(model: nn.Module, pem: PEM, adapted: set[str]) -> None:
    """Every layer that the targets name has tensors: a module that lost some acts in part only."""
    assert isinstance(pem.config, LoraConfig | IA3Config)
    targets = frozenset(pem.config.target_modules)
    heads = {*head_parameter_names(model), *pem.head_tensors()}
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
