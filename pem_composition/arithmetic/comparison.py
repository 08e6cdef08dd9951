"""What modules do to a layer, one by one and in pairs: norms, ranks, angles, signs, cross terms.

Of LoRA everything is computed from factors. Of (IA)^3 the update is l - 1 and of full fine-tuning
theta - theta_0; they have norms, a cosine and signs, but no factors whose spaces could be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import degrees, hypot
from typing import TYPE_CHECKING

from pem_composition.arithmetic.algebra import as_numbers, linear_combination, neutral_of
from pem_composition.arithmetic.compatible import check_compatible, check_linear
from pem_composition.arithmetic.operand import listed
from pem_composition.arithmetic.updates import certificate_of, lora_factors
from pem_composition.errors import IncompatibleModules

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.geometry import Signs, Spectrum
    from pem_composition.arithmetic.operand import Operand
    from pem_composition.arithmetic.terms import Factor


@dataclass(frozen=True)
class LayerProfile:
    """One layer's update: ||dW||_F, and of LoRA its largest singular value and three ranks."""

    norm: float
    spectral_norm: float | None = None
    rank: int | None = None  # numerical
    stable_rank: float | None = None  # ||dW||_F^2 / ||dW||_2^2
    effective_rank: float | None = None  # exp of the entropy of the normalised singular values


@dataclass(frozen=True)
class Profile:
    """A module's update, layer by layer."""

    norm: float  # sqrt(sum of the layers' squares)
    layers: dict[str, LayerProfile] = field(default_factory=dict)


@dataclass(frozen=True)
class Measures:
    """One layer, or all of them, of two updates a and b; None where a measure does not exist."""

    norm_a: float
    norm_b: float
    norm_ratio: float | None  # norm_a / norm_b
    cosine: float | None  # <dW_a, dW_b> / (norm_a norm_b)
    sign_conflict: float | None  # share of the entries of opposite sign
    weighted_sign_conflict: float | None  # the same, entries weighted by |x y|
    column_overlap: float | None = None  # mean squared cosine of the principal angles
    row_overlap: float | None = None
    cross_term_error: float | None = None  # of c_a a + c_b b in parameter space


@dataclass(frozen=True)
class Angles:
    """Principal angles of one layer in degrees, ascending: of column spaces and of row spaces."""

    columns: tuple[float, ...]
    rows: tuple[float, ...]


@dataclass(frozen=True)
class ModulePair:
    """Two modules compared; layers that only one of them adapts count in the total's norms."""

    a: str
    b: str
    coefficients: tuple[float, float]
    total: Measures
    layers: dict[str, Measures]
    angles: dict[str, Angles]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    refused: str | None  # why parameter space does not take the two


@dataclass(frozen=True)
class Comparison:
    """All pairs of some modules, and their whole sum at the given coefficients."""

    coefficients: tuple[float, ...]
    cross_term_error: float | None
    refused: str | None
    pairs: tuple[ModulePair, ...]


@dataclass(frozen=True)
class _Update:
    """One layer of one module: its factors and their SVD (LoRA), or the tensor that is added."""

    terms: Sequence[Factor]
    spectrum: Spectrum | None
    tensor: Tensor | None

    @property
    def norm(self) -> float:
        if self.spectrum is not None:
            return self.spectrum.norm
        assert self.tensor is not None
        return float(self.tensor.norm())


def _updates(module: Operand) -> dict[str, _Update]:
    from pem_composition.arithmetic.geometry import spectrum

    check_linear(module)
    if module.kind == "lora":
        factors = {layer: lora_factors([module], [1.0], layer) for layer in module.layers}
        return {layer: _Update(f, spectrum(f), None) for layer, f in factors.items()}
    neutral = neutral_of(module.kind)
    return {
        name.rpartition(".")[0]: _Update((), None, tensor.double() - neutral)
        for name, tensor in sorted(module.adapter_tensors().items())
    }


def profile(module: Operand) -> Profile:
    """Norms and ranks of every layer's update, in float64."""
    layers = {}
    for layer, update in _updates(module).items():
        s = update.spectrum
        layers[layer] = (
            LayerProfile(s.norm, s.spectral_norm, s.rank, s.stable_rank, s.effective_rank)
            if s is not None
            else LayerProfile(update.norm)
        )
    return Profile(_root_of_squares([p.norm for p in layers.values()]), layers)


def _root_of_squares(values: Sequence[float]) -> float:
    return hypot(*values)


def compare(
    modules: Sequence[Operand],
    coefficients: Sequence[float] | None = None,
    *,
    allow_base_mismatch: bool = False,
) -> Comparison:
    """Every pair of the modules: cosine, subspaces, signs, norms, and cross terms of their sum.

    Args:
        coefficients: of the sum whose cross terms are measured, as given; default 1 / n each. A
            pair is summed with its own two.

    Raises:
        IncompatibleModules: other kinds or bases; ranks, scalings and targets may differ.

    Examples:
        >>> import torch
        >>> from pem_composition import PEM
        >>> from pem_composition.config import IA3Config
        >>> a, b = (PEM({"fc.ia3": torch.tensor([1.0 + x, 1.0 + y])}, IA3Config(("fc",)), name=n)
        ...         for n, x, y in (("a", 1.0, 0.0), ("b", 1.0, 1.0)))
        >>> round(compare([a, b]).pairs[0].total.cosine, 4)  # of the updates l - 1
        0.7071
    """
    modules = listed(modules)
    even = [1.0 / len(modules)] * len(modules) if modules else []
    weights = even if coefficients is None else as_numbers(coefficients)
    if len(modules) < 2 or len(weights) != len(modules):
        raise IncompatibleModules.build(
            "compare",
            "two modules or more, and one coefficient for each",
            found=f"{len(modules)} modules and {len(weights)} coefficients",
        )
    check_compatible(modules, space="delta", allow_base_mismatch=allow_base_mismatch)
    updates = [_updates(m) for m in modules]
    pairs = [
        _pair(
            (modules[i], modules[j]), (weights[i], weights[j]), (updates[i], updates[j]),
            allow_base_mismatch,
        )
        for i in range(len(modules))
        for j in range(i + 1, len(modules))
    ]  # fmt: skip
    error, _, refused = _cross_terms(modules, weights, allow_base_mismatch)
    return Comparison(tuple(weights), error, refused, tuple(pairs))


def projection(module: Operand, start: Operand, end: Operand) -> float | None:
    """How far a composition goes the way that training went, from one module to another,

        <dW - dW_start, dW_end - dW_start> / ||dW_end - dW_start||^2

    over all layers: 0 for the start, 1 for the end, -s for start - s (end - start). None where the
    two are one. The modules are of one kind; what is composed of them has been checked.

    Raises:
        IncompatibleModules: an update that is not linear in its tensors (DoRA).

    Examples:
        >>> import torch
        >>> from pem_composition import PEM
        >>> from pem_composition.config import IA3Config
        >>> a, b, c = (PEM({"fc.ia3": torch.tensor(l)}, IA3Config(("fc",)), name="m")
        ...            for l in ([1.0, 1.0], [1.0, 3.0], [2.0, 0.0]))
        >>> projection(c, a, b)
        -0.5
    """
    from pem_composition.arithmetic.geometry import inner

    for one in (module, start, end):
        check_linear(one)
    along = way = 0.0
    if module.kind == "lora":
        for layer in sorted({layer for one in (module, start, end) for layer in one.layers}):
            gone, whole = (lora_factors([one, start], [1.0, -1.0], layer) for one in (module, end))
            along, way = along + inner(gone, whole), way + inner(whole, whole)
    else:
        neutral = neutral_of(module.kind)
        held = [one.adapter_tensors() for one in (module, start, end)]
        for name in sorted({name for tensors in held for name in tensors}):
            known = next(tensors[name] for tensors in held if name in tensors)
            still = known.new_full(known.shape, neutral)  # of a module without this layer
            at, begin, goal = (tensors.get(name, still).double() for tensors in held)
            along += float(((at - begin) * (goal - begin)).sum())
            way += float((goal - begin).square().sum())
    return along / way if way else None


def _cross_terms(
    modules: Sequence[Operand], coefficients: Sequence[float], allow_base_mismatch: bool
) -> tuple[float | None, dict[str, float], str | None]:
    """The certificate of the paper's sum, total and per layer, or why there is no such sum."""
    try:
        check_compatible(modules, space="parameter", allow_base_mismatch=allow_base_mismatch)
    except IncompatibleModules as error:
        return None, {}, str(error)
    tensors = linear_combination([m.tensors for m in modules], coefficients)
    found = certificate_of(tensors, modules[0].config, modules, coefficients)
    return found.total, dict(found.layers), None


def _pair(
    modules: tuple[Operand, Operand],
    coefficients: tuple[float, float],
    updates: tuple[dict[str, _Update], dict[str, _Update]],
    allow_base_mismatch: bool,
) -> ModulePair:
    a, b = updates
    shared = [layer for layer in a if layer in b]
    for layer in shared:
        _check_shape(layer, a[layer], b[layer])
    error, errors, refused = _cross_terms(modules, coefficients, allow_base_mismatch)
    sums, layers, angles = _Sums(a, b), {}, {}
    for layer in shared:
        measured, found = _layer(a[layer], b[layer], sums)
        layers[layer] = replace(measured, cross_term_error=errors.get(layer))
        if found is not None:
            angles[layer] = found
    return ModulePair(
        modules[0].name,
        modules[1].name,
        coefficients,
        replace(sums.total(), cross_term_error=error),
        layers,
        angles,
        tuple(layer for layer in a if layer not in b),
        tuple(layer for layer in b if layer not in a),
        refused,
    )


class _Sums:
    """What adds up over layers."""

    def __init__(self, a: dict[str, _Update], b: dict[str, _Update]) -> None:
        from pem_composition.arithmetic.geometry import Signs

        self.norms = tuple(_root_of_squares([u.norm for u in x.values()]) for x in (a, b))
        self.inner = 0.0
        self.signs = Signs()
        self.squares = [0.0, 0.0]  # squared cosines of columns and rows
        self.dimensions = [0, 0]

    def total(self) -> Measures:
        overlaps = [
            square / count if count else None
            for square, count in zip(self.squares, self.dimensions, strict=True)
        ]
        return _measures(self.norms[0], self.norms[1], self.inner, self.signs, *overlaps)


def _layer(a: _Update, b: _Update, sums: _Sums) -> tuple[Measures, Angles | None]:
    """Measures of one layer, added to the sums."""
    from pem_composition.arithmetic import geometry

    if a.tensor is not None and b.tensor is not None:
        inner, signs = float((a.tensor * b.tensor).sum()), geometry.tensor_signs(a.tensor, b.tensor)
    else:
        inner, signs = geometry.inner(a.terms, b.terms), geometry.signs(a.terms, b.terms)
    sums.inner += inner
    sums.signs = sums.signs.plus(signs)
    if a.spectrum is None or b.spectrum is None:
        return _measures(a.norm, b.norm, inner, signs), None
    spaces = (
        geometry.principal_angles(a.spectrum.U_OK, b.spectrum.U_OK),
        geometry.principal_angles(a.spectrum.V_IK, b.spectrum.V_IK),
    )
    for place, angles in enumerate(spaces):
        sums.squares[place] += geometry.overlap(angles) * angles.numel()
        sums.dimensions[place] += angles.numel()
    overlaps = [geometry.overlap(x) if x.numel() else None for x in spaces]
    columns, rows = (tuple(degrees(x) for x in angles.tolist()) for angles in spaces)
    return _measures(a.norm, b.norm, inner, signs, *overlaps), Angles(columns, rows)


def _measures(
    norm_a: float,
    norm_b: float,
    inner: float,
    signs: Signs,
    columns: float | None = None,
    rows: float | None = None,
) -> Measures:
    both = norm_a * norm_b
    return Measures(
        norm_a=norm_a,
        norm_b=norm_b,
        norm_ratio=norm_a / norm_b if norm_b else None,
        cosine=max(-1.0, min(1.0, inner / both)) if both else None,
        sign_conflict=signs.conflict if both else None,
        weighted_sign_conflict=signs.weighted_conflict if both else None,
        column_overlap=columns,
        row_overlap=rows,
    )


def _check_shape(layer: str, a: _Update, b: _Update) -> None:
    shapes = [
        tuple(u.tensor.shape)
        if u.tensor is not None
        else (u.terms[0].B_OR.shape[0], u.terms[0].A_RI.shape[1])
        for u in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise IncompatibleModules.build(
            layer,
            "the modules adapt layers of different size here",
            found=f"updates of shape {shapes[0]} and {shapes[1]}",
            expected="one shape",
            do="use one base model's modules",
        )
