"""Merging methods on modules: each layer's updates to a method, its result to tensors and config.

Bridges modules and ``methods`` as ``updates`` bridges modules and ``delta``. A layer that one
module lacks is an update of zero there. Every result comes with its judge, the error of what is
written against the method's own result before rank and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pem_composition.arithmetic import delta
from pem_composition.arithmetic.algebra import neutral_of, weighted_sum
from pem_composition.arithmetic.delta import factor_error, tensor_error, widest
from pem_composition.arithmetic.geometry import inner_products
from pem_composition.arithmetic.merging import Judge, Written, split
from pem_composition.arithmetic.methods import dense
from pem_composition.arithmetic.methods.core import core_of
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import (
    Entries,
    Products,
    Rule,
    Scaled,
    Stacked,
    blocks,
    merged,
)
from pem_composition.arithmetic.methods.registry import FORM, SEED, SIMPLE, SPECTRAL, Choice
from pem_composition.arithmetic.operand import Operand
from pem_composition.arithmetic.ranks import Rank, is_share
from pem_composition.arithmetic.terms import Factor, LayerError
from pem_composition.arithmetic.updates import (
    check_fit,
    check_shapes,
    factor_config,
    lora_factors,
    union_config,
)
from pem_composition.config import AdapterConfig

ON_FACTORS = ("ext_sub", "tsv")
SPECTRAL_NAMES = frozenset(m.name for m in SPECTRAL)


def merge(
    modules: Sequence[Operand],
    coefficients: Sequence[float],
    choice: Choice,
    rank: Rank | None,
    out: Written,
) -> AdapterConfig:
    """The method on the updates c_t dW_t of every layer, into ``out``; its config.

    Raises:
        PEMError: coefficients, ranks or shapes that the method cannot use.
    """
    if modules[0].kind == "lora":
        return _merge_lora(modules, coefficients, choice, rank, out)
    return _merge_tensors(modules, coefficients, choice, out)


# --- low-rank updates ---


@dataclass(frozen=True)
class _Layer:
    """What a method sees of one layer."""

    name: str
    terms: Sequence[Factor]  # weight s_t, or c_t s_t where coefficients scale the updates
    shares: Sequence[float]
    choice: Choice
    rank: Rank | None

    @property
    def draws(self) -> Draws:
        """Its random numbers."""
        return _draws(self.choice, self.name)

    @property
    def own_rank(self) -> int:
        """The rank asked for, which is no share here, else the largest of the modules."""
        return int(self.rank) if self.rank else max(len(t.A_RI) for t in self.terms)


def _merge_lora(
    modules: Sequence[Operand],
    coefficients: Sequence[float],
    choice: Choice,
    rank: Rank | None,
    out: Written,
) -> AdapterConfig:
    layers = sorted({layer for m in modules for layer in m.layers})
    weights, shares = split(coefficients, choice)
    for name in layers:
        layer = _Layer(name, _terms(modules, weights, name), shares, choice, rank)
        check_fit(name, [t for t in layer.terms if len(t.A_RI)])
        written, judge = _merged_layer(layer)
        dtype = widest(t.A_RI for t in layer.terms)
        A, B = (t.to(dtype).contiguous() for t in (written.A_RI, written.B_OR))
        out.take(name, {f"{name}.lora_A": A, f"{name}.lora_B": B}, judge)
    return factor_config(modules, out.tensors, layers, 1.0)


def _terms(modules: Sequence[Operand], weights: Sequence[float], layer: str) -> list[Factor]:
    """w_t s_t B_t A_t of every module; of rank zero where a module does not adapt the layer."""
    holder = next(m for m in modules if f"{layer}.lora_A" in m.tensors)
    A, B = (holder.tensors[f"{layer}.lora_{side}"] for side in "AB")
    nothing = Factor(0.0, A[:0], B[:, :0])
    return [
        next(iter(lora_factors([m], [w], layer)), nothing)
        for m, w in zip(modules, weights, strict=True)
    ]


def _merged_layer(layer: _Layer) -> tuple[Factor, Judge]:
    """Factors with weight 1 to be written, and what judges them."""
    if layer.choice.as_dict().get("form") == "dense":
        entries = Products(layer.terms)
        rule = _rule(layer.choice, entries, layer.draws)
        size = layer.rank or sum(len(t.A_RI) for t in layer.terms)
        written = dense.compressed(entries, rule, size, layer.draws)
        return written, partial(_judge_dense, layer.name, entries, rule)
    result = _result(layer)
    rank = None if layer.choice.entry.own_rank else layer.rank
    if (
        rank is not None and is_share(rank) and layer.choice.entry.levels
    ):  # the method says which directions these are
        rank = delta.rank_of(result, rank)
    kept = result if rank is None or not layer.choice.entry.levels else _result(layer, rank)
    A, B = delta.concatenate(kept) if rank is None else delta.truncate(kept, rank)
    return Factor(1.0, A, B), partial(_judge_factors, layer.name, result)


def _result(layer: _Layer, rank: Rank | None = None) -> list[Factor]:
    """The method's own result as a sum of factors in float64; cut to ``rank`` if it levels."""
    choice, function = layer.choice, layer.choice.entry.function()
    settings = choice.as_dict()
    if choice.entry.shares:
        return _on_sphere(layer)
    if choice.method == "robustmerge":
        return list(function(layer.terms, layer.name, **settings))
    if choice.method in ON_FACTORS:
        return list(choice.entry.function("on_factors")(layer.terms))
    if choice.method == "lego":
        return list(function(layer.terms, layer.draws, layer.own_rank, **settings))
    core = core_of(layer.terms)
    inner = choice.inner
    if inner is not None and choice.method == "knots":
        return [function(core, partial(_rule, inner, draws=layer.draws))]
    if inner is not None:
        merge_cores = partial(_merged_cores, inner, draws=layer.draws)
        if choice.method == "svc":
            return [core.factor(function(core.M_TPQ, merge_cores, alpha=settings["alpha"]))]
        return [function(core, layer.own_rank, settings["beta"], merge_cores)]
    return [core.factor(_merged_cores(choice, core.M_TPQ, layer.draws, rank))]


def _on_sphere(layer: _Layer) -> list[Factor]:
    entries = len(layer.terms[0].B_OR) * layer.terms[0].A_RI.shape[1]
    weights = _sphere_weights(
        layer.choice, entries, lambda: inner_products(layer.terms), layer.shares, layer.name
    )
    return [
        t._replace(weight=w * t.weight, A_RI=t.A_RI.double(), B_OR=t.B_OR.double())
        for w, t in zip(weights, layer.terms, strict=True)
    ]


def _merged_cores(choice: Choice, M_TPQ: Tensor, draws: Draws, rank: Rank | None = None) -> Tensor:
    """f(M_1, ..., M_T) of methods that work on matrices of one shape."""
    if choice.method in SPECTRAL_NAMES:
        cut = {"rank": rank} if choice.entry.levels else {}
        result: Tensor = choice.entry.function()(M_TPQ, **choice.as_dict(), **cut)
        return result
    entries = Stacked(M_TPQ)
    return merged(entries, _rule(choice, entries, draws))


def _judge_factors(
    layer: str, result: Sequence[Factor], written: Mapping[str, Tensor]
) -> LayerError:
    return factor_error(_factor_of(layer, written), result)


def _judge_dense(
    layer: str, entries: Entries, rule: Rule, written: Mapping[str, Tensor]
) -> LayerError:
    return dense.error(entries, rule, _factor_of(layer, written))


def _factor_of(layer: str, written: Mapping[str, Tensor]) -> Factor:
    return Factor(1.0, written[f"{layer}.lora_A"], written[f"{layer}.lora_B"])


# --- vectors and full updates, entry by entry ---


def _merge_tensors(
    modules: Sequence[Operand], coefficients: Sequence[float], choice: Choice, out: Written
) -> AdapterConfig:
    neutral = neutral_of(modules[0].kind)
    weights, shares = split(coefficients, choice)
    names = sorted({n for m in modules for n in m.adapter_names})
    for name in names:
        held = [m.tensors.get(name) for m in modules]
        check_shapes([t for t in held if t is not None])
        like = next(t for t in held if t is not None)
        terms = [
            (w, like.new_full(like.shape, neutral) if t is None else t)
            for w, t in zip(weights, held, strict=True)
        ]
        layer = name.rpartition(".")[0]
        change = merge_tensors(terms, choice, layer, neutral=neutral, shares=shares)
        written = {name: (change + neutral).to(widest(t for _, t in terms))}
        out.take(layer, written, partial(_judge_tensor, name, neutral, change))
    return union_config(modules)


def merge_tensors(
    terms: Sequence[tuple[float, Tensor]],
    choice: Choice,
    layer: str,
    *,
    neutral: float = 0.0,
    shares: Sequence[float] = (),
) -> Tensor:
    """f(w_1 (t_1 - neutral), ..., w_T (t_T - neutral)) of one named tensor, float64.

    For methods that work entry by entry (settings without ``form``), and for the means on the
    sphere, whose ``shares`` sum to 1.
    """
    entries = Scaled(terms, neutral)
    rule = rule_of(entries, choice, layer, shares)
    return merged(entries, rule).reshape(terms[0][1].shape)


def rule_of(entries: Entries, choice: Choice, layer: str, shares: Sequence[float] = ()) -> Rule:
    """What makes a block of the result of a block of the updates; thresholds are found first."""
    if choice.entry.shares:
        size, products = entries.shape[0] * entries.shape[1], partial(_products, entries)
        return partial(_weighted_sum, _sphere_weights(choice, size, products, shares, layer))
    return _rule(choice, entries, _draws(choice, layer))


def _sphere_weights(
    choice: Choice,
    entries: int,
    products: Callable[[], Tensor],
    shares: Sequence[float],
    layer: str,
) -> list[float]:
    """The weights of updates of so many entries; numbers have no directions to go between."""
    if entries == 1:
        return list(shares)
    return list(choice.entry.function()(products(), list(shares), layer))


def _products(entries: Entries) -> Tensor:
    """Inner products of every two updates, (T, T)."""
    products = torch.zeros(entries.count, entries.count, dtype=torch.float64)
    for _, X_TNI in blocks(entries):
        flat = X_TNI.flatten(1)
        products += flat @ flat.mT
    return products


def _weighted_sum(weights: Sequence[float], start: int, X_TNI: Tensor) -> Tensor:
    total: Tensor = weighted_sum(X_TNI.unbind(), weights)
    return total


def _judge_tensor(
    name: str, neutral: float, change: Tensor, written: Mapping[str, Tensor]
) -> LayerError:
    return tensor_error(written[name].double() - neutral, [(1.0, change)])


# --- shared ---


def _rule(choice: Choice, entries: Entries, draws: Draws) -> Rule:
    """The rule of a method that works entry by entry, or of the sum."""
    if choice.method == SIMPLE:
        return lambda start, X_TNI: X_TNI.sum(0)
    settings = {k: v for k, v in choice.settings if k != FORM.name}
    rule: Rule = choice.entry.function()(entries, draws, **settings)
    return rule


def _draws(choice: Choice, layer: str) -> Draws:
    return Draws(int(choice.as_dict().get(SEED.name, 0)), layer)
