"""Attach modules to a live model, train them, take them out, and take them off again.

A model can hold several modules under different names; their LoRA updates add, their (IA)^3
vectors multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pem_composition.adapters.attachment import Attachment, Options, holdings_of, set_trainable
from pem_composition.adapters.fresh import Blocks, base_of, fresh_module, head_copy
from pem_composition.adapters.heads import head_info, head_parameter_names
from pem_composition.adapters.plan import check_weights
from pem_composition.arithmetic.operand import check_module
from pem_composition.config import AdapterConfig, BaseIdentity, Factor, FullConfig
from pem_composition.errors import PEMError
from pem_composition.module import PEM


def attach(
    model: nn.Module,
    pem: PEM,
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    head: str = "load",
    blocks: Blocks | None = None,
    frozen: Factor | None = None,
    allow_base_mismatch: bool = False,
) -> Attachment:
    """Make the model compute with the module; the base weights stay as they are.

    LoRA adds scaling B A x to its layers, (IA)^3 multiplies with l, a full module adds its delta to
    the weights (reversibly). Names of a module trained on another head class of the same base fit:
    the base model's prefix is added or stripped.

    Args:
        dtype: of the adapter's parameters; default float32 on any base up to float32.
        trainable: freeze the base and train adapter and head from here.
        head: "load" the module's head into the model's parameters, or "ignore" it.
        blocks: fused layer -> parts to train, as given to ``attach_fresh``.
        frozen: the LoRA factor, lora_A or lora_B, that training leaves as it is. Modules of one
            initial A that stay at it have sum_t w_t B_t A = (sum_t w_t B_t) A: with weights that
            sum to one, the sum of tensors is the sum of updates (FFA-LoRA, arXiv 2403.12313).
        allow_base_mismatch: take a module that records another base than the model was loaded from.

    Raises:
        IncompatibleModules: a layer, shape, head or the base does not fit, or nothing would be
            trained beside the frozen factor; the model is untouched.
        PEMError: the name is taken, or a factor is frozen of a module that is not trained.
    """
    _check_name(model, name)
    check_module("module", pem)
    if not allow_base_mismatch:
        check_weights(model, pem)
    attachment = Attachment(model, pem, name, Options(dtype, trainable, head, blocks or {}, frozen))
    attachment.holdings.attachments[name] = attachment
    set_trainable(attachment)
    return attachment


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name:
        raise PEMError.build(
            "attachment name", "cannot be used", found=repr(name), expected="a name without dots"
        )
    if name in holdings_of(model).attachments:
        raise PEMError.build(
            f"attachment {name!r}",
            "the model already holds one of that name",
            do="detach it, swap its numbers, or choose another name",
        )


def attach_fresh(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str = "default",
    seed: int | None = None,
    blocks: Blocks | None = None,
    head_names: Sequence[str] | None = None,
    base: BaseIdentity | None = None,
    dtype: torch.dtype | None = None,
) -> Attachment:
    """Attach a new trainable module that does not change the model yet; freeze the base.

    LoRA: A ~ kaiming_uniform(a = sqrt 5), B = 0. (IA)^3: l = 1. Full: every parameter is trained
    and the module is theta - theta_0. The head's parameters are trained whole beside it.

    Args:
        seed: of A; None draws from torch's global generator.
        blocks: fused layer -> parts trained on their own, from ``resolve_targets``; ``config.r`` is
            then the rank of each block and ``extract`` returns rank k r at the same scaling.
        head_names: parameters trained whole; default ``head_parameter_names(model)``.
        base: identity to record in the module; default: what ``model.config`` tells.
    """
    if isinstance(config, FullConfig):
        pem = _zero_delta(model, config, head_names, base)
    else:
        pem = fresh_module(
            model, config, seed=seed, blocks=blocks, head_names=head_names, base=base
        )
    return attach(model, pem, name=name, dtype=dtype, trainable=True, blocks=blocks)


def _zero_delta(
    model: nn.Module,
    config: FullConfig,
    head_names: Sequence[str] | None,
    base: BaseIdentity | None,
) -> PEM:
    names = head_parameter_names(model) if head_names is None else tuple(head_names)
    return PEM(
        head_copy(model, names), config, base or base_of(model), "fresh", head_info(model, names)
    )


def attached(model: nn.Module) -> dict[str, Attachment]:
    """Name -> attachment, in the order of attaching."""
    return dict(holdings_of(model).attachments)


def _named(model: nn.Module, name: str) -> Attachment:
    held = attached(model)
    if name not in held:
        raise PEMError.build(
            f"attachment {name!r}",
            "the model holds none of that name",
            found=", ".join(held) or "no attachments",
        )
    return held[name]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one attachment off, or all of them, the last one first."""
    for attachment in [_named(model, name)] if name else reversed(attached(model).values()):
        attachment.detach()


def extract(model: nn.Module, name: str = "default", **changes: Any) -> PEM:
    """The named module as it is now; ``changes`` replace fields of the PEM (provenance, ...)."""
    return replace(_named(model, name).extract(), **changes)


def set_active(model: nn.Module, *names: str) -> None:
    """Let exactly these attachments take part in the forward pass (LoRA and (IA)^3; heads stay)."""
    for name in names:
        _named(model, name)
    for name, attachment in attached(model).items():
        _refuse_full(attachment)
        for share in attachment.layers:
            share.active = name in names


def set_multiplier(model: nn.Module, name: str, multiplier: float) -> None:
    """Scale one module's effect in place: m scaling B A, or 1 + m (l - 1)."""
    attachment = _named(model, name)
    _refuse_full(attachment)
    for share in attachment.layers:
        share.multiplier = float(multiplier)


def _refuse_full(attachment: Attachment) -> None:
    if not attachment.layers:
        kind = "a full" if attachment.pem.kind == "full" else "a DoRA"
        raise PEMError.build(
            f"attachment {attachment.name!r}",
            f"{kind} module cannot be switched or scaled in place",
            do="swap it for a scaled module, or detach it",
        )
