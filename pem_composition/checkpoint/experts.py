"""LoRA on a stack of experts in PEFT's layout: ``target_parameters``, one matrix per factor.

A parameter (E, ., .) holds one matrix per expert. PEFT stores the factors of all of them in two,

    A_(ER)I, row e R + k of expert e        B_O(RE), column k E + e

under the module that holds the parameter; a second parameter of the same module stands one
``base_layer`` further in, the first declared one innermost. Here every expert is a layer of its
own, ``mlp.experts.down_proj[3]`` with A (R, I) and B (O, R), so that sums, ranks and certificates
are those of any other layer.

Source: PEFT 0.21's ``lora.ParamWrapper``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint import peft_config
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.config import (
    LoraConfig,
    Patterns,
    expert_layer,
    expert_of,
    matches,
    targets_of,
)
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = "target_parameters"
INNER = ".base_layer"
# In the order in which the models of transformers declare them, which no file says.
DECLARED = ("gate_up_proj", "down_proj")


class Stacks:
    """The experts of a file: which names its stacks are read as."""

    def __init__(self, config: LoraConfig, raw: Mapping[str, Any], path: Path) -> None:
        self._config, self._path = config, path
        self._targets: tuple[str, ...] = config.extra[TARGETS]
        self._expression = isinstance(raw.get("target_modules"), str)
        self._slices: dict[str, tuple[int, int]] = {}  # name -> experts, place of this one

    def split(
        self, keys: Mapping[str, str], infos: Mapping[str, TensorInfo]
    ) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        """Keys of the file and what is stored there, by canonical names: a layer per expert.

        Raises:
            UnsupportedModule: parameters of one module whose order the file does not tell, or one
                that is no stack.
            CheckpointError: factors that do not fit each other or the config.
        """
        stacks = self._stacks(infos)
        if not stacks:
            raise UnsupportedModule.build(
                self._path, f"{TARGETS} names {', '.join(self._targets[:4])}",
                found="no factors of a stack of experts", expected="factors of these",
                do=f"restore the file, or remove {TARGETS}",
            )  # fmt: skip
        out, known = {}, {}
        for name, key in keys.items():
            layer, _, role = name.rpartition(".")
            if layer not in stacks:
                out[name], known[name] = key, infos[name]
                continue
            parameter, (rows, width) = stacks[layer], infos[name].shape
            count, r = self._size(parameter, infos, layer)
            shape = (r, width) if role == "lora_A" else (rows, r)
            for i in range(count):
                own = f"{expert_layer(parameter, i)}.{role}"
                out[own], known[own] = key, TensorInfo(infos[name].dtype, shape)
                self._slices[own] = (count, i)
        return out, known

    def form(self, name: str, tensor: Tensor) -> Tensor | None:
        """The factor of one expert out of that of all; None for another tensor."""
        if name not in self._slices:
            return None
        count, i = self._slices[name]
        if name.endswith("lora_A"):
            return tensor.reshape(count, -1, tensor.shape[1])[i].clone()
        return tensor.reshape(len(tensor), -1, count)[:, :, i].contiguous()

    def _stacks(self, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
        """Layer in the file -> the parameter whose factors it has."""
        depths: dict[str, dict[int, str]] = defaultdict(dict)
        for layer in sorted({n.rpartition(".")[0] for n in infos if n.endswith(".lora_A")}):
            module = layer
            while module.endswith(INNER):
                module = module.removesuffix(INNER)
            depth = (len(layer) - len(module)) // len(INNER)
            if self._parameters(module) and (depth or not self._is_plain(layer, infos)):
                depths[module][depth] = layer
        found: dict[str, str] = {}
        for module, layers in depths.items():
            names = self._ordered(module, len(layers))
            inside_out = [layers[depth] for depth in sorted(layers, reverse=True)]
            found |= {
                layer: f"{module}.{name}" for layer, name in zip(inside_out, names, strict=True)
            }
            self._check_order(module, inside_out, infos)
        return found

    def _parameters(self, module: str, stored: int = 0) -> list[str]:
        """The parameters of a module that the config names: with the module where these are enough
        for what is stored of it, otherwise also those that it names alone.
        """
        parts = [target.rpartition(".") for target in self._targets]
        named = {p for m, _, p in parts if m and matches(module, m)}
        if not named or len(named) < stored:
            named |= {p for m, _, p in parts if not m}
        return sorted(named)

    def _is_plain(self, layer: str, infos: Mapping[str, TensorInfo]) -> bool:
        """True for a layer that target_modules name, a regular expression by its rank."""
        if targets_of(layer, frozenset(self._config.target_modules)):
            return True
        return self._expression and infos[f"{layer}.lora_A"].shape[0] == self._rank(layer)

    def _rank(self, name: str) -> int:
        config = self._config
        return int(peft_config.values(config.rank_pattern, config.r, [name], self._path)[name])

    def _ordered(self, module: str, stored: int) -> list[str]:
        names = self._parameters(module, stored)
        if len(names) != stored:
            raise CheckpointError.build(
                self._path, f"{TARGETS} names {', '.join(names)} of {module}",
                found=f"factors of {stored}", expected=f"factors of {len(names)}",
                do="restore the config that belongs to these weights",
            )  # fmt: skip
        if stored > 1 and not set(names) <= set(DECLARED):
            raise UnsupportedModule.build(
                self._path, f"{TARGETS}: which factors belong to which parameter of {module} "
                "stands in the model's code alone",
                found=", ".join(names), expected=f"one parameter, or {' and '.join(DECLARED)}",
                do="train a module on one of them",
            )  # fmt: skip
        return [n for n in DECLARED if n in names] if stored > 1 else names

    def _check_order(
        self, module: str, inside_out: Sequence[str], infos: Mapping[str, TensorInfo]
    ) -> None:
        """The first matrix gives the second what it takes, once or, with a gate, twice."""
        sides = [(infos[f"{n}.lora_A"].shape[1], infos[f"{n}.lora_B"].shape[0]) for n in inside_out]
        if len(sides) != 2:
            return
        (a, b), (c, d) = sides
        if not ((a == d and b in (c, 2 * c)) or (b == c and a in (d, 2 * d))):
            raise CheckpointError.build(
                self._path, f"factors of {module} do not fit each other",
                found=f"{a} -> {b} and {c} -> {d}",
                expected=f"those of {' and '.join(DECLARED)}, the first one innermost",
                do="restore the file from its source",
            )  # fmt: skip

    def _size(self, parameter: str, infos: Mapping[str, TensorInfo], layer: str) -> tuple[int, int]:
        """Number of experts and rank of each."""
        r, rows = self._rank(parameter), infos[f"{layer}.lora_A"].shape[0]
        columns = infos.get(f"{layer}.lora_B", TensorInfo("F32", (0, 0))).shape[1]
        if rows % r or columns != rows:
            raise CheckpointError.build(
                self._path, f"factors of {parameter}", found=f"{rows} rows, {columns} columns",
                expected=f"a multiple of the rank {r}, both alike", do="correct r or rank_pattern",
            )  # fmt: skip
        if rows == r:
            raise UnsupportedModule.build(
                self._path, f"{TARGETS}: {parameter} is one matrix, no stack of experts",
                found=f"factors of rank {r}", expected="a parameter of three dimensions",
                do="train the module without it; target_modules adapt the weights of linear layers",
            )  # fmt: skip
        return rows // r, r


# --- writing ------------------------------------------------------------------------------------


def joined(
    layers: Sequence[str],
    value: Callable[[str], Tensor],
    config: LoraConfig,
    where: str,
) -> tuple[dict[str, Tensor], LoraConfig]:
    """PEFT's matrices of all experts, by the layer and role in the file, and the config for them.

    Experts of a smaller rank get zeros; where scalings differ, they move into B.

    Args:
        layers: of a module; others than experts are left alone.
        value: the tensor of a canonical name.
        config: of the module; its target_modules are those of the other layers.

    Raises:
        PEMError: a stack that lacks an expert, or whose place PEFT has no order for.
    """
    stacks: dict[str, dict[int, str]] = defaultdict(dict)
    for layer in layers:
        if expert := expert_of(layer):
            stacks[expert[0]][expert[1]] = layer
    places = _places(stacks, where)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for parameter, experts in stacks.items():
        if sorted(experts) != list(range(len(experts))):
            raise PEMError.build(
                where, f"experts of {parameter} are missing", found=sorted(experts)[:8],
                expected="all of them",
            )  # fmt: skip
        names = [experts[i] for i in range(len(experts))]
        r = max(config.rank(n) for n in names)
        scalings = {config.scaling(n) for n in names}
        scaling = scalings.pop() if len(scalings) == 1 else 1.0
        first_A, first_B = (value(f"{names[0]}.lora_{side}") for side in "AB")
        A_ERI = first_A.new_zeros(len(names), r, first_A.shape[1])
        B_ORE = first_B.new_zeros(len(first_B), r, len(names))
        for i, n in enumerate(names):
            a, b = value(f"{n}.lora_A"), value(f"{n}.lora_B")
            A_ERI[i, : len(a)] = a
            factor = 1.0 if config.scaling(n) == scaling else config.scaling(n)
            B_ORE[:, : b.shape[1], i] = b * factor
        tensors[f"{places[parameter]}.lora_A"] = A_ERI.flatten(0, 1)
        tensors[f"{places[parameter]}.lora_B"] = B_ORE.flatten(1)
        sizes[parameter] = r, scaling * (r**0.5 if config.use_rslora else r)
    return tensors, _configured(config, sizes, tuple(stacks))


def _places(stacks: Mapping[str, Any], where: str) -> dict[str, str]:
    """Parameter -> the layer under which PEFT stores its factors."""
    modules: dict[str, list[str]] = defaultdict(list)
    for parameter in stacks:
        module, _, name = parameter.rpartition(".")
        modules[module].append(name)
    places = {}
    for module, names in modules.items():
        if len(names) > 1 and not set(names) <= set(DECLARED):
            raise UnsupportedModule.build(
                where, "PEFT's layout has no order for these parameters of one module",
                found=f"{', '.join(sorted(names))} of {module}",
                expected=f"one parameter, or {' and '.join(DECLARED)}",
            )  # fmt: skip
        ordered = [n for n in DECLARED if n in names] if len(names) > 1 else names
        for i, name in enumerate(ordered):
            places[f"{module}.{name}"] = module + INNER * (len(ordered) - 1 - i)
    return places


def _configured(
    config: LoraConfig, sizes: Mapping[str, tuple[int, float]], parameters: tuple[str, ...]
) -> LoraConfig:
    """The config as PEFT reads it: patterns by parameter, which come first."""
    ranks = {k: r for k, r in config.rank_pattern.items() if not expert_of(k)}
    alphas = {k: a for k, a in config.alpha_pattern.items() if not expert_of(k)}
    own_ranks = {p: r for p, (r, _) in sizes.items() if Patterns(ranks).value(p, config.r) != r}
    own_alphas = {
        p: a for p, (_, a) in sizes.items() if Patterns(alphas).value(p, config.alpha) != a
    }
    return replace(
        config, rank_pattern={**own_ranks, **ranks}, alpha_pattern={**own_alphas, **alphas},
        dropout=0.0, fan_in_fan_out=False,  # PEFT has neither on a parameter
        extra={**config.extra, TARGETS: parameters},
    )  # fmt: skip
