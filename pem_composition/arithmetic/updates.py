"""The update each module makes, dW, summed exactly and used to judge any other sum.

Bridges modules (tensors + config) and the factor arithmetic of ``delta``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.algebra import (
    ROLE_OF_KIND,
    around,
    check_same_tensors,
    layers_of,
    neutral_of,
    role_of,
)
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.terms import Factor, LayerError
from pem_composition.config import (
    DTYPES,
    AdapterConfig,
    IA3Config,
    LoraConfig,
    pattern_keys,
    whole_layers,
)
from pem_composition.errors import PEMError
from pem_composition.record import SUM, Certificate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pem_composition.arithmetic.operand import Operand

# Of 4 bytes or less, for what float16 does not hold: their largest numbers.
WIDE = {"bfloat16": (2 - 2**-7) * 2.0**127, "float32": (2 - 2**-23) * 2.0**127}


def delta_sum(
    modules: Sequence[Operand],
    coefficients: Sequence[float],
    rank: Rank | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Tensor], AdapterConfig]:
    """Tensors and config of the module whose update is sum_i c_i dW_i, layer by layer.

    A layer that one module lacks counts as no change. LoRA: concatenated factors, or the best
    rank-``rank`` ones, see ``ranks``; (IA)^3: 1 + sum_i c_i (l_i - 1); full: sum_i c_i delta_i.

    Args:
        dtype: each layer's tensors are rounded to it before the next are summed, see ``cast``.
    """
    if modules[0].kind == "lora":
        return _lora_sum(modules, coefficients, rank, dtype)
    layers = sorted({n for m in modules for n in m.adapter_names})
    neutral = neutral_of(modules[0].kind)
    tensors: dict[str, Tensor] = {}
    for n in layers:
        terms = _holders(modules, coefficients, n)
        weights, held = [c for c, _ in terms], [t for _, t in terms]
        check_shapes(held)
        tensors |= cast({n: around(neutral, held, weights)}, dtype)
    return tensors, union_config(modules)


def _holders(
    modules: Sequence[Operand], coefficients: Sequence[float], name: str
) -> list[tuple[float, Tensor]]:
    return [
        (c, m.tensors[name])
        for c, m in zip(coefficients, modules, strict=True)
        if name in m.tensors
    ]


def check_shapes(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors of one layer whose shapes differ."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1:
        raise PEMError.build(
            "delta space",
            "shapes of one layer differ",
            found=sorted(shapes),
            expected="equal shapes",
        )


def union_config(modules: Sequence[Operand]) -> AdapterConfig:
    """Config of a module that adapts every layer that any of these adapts."""
    config = modules[0].config
    layers = sorted({layer for m in modules for layer in m.layers})
    if not isinstance(config, IA3Config) or all(tuple(layers) == m.layers for m in modules):
        return config
    feedforward = {
        layer for m in modules for layer in m.layers
        if isinstance(m.config, IA3Config) and m.config.scales_input(layer)
    }  # fmt: skip
    return replace(
        config, target_modules=tuple(layers), feedforward_modules=tuple(sorted(feedforward))
    )


def lora_factors(
    modules: Sequence[Operand], coefficients: Sequence[float], layer: str
) -> list[Factor]:
    """The layer's terms c_i scaling_i B_i A_i, skipping modules that do not adapt it."""
    terms = [
        _factor(m.tensors, m.config, c, layer) for m, c in zip(modules, coefficients, strict=True)
    ]
    return [term for term in terms if term is not None]


def _factor(
    tensors: Mapping[str, Tensor], config: AdapterConfig, coefficient: float, layer: str
) -> Factor | None:
    assert isinstance(config, LoraConfig)
    A, B = tensors.get(f"{layer}.lora_A"), tensors.get(f"{layer}.lora_B")
    return None if A is None or B is None else Factor(coefficient * config.scaling(layer), A, B)


def _lora_sum(
    modules: Sequence[Operand], coefficients: Sequence[float], rank: Rank | None, dtype: str | None
) -> tuple[dict[str, Tensor], LoraConfig]:
    from pem_composition.arithmetic import delta

    layers = sorted({layer for m in modules for layer in m.layers})
    scalings = {
        m.config.scaling(layer)
        for m in modules for layer in m.layers if isinstance(m.config, LoraConfig)
    }  # fmt: skip
    # One shared scaling is kept, so that copied factors stay bit-equal; else it moves into B.
    kept = rank is None and len(scalings) == 1
    scaling = scalings.pop() if kept else 1.0
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        terms = lora_factors(modules, coefficients, layer)
        check_fit(layer, terms)
        A, B = delta.concatenate(terms, scaling) if rank is None else delta.truncate(terms, rank)
        tensors |= cast({f"{layer}.lora_A": A, f"{layer}.lora_B": B}, dtype)
    if len(modules) == 1 and kept:
        assert isinstance(modules[0].config, LoraConfig)
        return tensors, modules[0].config
    return tensors, factor_config(modules, tensors, layers, scaling)


def check_fit(layer: str, terms: Sequence[Factor]) -> None:
    """Refuse updates of one layer whose sizes differ."""
    shapes = sorted({(t.B_OR.shape[0], t.A_RI.shape[1]) for t in terms})
    if len(shapes) > 1:
        raise PEMError.build(
            layer,
            "the modules adapt layers of different size here",
            found=f"updates of shape {shapes}",
            expected="one shape",
            do="use one base model's modules",
        )


def factor_config(
    modules: Sequence[Operand], tensors: Mapping[str, Tensor], layers: Sequence[str], scaling: float
) -> LoraConfig:
    """Config under which the factors act with ``scaling``: alpha = scaling * r, by layer."""
    config = modules[0].config
    assert isinstance(config, LoraConfig)
    ranks = {layer: int(tensors[f"{layer}.lora_A"].shape[0]) for layer in layers}
    r, key_of = max(ranks.values()), pattern_keys(layers)
    same_layers = all(tuple(layers) == m.layers for m in modules)
    return replace(
        config,
        r=r,
        alpha=scaling * r,
        use_rslora=False,
        target_modules=config.target_modules if same_layers else whole_layers(layers),
        rank_pattern={key_of[layer]: k for layer, k in ranks.items() if k != r},
        alpha_pattern={key_of[layer]: scaling * k for layer, k in ranks.items() if k != r},
    )


def certificate_of(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    modules: Sequence[Operand],
    coefficients: Sequence[float],
) -> Certificate:
    """Relative Frobenius error of a result against sum_i c_i dW_i, float64: total and by layer."""
    layers = sorted({*layers_of(tensors)}.union(*(m.layers for m in modules)))
    return certified(
        {layer: error_of(layer, tensors, config, modules, coefficients) for layer in layers}
    )


def error_of(
    layer: str,
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    modules: Sequence[Operand],
    coefficients: Sequence[float],
) -> LayerError:
    """Error of one layer of a result against sum_i c_i dW_i, float64."""
    from pem_composition.arithmetic import delta

    if config.kind == "lora":
        written = _factor(tensors, config, 1.0, layer)
        assert written is not None
        return delta.factor_error(written, lora_factors(modules, coefficients, layer))
    role, neutral = ROLE_OF_KIND[config.kind], neutral_of(config.kind)
    terms = _holders(modules, coefficients, f"{layer}.{role}")
    return delta.tensor_error(
        tensors[f"{layer}.{role}"].double() - neutral,
        [(c, t.double() - neutral) for c, t in terms],
    )


def certified(errors: Mapping[str, LayerError], against: str = SUM) -> Certificate:
    """Relative errors of layers, and of all together, sqrt(sum error^2) / sqrt(sum norm^2).

    Examples:
        >>> certified({"fc": LayerError(3.0, 5.0, 5.0), "proj": LayerError(4.0, 0.0, 1.0)}).total
        1.0
    """
    total = LayerError(*(math.hypot(*(e[i] for e in errors.values())) for i in range(3)))
    return Certificate(total.relative, {n: e.relative for n, e in errors.items()}, against)


def drift(module: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, float]:
    """How far training moved each role: ||t - t_0||_F / ||t_0||_F over all its tensors, float64.

    Roles that start at zero (lora_B) have no such ratio and are left out.

    Raises:
        IncompatibleModules: the two have different tensors.
    """
    check_same_tensors(
        [module, initial], [1.0, -1.0], what="states", do="give the module that training began with"
    )
    moved: dict[str, float] = {}
    start: dict[str, float] = {}
    for name, tensor in initial.items():
        role = role_of(name)
        t, t_0 = module[name].double(), tensor.double()
        moved[role] = moved.get(role, 0.0) + float((t - t_0).square().sum())
        start[role] = start.get(role, 0.0) + float(t_0.square().sum())
    return {role: (moved[role] / start[role]) ** 0.5 for role in start if start[role]}


def all_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite: a finite sum has no such term, and needs no copy."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_overflow(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a sum of finite tensors that left the range of its dtype.

    Raises:
        PEMError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise PEMError.build(
                name,
                f"the sum is too large for {dtype}",
                expected="finite numbers",
                do="choose smaller coefficients",
            )


def save_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of a ``dtype`` argument.

    Raises:
        PEMError: an unknown name.
    """
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise PEMError.build(
            "dtype", "unknown dtype", found=repr(name), expected=" | ".join(DTYPES)
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Results rounded to a dtype, or as they are; each is searched once for what did not fit.

    Raises:
        PEMError: naming the tensor, and a dtype that holds it, if one does.
    """
    if dtype is None:
        check_overflow(tensors)
        return dict(tensors)
    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor.to(save_dtype(dtype))
        if not all_finite(out[name]):
            check_overflow({name: tensor})  # no other dtype would hold it
            size = float(tensor.abs().max())
            raise PEMError.build(
                name, f"a value does not fit {dtype}", found=f"{size:g}", do=f"choose {wider(size)}"
            )
    return out


def wider(size: float) -> str:
    """The dtypes of 4 bytes or less that hold a value float16 does not, else float64."""
    return " or ".join(d for d, largest in WIDE.items() if size < largest) or "float64"
