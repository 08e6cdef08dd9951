"""Expressions evaluated on modules: ``compose("0.5*ties(a, b) + c", {"a": a, "b": b, "c": c})``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic import head_policies
from pem_composition.arithmetic.algebra import RULES, as_numbers, role_of
from pem_composition.arithmetic.compatible import SPACES, check_linear, check_log_kind, space_of
from pem_composition.arithmetic.expression import parse
from pem_composition.arithmetic.labels import label_of, notes_of
from pem_composition.arithmetic.logarithm import log_error, power_product
from pem_composition.arithmetic.methods.registry import Choice
from pem_composition.arithmetic.methods.settings import shown
from pem_composition.arithmetic.operand import check_module
from pem_composition.arithmetic.patterns import Pattern, compile_pattern
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.trees import Merge, Sum, default_space, evaluate, names, with_layers
from pem_composition.arithmetic.updates import cast, certified, error_of
from pem_composition.errors import PEMError, wrong_type
from pem_composition.module import PEM, combine, in_dtype, negate, with_chosen
from pem_composition.record import PRODUCT, Certificate, Term, leaf, record

if TYPE_CHECKING:
    from torch import Tensor

Factors = Sequence[tuple[str, float]]  # (pattern of layer names, factor)


def compose(
    expression: str | Sum,
    modules: Mapping[str, PEM],
    *,
    space: str | None = None,
    rank: Rank | None = None,
    layers: Mapping[str, Mapping[str, float]] | None = None,
    head: str = "average",
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
) -> PEM:
    """The module that an expression stands for.

    Sums are taken in ``space`` (default: delta where the expression merges updates by a method,
    else parameter), as one combination where the algebra allows it. A method's own arguments are
    always updates. ``rank`` truncates the result, to a rank or to a share of
    each layer's energy.

    Args:
        modules: what the names stand for.
        layers: name -> {pattern: factor}: the module's factor in the layers that match, the first
            pattern deciding; the same as layers(name, "pattern", factor, ...) in the expression.
        head: as for ``combine``.
        dtype: as for ``combine``.
        allow_base_mismatch: as for ``combine``.

    Raises:
        UsageError: the expression, by column; PEMError: a name without a module, or what
            ``combine`` refuses.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> a, b = (PEM({"fc.ia3": torch.tensor([v, 1.0])}, IA3Config(("fc",)), name=n)
        ...         for n, v in (("a", 2.0), ("b", 4.0)))
        >>> m = compose("0.5*(a + b) - negate(a, 0.5)", {"a": a, "b": b})
        >>> m.tensors["fc.ia3"].tolist()
        [3.5, 1.0]
        >>> compose("a + c", {"a": a})
        Traceback (most recent call last):
            ...
        pem_composition.errors.PEMError: expression: no module named 'c'; found names ['a']
    """
    if not isinstance(expression, str | Sum):
        raise wrong_type("expression", expression, "a text such as '0.5*a + b'")
    if not isinstance(modules, Mapping):
        raise wrong_type("modules", modules, "a dictionary of modules by name")
    tree = parse(expression) if isinstance(expression, str) else expression
    if layers:
        tree = with_layers(tree, _pairs(layers, names(tree)))
    for name in names(tree):
        if name not in modules:
            raise PEMError.build(
                "expression", f"no module named {name!r}", found=f"names {sorted(modules)}"
            )
        check_module(name, modules[name])
    if space is not None and space not in SPACES:
        raise PEMError.build(
            "space", "unknown space", found=repr(space), expected=" or ".join(SPACES)
        )
    if space == "log" and isinstance(tree.lone, Merge):
        space_of(tree.lone.choice, space)  # a method's result is no product
    operations = _Operations(head, dtype, allow_base_mismatch)
    named = {name: modules[name] for name in names(tree)}
    return evaluate(tree, named, operations, space or default_space(tree), rank)


def _pairs(layers: Mapping[str, Mapping[str, float]], known: Sequence[str]) -> dict[str, Factors]:
    """Factors of the layers by the name of a module, which the expression must have."""
    if not isinstance(layers, Mapping):
        raise wrong_type("layers", layers, "a dictionary by the names of modules")
    for name, own in layers.items():
        if name not in known:
            raise PEMError.build(
                "layers", f"the expression has no module named {name!r}",
                found=f"names {sorted(known)}",
            )  # fmt: skip
        if not isinstance(own, Mapping):
            raise wrong_type("layers", own, "a dictionary of factors by patterns of layers")
    return {name: tuple(own.items()) for name, own in layers.items()}


@dataclass(frozen=True)
class _Operations:
    """The nodes of a tree on modules; the final one rounds to ``dtype``, all compute in float64."""

    head: str
    dtype: str | None
    allow_base_mismatch: bool

    def combine(
        self,
        modules: Sequence[PEM],
        coefficients: Sequence[float],
        space: str,
        rank: Rank | None,
        *,
        final: bool,
    ) -> PEM:
        options = self._options(final)
        return combine(modules, coefficients, space=space, rank=rank, **options)

    def merge(
        self,
        modules: Sequence[PEM],
        coefficients: Sequence[float],
        choice: Choice,
        rank: Rank | None,
        *,
        final: bool,
    ) -> PEM:
        options = {"method": choice.method, "settings": choice.as_dict(), **self._options(final)}
        return combine(modules, coefficients, rank=rank, **options)

    def negate(self, module: PEM, strength: float, *, final: bool) -> PEM:
        return negate(module, strength, dtype=self._options(final)["dtype"])

    def layers(self, module: PEM, factors: Factors, space: str, *, final: bool) -> PEM:
        options = self._options(final)
        given = {"head": self.head if final else "first", "dtype": options["dtype"]}
        return weigh_layers(module, factors, space, **given)

    def _options(self, final: bool) -> dict[str, Any]:
        return {
            "head": self.head,
            "dtype": self.dtype if final or self.dtype == "float64" else None,
            "allow_base_mismatch": self.allow_base_mismatch,
        }


def weigh_layers(
    module: PEM, factors: Factors, space: str, *, head: str = "first", dtype: str | None = None
) -> PEM:
    """The module with a coefficient per layer: the factor of the first pattern that matches.

    In delta space a layer's update becomes f dW: {A, f B}, 1 + f (l - 1), f delta; in parameter
    space f times the module there: {abs(f) A, f B}; in log space l^f. Layers without a match, and
    with f = 1, keep their tensors bit for bit. Certified against f dW, in log space against l^f.

    Args:
        head: as for ``combine``, of which this is a sum of one.
        dtype: as for ``combine``.

    Raises:
        PEMError: a pattern that matches no layer, or a factor that is not finite.
    """
    check_linear(module)
    values = as_numbers([f for _, f in factors], "layers")
    factors = [(pattern, f) for (pattern, _), f in zip(factors, values, strict=True)]
    compiled = [(compile_pattern(pattern), factor) for pattern, factor in factors]
    check_patterns([p for p, _ in compiled], module.layers, module.name)
    if space == "log":
        check_log_kind([module])
    exact = in_dtype(module, dtype)
    weights = {n: _first_factor(compiled, n) for n in module.layers}
    tensors: dict[str, Tensor] = {}
    for name, tensor in exact.adapter_tensors().items():
        factor = weights[name.rpartition(".")[0]]
        if factor != 1.0 and space == "log":
            tensor = power_product(name, [(factor, module.name, tensor)])
        elif factor != 1.0:
            tensor = _scaled(tensor, role_of(name), factor, space)
        tensors |= cast({name: tensor}, dtype)
    chosen = head_policies.choose([exact], [1.0], head, dtype)
    result = with_chosen(exact, tensors, chosen, dtype)
    pairs = "".join(f', "{pattern}", {shown(f)}' for pattern, f in factors)
    settings = {"factors": factors, "space": space}
    settings |= {} if head == "first" else {"head": head}
    settings |= {} if dtype is None else {"dtype": dtype}
    origin = module.provenance
    provenance = replace(
        origin,
        sources=origin.sources if origin.space is not None else (leaf(module),),
        terms=(Term(1.0, f"layers({label_of(module, space)}{pairs})"),),
        space=space,
        method="layers",
        certificate=_certificate(result, exact, weights, space).covering(chosen.saved),
        head_policy=head,
        notes=(*notes_of(module), *chosen.notes),
        recipe=record("weigh_layers", [module], **settings),
    )
    return replace(result, provenance=provenance)


def _first_factor(factors: Sequence[tuple[Pattern, float]], layer: str) -> float:
    return next((f for pattern, f in factors if pattern.matches(layer)), 1.0)


def _certificate(result: PEM, module: PEM, weights: Mapping[str, float], space: str) -> Certificate:
    """Errors of a module weighed by layer, against its own updates times the factors."""
    if space == "log":
        errors = {
            n: log_error(t, result.tensors[t], [(f, module.name, module.tensors[t])])
            for n, f in weights.items()
            for t in [f"{n}.ia3"]
        }
        return certified(errors, PRODUCT)
    return certified(
        {n: error_of(n, result.tensors, result.config, [module], [f]) for n, f in weights.items()}
    )


def check_patterns(patterns: Sequence[Pattern], layers: Sequence[str], module: str) -> None:
    """Refuse a pattern that matches no layer of the module: a slip, not a wish."""
    for pattern in patterns:
        if not any(pattern.matches(layer) for layer in layers):
            example = f", such as {layers[0]}" if layers else ""
            raise PEMError.build(
                "layers",
                f"no layer of {module} matches",
                found=repr(pattern.text),
                expected=f"one of {len(layers)} layers{example}",
            )


def _scaled(tensor: Tensor, role: str, factor: float, space: str) -> Tensor:
    if role == "lora_A":
        return tensor if space == "delta" else tensor * abs(factor)
    if role == "ia3":
        neutral = RULES[role].neutral
        return (neutral + factor * (tensor.double() - neutral)).to(tensor.dtype)
    return tensor * factor
