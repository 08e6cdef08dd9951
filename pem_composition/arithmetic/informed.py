"""Methods that need data, on modules: each one's statistics beside its tensors.

Bridges modules and ``fisher_average``, ``regmean``, ``ssr`` as ``merging`` does for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from pem_composition.arithmetic.algebra import ROLE_OF_KIND, neutral_of
from pem_composition.arithmetic.delta import (
    concatenate,
    factor_error,
    tensor_error,
    truncate,
    widest,
)
from pem_composition.arithmetic.merging import Written
from pem_composition.arithmetic.methods.registry import Choice
from pem_composition.arithmetic.operand import Operand
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.statistics import (
    BLOCKS,
    FISHER,
    SUBSPACE,
    Statistics,
    fingerprint,
)
from pem_composition.arithmetic.terms import Factor, LayerError
from pem_composition.arithmetic.updates import check_fit, factor_config, lora_factors
from pem_composition.config import AdapterConfig, LoraConfig
from pem_composition.errors import IncompatibleModules


def merge_informed(
    modules: Sequence[Operand],
    coefficients: Sequence[float],
    choice: Choice,
    statistics: Sequence[Statistics],
    rank: Rank | None,
    out: Written,
) -> AdapterConfig:
    """Fisher, RegMean or SSR merging into ``out``; the coefficients are shares c_i / sum c.

    Raises:
        PEMError: coefficients, layers or statistics that the method cannot use.
    """
    shares = [c / sum(coefficients) for c in coefficients]
    if choice.entry.needs == FISHER:
        return _fisher(modules, shares, choice, statistics, out)
    return _least_squares(modules, shares, choice, statistics, rank, out)


def _fisher(
    modules: Sequence[Operand],
    shares: Sequence[float],
    choice: Choice,
    statistics: Sequence[Statistics],
    out: Written,
) -> AdapterConfig:
    average = choice.entry.function()(
        [m.adapter_tensors() for m in modules], [s.tensors for s in statistics], shares,
        **choice.as_dict(),
    )  # fmt: skip
    config = modules[0].config
    for layer in modules[0].layers:
        judge = (
            partial(_judge_factors, layer, config.scaling(layer), average)
            if isinstance(config, LoraConfig)
            else partial(_judge_tensor, layer, modules[0].kind, average)
        )
        names = [n for n in average if n.rpartition(".")[0] == layer]
        out.take(
            layer, {n: average[n].to(widest(m.tensors[n] for m in modules)) for n in names}, judge
        )
    return config


def _judge_factors(
    layer: str, scaling: float, exact: Mapping[str, Tensor], written: Mapping[str, Tensor]
) -> LayerError:
    both = [Factor(scaling, t[f"{layer}.lora_A"], t[f"{layer}.lora_B"]) for t in (written, exact)]
    return factor_error(both[0], both[1:])


def _judge_tensor(
    layer: str, kind: str, exact: Mapping[str, Tensor], written: Mapping[str, Tensor]
) -> LayerError:
    role, neutral = ROLE_OF_KIND[kind], neutral_of(kind)
    name = f"{layer}.{role}"
    return tensor_error(written[name].double() - neutral, [(1.0, exact[name] - neutral)])


def _least_squares(
    modules: Sequence[Operand],
    shares: Sequence[float],
    choice: Choice,
    statistics: Sequence[Statistics],
    rank: Rank | None,
    out: Written,
) -> AdapterConfig:
    layers = sorted({layer for m in modules for layer in m.layers})
    needs = choice.entry.needs
    places = _places(modules, statistics) if needs == SUBSPACE else []
    for layer in layers:
        _check_layer(layer, modules, statistics, needs)
        terms = lora_factors(modules, [1.0] * len(modules), layer)
        check_fit(layer, terms)
        grams = [s.tensors[f"{layer}.{needs}"] for s in statistics]
        if places:
            ranks = [len(t.A_RI) for t in terms]
            grams = [_ordered(S, own, ranks) for S, own in zip(grams, places, strict=True)]
        merged = choice.entry.function()(terms, grams, shares, layer=layer, **choice.as_dict())
        A, B = concatenate([merged]) if rank is None else truncate([merged], rank)
        dtype = widest(t.A_RI for t in terms)
        names = f"{layer}.lora_A", f"{layer}.lora_B"
        written = {n: t.to(dtype).contiguous() for n, t in zip(names, (A, B), strict=True)}
        out.take(layer, written, partial(_judge_update, names, merged))
    return factor_config(modules, out.tensors, layers, 1.0)


def _judge_update(
    names: tuple[str, str], exact: Factor, written: Mapping[str, Tensor]
) -> LayerError:
    return factor_error(Factor(1.0, *(written[n] for n in names)), [exact])


def _places(modules: Sequence[Operand], statistics: Sequence[Statistics]) -> list[list[int]]:
    """For each file the place in its blocks of every module.

    Raises:
        IncompatibleModules: a file that was computed for other modules.
    """
    own = [fingerprint(m) for m in modules]
    found = []
    for s in statistics:
        blocks = [str(b) for b in s.facts.get(BLOCKS, ())]
        if sorted(blocks) != sorted(own):
            raise IncompatibleModules.build(
                s.name, "was computed for other modules than these",
                found=", ".join(b[:12] for b in blocks), expected=", ".join(b[:12] for b in own),
                do="run pem gram --merge_with again, with the others of this merge",
            )  # fmt: skip
        pairs = zip(*(sorted(range(len(x)), key=x.__getitem__) for x in (own, blocks)), strict=True)
        found.append([block for _, block in sorted(pairs)])
    return found


def _ordered(S_KK: Tensor, places: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Blocks of a file in the order of the modules, whose ranks these are."""
    if len(S_KK) != sum(ranks):
        return S_KK  # which the method refuses
    sizes = dict(zip(places, ranks, strict=True))
    starts = [sum(sizes[i] for i in range(place)) for place in places]
    order = [s + k for s, r in zip(starts, ranks, strict=True) for k in range(r)]
    return S_KK[order][:, order]


def _check_layer(
    layer: str, modules: Sequence[Operand], statistics: Sequence[Statistics], needs: str
) -> None:
    """A module that leaves a layer alone wants no change there, on inputs that nobody recorded."""
    for module, own in zip(modules, statistics, strict=True):
        if f"{layer}.lora_A" not in module.tensors or f"{layer}.{needs}" not in own.tensors:
            raise IncompatibleModules.build(
                f"{module.name}, layer {layer}",
                f"has no update or no {needs} matrix",
                expected="modules of the same layers, each with its own pem gram",
                do="use a method that needs no data",
            )
