"""One module on a live model: its layers, its head, and the way back.

Everything is checked before the model is touched; ``detach`` leaves module types, weights, heads
and ``requires_grad`` as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pem_composition.adapters.folding import Folded, saved_on
from pem_composition.adapters.fresh import Blocks, mask_of
from pem_composition.adapters.full_tuning import FullWeights
from pem_composition.adapters.ia3 import IA3Linear, IA3Vector
from pem_composition.adapters.layer import AdapterLayer
from pem_composition.adapters.locate import check_model, holder_of
from pem_composition.adapters.lora import LoraExperts, LoraFactors, LoraLinear
from pem_composition.adapters.placement import Placement
from pem_composition.adapters.plan import check_base, check_layers, head_of, stacks_of
from pem_composition.checkpoint.tensors import widen
from pem_composition.config import Factor, IA3Config, LoraConfig, expert_of, weight_of
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM


@dataclass
class Holdings:
    """What a model holds: attachments by name, and requires_grad flags from before the first."""

    attachments: dict[str, Attachment] = field(default_factory=dict)
    flags: dict[nn.Parameter, bool] = field(default_factory=dict)
    marks_inputs: bool = False  # embeddings made to require gradients, for gradient checkpointing


@dataclass(frozen=True)
class Options:
    """How a module is attached; see ``attach``."""

    dtype: torch.dtype | None = None
    trainable: bool = False
    head: str = "load"
    blocks: Blocks = field(default_factory=dict)
    frozen: Factor | None = None


class Attachment(AbstractContextManager["Attachment"]):
    """One module held by a model under a name; a context manager that detaches it.

    Use ``attach`` or ``attach_fresh`` to make one.
    """

    def __init__(self, model: nn.Module, pem: PEM, name: str, options: Options) -> None:
        self.model, self.name, self.options = model, name, options
        self.holdings = holdings_of(model)
        _check_frozen(pem, options)
        self._install(pem)

    def _install(self, pem: PEM) -> None:
        head = head_of(self.model, pem, self.options.head)
        self._check_head_is_free(head)
        self._held: Layers | FullWeights | Folded
        dora = isinstance(pem.config, LoraConfig) and pem.config.use_dora
        if dora and self.options.trainable:
            raise IncompatibleModules.build(
                f"module {pem.name}", "DoRA is not trained here", found="use_dora",
                do="train it with PEFT, or fold it into its base (pem fold)",
            )  # fmt: skip
        if dora:  # its update needs the base's weights
            self._held = Folded(self.model, pem, head=self.options.head)
        elif pem.kind != "full":
            self._held = Layers(self.model, pem, self.name, self.options)
        elif self.options.trainable:
            self._held = FullWeights(self.model, pem, head)
        else:
            self._held = Folded(self.model, pem, head="ignore")
        if dora and isinstance(self._held, Folded):  # on top of the parts that it saves whole
            self._slot = self._held.placement if head else None
        else:
            saved = saved_on(self.model, pem, {}, head)
            self._slot = Placement(self.model, saved) if head else None
        self.pem = pem

    def _check_head_is_free(self, head: Mapping[str, Tensor]) -> None:
        for other in self.holdings.attachments.values():
            taken = set(other.head_tensors()) & set(head) if other is not self else set()
            if taken:
                raise IncompatibleModules.build(
                    f"head {min(taken)}",
                    "two attached modules bring a head",
                    found=f"that of attachment {other.name!r}",
                    do="attach one of them with head='ignore'",
                )

    def head_tensors(self) -> dict[str, Tensor]:
        """Live head parameters that this module brought, by name."""
        if self._slot is None:
            return {}
        own = self.pem.head_names
        return {n: t for n, t in self._slot.parameters().items() if n in own}

    def parameters(self) -> list[nn.Parameter]:
        """What training this module changes: its adapter but for a frozen factor, and its head.

        Of a full module: all weights.
        """
        own = self._held.parameters() if isinstance(self._held, Layers) else []
        if isinstance(self._held, FullWeights):
            own = list(self._held.live.values())
        return own + [p for p in self.head_tensors().values() if isinstance(p, nn.Parameter)]

    def swap(self, pem: PEM) -> Attachment:
        """Replace the module's numbers; in place (same parameters) where names and shapes agree."""
        if self.holdings.attachments.get(self.name) is not self:
            raise PEMError.build(
                f"attachment {self.name!r}", "is detached", do="attach the module again"
            )
        _check_frozen(pem, self.options)
        head = head_of(self.model, pem, self.options.head)
        same_head = {n: t.shape for n, t in head.items()} == {
            n: t.shape for n, t in self.head_tensors().items()
        }
        if isinstance(self._held, Layers) and same_head and self._held.fits(pem):
            check_base(self.model, pem)
            self._held.write(pem)
            if self._slot:
                self._slot.replace(saved_on(self.model, pem, {}, head))
            self.pem = pem
            return self
        self._replace(pem)
        return self

    def _replace(self, pem: PEM) -> None:
        before = self.pem
        self._remove()
        try:
            self._install(pem)
        except PEMError:
            self._install(before)
            raise
        finally:
            set_trainable(self)

    def extract(self, *, name: str | None = None) -> PEM:
        """The module as it is now (after training, say), on the CPU, in float32 or float64.

        Config, base identity, head labels and provenance are those it was attached with.
        """
        if isinstance(self._held, Folded):
            tensors = dict(self._held.pem.adapter_tensors())
        else:
            tensors = {n: copy_out(t) for n, t in self._held.tensors().items()}
        if self._slot:
            tensors |= {f"{n}.head": copy_out(t) for n, t in self.head_tensors().items()}
        head = self.pem.head if self._slot else None
        return PEM(
            tensors,
            self.pem.config,
            self.pem.base,
            name or self.pem.name,
            head,
            self.pem.provenance,
            heads=self.pem.heads,
        )

    def detach(self) -> None:
        """Take the module off; layers, weights, head and requires_grad are then as before."""
        if self.holdings.attachments.get(self.name) is not self:
            return
        self._remove()
        del self.holdings.attachments[self.name]
        if not self.holdings.attachments:
            for parameter, flag in self.holdings.flags.items():
                parameter.requires_grad_(flag)
            self.holdings.flags.clear()
            if self.holdings.marks_inputs:
                self.model.disable_input_require_grads()
                self.holdings.marks_inputs = False

    def _remove(self) -> None:
        if self._slot:
            self._slot.remove()
        self._held.restore()

    @property
    def layers(self) -> list[LoraFactors | IA3Vector]:
        """This module's share of each layer; empty for a full module."""
        return list(self._held.adapters.values()) if isinstance(self._held, Layers) else []

    def __exit__(self, *exc: object) -> None:
        self.detach()


class Layers:
    """One LoRA or (IA)^3 module on the layers of a model."""

    def __init__(self, model: nn.Module, pem: PEM, name: str, options: Options) -> None:
        check_base(model, pem)
        self.model, self.name, self.config = model, name, pem.config
        self.frozen = options.frozen
        self.names = check_layers(model, pem)
        stacks = stacks_of(model, pem, self.names)
        for live in self.names.values():
            _check_free(model, live, _wrapper(pem.kind, live), name)
        self.adapters = {
            n: _adapter(model, pem, n, live, options) for n, live in self.names.items()
        }
        for own, live in self.names.items():
            path, slot = _place(live)
            layer = _layer(model, path)
            if not isinstance(layer, AdapterLayer):
                layer = _wrapper(pem.kind, live)(layer)
                _set_submodule(model, path, layer)
            if isinstance(layer, LoraExperts):
                layer.transposed[weight_of(live).rpartition(".")[2]] = stacks.transposed(live)
            layer.add(name + slot, self.adapters[own])

    def parameters(self) -> list[nn.Parameter]:
        """All but the frozen factors."""
        held = (pair for a in self.adapters.values() for pair in a.named_parameters())
        return [parameter for role, parameter in held if role != self.frozen]

    def tensors(self) -> dict[str, Tensor]:
        """Canonical name -> tensor in effect, live."""
        return {
            f"{n}.{role}": t for n, a in self.adapters.items() for role, t in a.effective().items()
        }

    def fits(self, pem: PEM) -> bool:
        """True if the other module has the same kind, layers and shapes, scaling sides included."""
        shapes = {n: t.shape for n, t in pem.adapter_tensors().items()}
        if pem.kind != self.config.kind or shapes != {
            n: t.shape for n, t in self.tensors().items()
        }:
            return False
        return not isinstance(pem.config, IA3Config) or all(
            pem.config.scales_input(n) == a.scales_input for n, a in self.adapters.items()
        )

    @torch.no_grad()
    def write(self, pem: PEM) -> None:
        """Set numbers and scaling in place."""
        names = check_layers(self.model, pem)
        for name, adapter in self.adapters.items():
            _check_mask(names[name], adapter.mask, pem, name)
        for name, adapter in self.adapters.items():
            for role, parameter in adapter.named_parameters():
                parameter.copy_(pem.tensors[f"{name}.{role}"])
            if isinstance(pem.config, LoraConfig):
                adapter.scaling = pem.config.scaling(name)
        self.config = pem.config

    def restore(self) -> None:
        for live in self.names.values():
            path, slot = _place(live)
            layer = _layer(self.model, path)
            layer.remove(self.name + slot)
            if not layer.adapters:
                _set_submodule(self.model, path, layer.base)


def _check_frozen(pem: PEM, options: Options) -> None:
    """A frozen factor is one that the module has, and that gives the other one a gradient."""
    frozen = options.frozen
    if frozen is None:
        return
    if not options.trainable:
        raise PEMError.build(
            f"module {pem.name}", f"is not trained, so that {frozen} stays as it is anyway",
            do="add trainable=True, or leave frozen out",
        )  # fmt: skip
    factors = pem.adapter_tensors()
    held = [tensor for name, tensor in factors.items() if name.endswith(f".{frozen}")]
    if not held:
        raise IncompatibleModules.build(
            f"module {pem.name}", f"has no {frozen} to leave as it is",
            found=", ".join(sorted({name.rpartition(".")[2] for name in factors})),
            expected="a LoRA module, and lora_A or lora_B of it",
        )  # fmt: skip
    if not any(tensor.any() for tensor in held):
        raise IncompatibleModules.build(
            f"module {pem.name}", f"would not learn: its {frozen} is zero and stays so",
            expected=f"a {frozen} with other entries", do="start from a module that was trained",
        )  # fmt: skip


def _wrapper(kind: str, live: str) -> type[AdapterLayer]:
    if expert_of(live):
        return LoraExperts
    return LoraLinear if kind == "lora" else IA3Linear


def _place(live: str) -> tuple[str, str]:
    """The module that an adapter stands at, and what its name there says besides."""
    if not expert_of(live):
        return live, ""
    path, _, slot = live.rpartition(".")
    return path, f":{slot}"


def _check_free(model: nn.Module, live: str, wrapper: type[AdapterLayer], name: str) -> None:
    layer = _layer(model, _place(live)[0])
    if isinstance(layer, AdapterLayer) and not isinstance(layer, wrapper):
        raise IncompatibleModules.build(
            f"layer {live}",
            "LoRA and (IA)^3 on one layer have no agreed order",
            found=f"{type(layer).__name__} of {', '.join(layer.adapters)}",
            expected=wrapper.__name__,
            do=f"detach it, or fold one of the modules before attaching {name!r}",
        )


def _adapter(
    model: nn.Module, pem: PEM, name: str, live: str, options: Options
) -> LoraFactors | IA3Vector:
    path, local = weight_of(live).rpartition(".")[::2]
    weight = getattr(_layer(model, path), local)
    dtype = options.dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    tensors = {
        role: pem.tensors[f"{name}.{role}"].to(weight.device, dtype, copy=True)
        for role in (("lora_A", "lora_B") if pem.kind == "lora" else ("ia3",))
    }
    rank = tensors["lora_A"].shape[0] if pem.kind == "lora" else 0
    mask = mask_of(model, live, "lora_B" if rank else "ia3", rank, options.blocks)
    _check_mask(live, mask, pem, name)
    mask = None if mask is None else mask.to(weight.device)
    if isinstance(pem.config, LoraConfig):
        mask = None if mask is None else mask.to(dtype)
        scaling, dropout = pem.config.scaling(name), pem.config.dropout
        adapter: LoraFactors | IA3Vector = LoraFactors(
            **tensors, scaling=scaling, dropout=dropout, mask=mask
        )
    else:
        assert isinstance(pem.config, IA3Config)
        adapter = IA3Vector(**tensors, scales_input=pem.config.scales_input(name), mask=mask)
    return adapter.requires_grad_(options.trainable)


def _check_mask(live: str, mask: Tensor | None, pem: PEM, name: str) -> None:
    """A module that changes what its blocks leave alone would silently lose that part."""
    if mask is None:
        return
    neutral, tensor = (0.0, "lora_B") if pem.kind == "lora" else (1.0, "ia3")
    outside = pem.tensors[f"{name}.{tensor}"][~mask.to("cpu", torch.bool)]
    if (outside != neutral).any():
        raise IncompatibleModules.build(
            f"layer {live}, {tensor}",
            "the module also changes outputs outside its blocks",
            found=f"{int((outside != neutral).sum())} entries that are not {neutral:g}",
            do="attach it without blocks",
        )


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, local = holder_of(model, path)
    setattr(holder, local, module)


def _layer(model: nn.Module, path: str) -> nn.Module:
    holder, local = holder_of(model, path)
    return holder.get_submodule(local)


def copy_out(tensor: Tensor) -> Tensor:
    """A copy on the CPU in float32 (float64 stays float64)."""
    return widen(tensor.detach().to("cpu", copy=True))


def holdings_of(model: nn.Module) -> Holdings:
    """The model's record of what is attached to it."""
    check_model(model)
    held: Holdings = model.__dict__.setdefault("_pem_holdings", Holdings())
    return held


def set_trainable(attachment: Attachment) -> None:
    """Freeze everything but what the trainable attachments train; flags are kept for ``detach``."""
    if not attachment.options.trainable:
        return
    model, holdings = attachment.model, attachment.holdings
    own = {
        id(p) for a in holdings.attachments.values() if a.options.trainable for p in a.parameters()
    }
    adapters = {
        id(p) for a in holdings.attachments.values() for s in a.layers for p in s.parameters()
    }
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            holdings.flags.setdefault(parameter, parameter.requires_grad)
        parameter.requires_grad_(id(parameter) in own)
    if _is_checkpointing(model) and not holdings.marks_inputs:
        model.enable_input_require_grads()
        holdings.marks_inputs = True


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())
