"""Initial modules: A random and B zero, l one, so that a fresh module changes nothing.

Fused query/key/value layers can be trained in independent blocks: per part (q, v) its own rank-r
factors, together one rank-2r module whose B is block-diagonal and zero elsewhere, which is how
the reference code adapts GPT-2. alpha grows with the rank so that the scaling stays alpha / r.

Shape suffixes: I d_in, O d_out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pem_composition.adapters.heads import head_info, head_parameter_names
from pem_composition.adapters.layer import features
from pem_composition.adapters.locate import matching_layers, plain_modules, plain_tensors
from pem_composition.adapters.targets import PARTS, fused_rows
from pem_composition.checkpoint.changes import check_called
from pem_composition.checkpoint.model_folder import task_type_of
from pem_composition.checkpoint.tensors import widen
from pem_composition.config import (
    CLASSIFIERS,
    BaseIdentity,
    IA3Config,
    LoraConfig,
    matches,
    targets_of,
)
from pem_composition.errors import PEMError
from pem_composition.module import PEM

Blocks = Mapping[str, Sequence[str]]


def fresh_module(
    model: nn.Module,
    config: LoraConfig | IA3Config,
    *,
    seed: int | None = None,
    blocks: Blocks | None = None,
    head_names: Sequence[str] | None = None,
    base: BaseIdentity | None = None,
) -> PEM:
    """The module that training starts from: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, l = 1.

    A's distribution is PEFT's and loralib's kaiming_uniform(a = sqrt 5). The head is the model's.

    Args:
        seed: of A's draws, independent of the global generator; None: draw from the global one.
        blocks: fused layer -> parts to train, from ``resolve_targets``; None or {}: whole layers.
        head_names: parameters trained whole; default ``head_parameter_names(model)``.
        base: identity of the base model; default: name, type and width from ``model.config``.
    """
    names = head_parameter_names(model) if head_names is None else tuple(head_names)
    skip = {n.rpartition(".")[0] for n in names}
    layers = matching_layers(model, config.target_modules, skip=skip)
    others = plain_modules(model).keys() - layers.keys() - skip
    if any(targets_of(other, config.target_modules) for other in others):
        config = replace(config, target_modules=tuple(layers))  # PEFT would adapt the others, too
    config = blocked_config(config, list(layers), blocks or {})
    info = head_info(model, names)
    if info and info.problem in CLASSIFIERS and "task_type" not in config.extra:
        task = task_type_of(type(model).__name__)
        config = replace(config, extra={**config.extra, "task_type": task})
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    parameters = plain_tensors(model)
    for name, layer in layers.items():
        check_called(name, parameters)
        d_in, d_out = features(layer)
        if isinstance(config, LoraConfig):
            r = config.rank(name)
            tensors[f"{name}.lora_A"] = _uniform((r, d_in), 1 / math.sqrt(d_in), generator)
            tensors[f"{name}.lora_B"] = torch.zeros(d_out, r)
        else:
            tensors[f"{name}.ia3"] = torch.ones(d_in if config.scales_input(name) else d_out)
    tensors |= head_copy(model, names)
    return PEM(tensors, config, base or base_of(model), "fresh", info)


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def head_copy(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Canonical name -> copy of the model's own head parameter, float32 or float64."""
    live = {n: t.detach() for n, t in plain_tensors(model).items() if n in names}
    wide = {n: widen(t) for n, t in live.items()}
    return {f"{n}.head": wide[n].to("cpu", copy=True) for n in names}


def base_of(model: nn.Module) -> BaseIdentity:
    """Name, type and width of the model, as far as its config tells."""
    config: Any = getattr(model, "config", None)
    return BaseIdentity(
        name=getattr(config, "_name_or_path", None) or None,
        model_type=getattr(config, "model_type", None),
        hidden_size=getattr(config, "hidden_size", None),
    )


def parts_of(layer: str, blocks: Blocks) -> tuple[str, ...]:
    """Parts of a fused layer that are trained; () for a layer adapted as a whole."""
    return next((tuple(p) for target, p in blocks.items() if matches(layer, target)), ())


def blocked_config(
    config: LoraConfig | IA3Config, layers: Sequence[str], blocks: Blocks
) -> LoraConfig | IA3Config:
    """Config with k independent rank-r blocks per fused layer: rank k r, the same scaling."""
    for parts in blocks.values():
        if not parts or set(parts) - set(PARTS):
            raise PEMError.build(
                "blocks", "unknown parts", found=tuple(parts), expected="some of q, k, v"
            )
    if isinstance(config, IA3Config) or not blocks:
        return config
    counts = {layer: max(len(parts_of(layer, blocks)), 1) for layer in layers}
    k = max(counts.values(), default=1)
    if set(counts.values()) == {k} and not (config.rank_pattern or config.alpha_pattern):
        return replace(config, r=k * config.r, alpha=_grow(config.alpha, k, config.use_rslora))
    ranks = {n: c * config.rank(n) for n, c in counts.items() if c > 1}
    alphas = {
        n: _grow(config.scaling(n) * _norm(config.rank(n), config.use_rslora), c, config.use_rslora)
        for n, c in counts.items()
        if c > 1
    }
    return replace(
        config,
        rank_pattern={**ranks, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
    )


def _norm(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank


def _grow(alpha: float, k: int, rslora: bool) -> float:
    return alpha * _norm(k, rslora)


def mask_of(model: nn.Module, layer: str, role: str, rank: int, blocks: Blocks) -> Tensor | None:
    """Entries of lora_B (O, R) or ia3 (O,) that a blocked layer trains; None for a whole layer."""
    parts = parts_of(layer, blocks)
    if not parts:
        return None
    rows = fused_rows(model, layer, parts)
    if role == "ia3":
        return torch.stack(rows).any(0)
    if rank % len(parts):
        raise PEMError.build(
            layer,
            "rank does not split into its blocks",
            found=rank,
            expected=f"a multiple of {len(parts)}",
        )
    return torch.stack(rows, 1).float().repeat_interleave(rank // len(parts), 1)
