"""PEM: one parameter-efficient module as a frozen value, with + - * and str().

Tensor names end in their role: ``roberta.encoder.layer.0.attention.self.query.lora_A``.
A module knows nothing about models or files; ``save`` hands it to the checkpoint layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from pem_composition.arithmetic.algebra import (
    HEAD,
    as_numbers,
    average_heads,
    linear_combination,
    role_of,
)
from pem_composition.arithmetic.algebra import negate as algebra_negate
from pem_composition.arithmetic.compatible import check_compatible
from pem_composition.arithmetic.updates import cast, certificate_of, delta_sum
from pem_composition.config import AdapterConfig, BaseIdentity
from pem_composition.errors import IncompatibleModules, PEMError

if TYPE_CHECKING:
    from torch import Tensor

SPACES = ("parameter", "delta")
HEAD_POLICIES = ("average", "first", "last", "none", "error")


@dataclass(frozen=True)
class Source:
    """One file-backed input of a composition: where it came from and what it held."""

    name: str
    path: str | None = None
    sha256: str | None = None  # of the adapter weights file; of the index for a sharded checkpoint
    init: str | None = None  # fingerprint of the initial module it was trained from


@dataclass(frozen=True)
class Term:
    """coefficient * label, where the label names a module or a compound that is not a plain sum."""

    coefficient: float
    label: str


@dataclass(frozen=True)
class Certificate:
    """Relative Frobenius error of the update against sum_i c_i dW_i, per layer and in total."""

    total: float
    layers: Mapping[str, float]


@dataclass(frozen=True)
class Provenance:
    """How a module came to be; everything that pem.json holds beyond the tensors."""

    terms: tuple[Term, ...] = ()
    sources: tuple[Source, ...] = ()
    space: str | None = None  # None for a module that was trained or loaded, else parameter | delta
    method: str | None = None
    certificate: Certificate | None = None
    init: str | None = (
        None  # initialisation fingerprint shared by all inputs, None if unknown or mixed
    )
    head_policy: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadInfo:
    """What a head predicts: label names by index (classification) or nothing (regression, LM)."""

    labels: tuple[str, ...] = ()
    problem: str | None = None  # classification | regression | causal_lm | seq2seq_lm
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PEM:
    """One module: named tensors, what they mean, which base they belong to, how they came to be.

    ``0.3 * a + 0.7 * b`` is the paper's elementwise sum (parameter space); a nested expression is
    evaluated as one flat sum over its leaves, so grouping never changes a bit. ``combine`` offers
    the exact sum of updates (``space="delta"``).

    Args:
        tensors: canonical name -> CPU tensor, float32 or float64; the name ends in the role.
        head: what the head tensors (role ``head``) predict; None if there are none.
    """

    tensors: Mapping[str, Tensor]
    config: AdapterConfig
    base: BaseIdentity = BaseIdentity()
    name: str = "module"
    head: HeadInfo | None = None
    provenance: Provenance = Provenance()
    operands: tuple[tuple[float, PEM], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __getstate__(self) -> dict[str, Any]:
        """A read-only mapping can be neither copied nor pickled; its dict can."""
        return self.__dict__ | {"tensors": dict(self.tensors)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"tensors": MappingProxyType(state["tensors"])})

    @property
    def kind(self) -> str:
        """lora, ia3 or full."""
        return self.config.kind

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers (of the changed parameters for full), sorted."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.adapter_tensors()}))

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The tensors that take part in sums: everything but the head."""
        return {n: t for n, t in self.tensors.items() if role_of(n) != HEAD}

    def head_tensors(self) -> dict[str, Tensor]:
        """Head parameters by their name in the model (without the ``.head`` role)."""
        return {n.removesuffix(".head"): t for n, t in self.tensors.items() if role_of(n) == HEAD}

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: str = "peft",
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the module as a directory that plain PEFT opens; see ``checkpoint.save``."""
        from pem_composition import checkpoint  # the layer above; only this convenience reaches up

        checkpoint.save(self, path, format=format, dtype=dtype, overwrite=overwrite)

    def __add__(self, other: object) -> PEM:
        return combine([self, other], [1.0, 1.0]) if isinstance(other, PEM) else NotImplemented

    def __sub__(self, other: object) -> PEM:
        return combine([self, other], [1.0, -1.0]) if isinstance(other, PEM) else NotImplemented

    def __neg__(self) -> PEM:
        return combine([self], [-1.0])

    def __mul__(self, coefficient: object) -> PEM:
        return combine([self], [coefficient]) if _is_number(coefficient) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> PEM:
        if not _is_number(divisor):
            return NotImplemented
        if divisor == 0:
            raise PEMError.build(self.name, "division of a module by zero")
        return combine([self], [1.0 / divisor])

    def __str__(self) -> str:
        terms = self.provenance.terms
        return " ".join(f"{t.coefficient:+g}*{t.label}" for t in terms) if terms else self.name


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def combine(
    modules: Sequence[PEM],
    coefficients: Sequence[float],
    *,
    space: str = "parameter",
    rank: int | None = None,
    head: str = "average",
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    certify: bool = True,
) -> PEM:
    """sum_i c_i m_i, coefficients as given.

    ``space="parameter"``: the paper's sum on the module's own tensors, e + sum_i w_i (t_i - e)
    with w_i = c_i, or |c_i| for lora_A. ``space="delta"``: the exact sum of the updates
    dW = sum_i c_i dW_i, for LoRA by concatenating scaled factors (rank = sum of ranks) or, with
    ``rank=R``, its best rank-R approximation; ranks, alphas, rsLoRA and targets may differ.

    Args:
        head: average (weights |c_i| / sum |c_j|), first, last, none, or error if the heads differ.
        dtype: float32 | bfloat16 | float16 | float64; tensors are rounded to it, and the
            certificate is that of the rounded result. Default: as loaded (float32 or float64).
        certify: compute the relative error of the result against the exact sum of updates.

    Raises:
        IncompatibleModules: kinds, bases, or (parameter space) ranks, scalings or targets differ.
        PEMError: wrong space, rank or coefficient.
    """
    modules, coefficients = list(modules), as_numbers(coefficients)
    _check_request(modules, coefficients, space, rank)
    check_compatible(modules, space=space, allow_base_mismatch=allow_base_mismatch)
    if space == "parameter" and head == "average":
        modules, coefficients = _flatten(modules, coefficients)
    if space == "parameter":
        tensors = linear_combination([m.adapter_tensors() for m in modules], coefficients)
        config = modules[0].config
    else:
        tensors, config = delta_sum(modules, coefficients, rank)
    tensors |= {f"{n}.{HEAD}": t for n, t in _choose_head(modules, coefficients, head).items()}
    result = PEM(
        tensors=cast(tensors, dtype),
        config=config,
        base=_common_base(modules),
        name="combination",
        head=_choose_head_info(modules, head),
        operands=tuple(zip(coefficients, modules, strict=True))
        if space == "parameter" and head == "average" and dtype is None
        else (),
    )
    terms = tuple(Term(c, _label(m)) for c, m in zip(coefficients, modules, strict=True))
    certificate = Certificate(*certificate_of(result, modules, coefficients)) if certify else None
    provenance = _provenance(
        modules, terms, space, "sum" if rank is None else f"sum, rank {rank}", head
    )
    notes = (*provenance.notes, *_head_notes(modules, head))
    return replace(result, provenance=replace(provenance, certificate=certificate, notes=notes))


def negate(module: PEM, strength: float = 1.0) -> PEM:
    """Reverse the module's effect, dW -> -strength dW: {A, -s B}, 1 - s (l - 1), -s delta.

    Linear in the strength, unlike ``-s * module``, whose two factors both carry s. The head is
    left as it is.
    """
    (strength,) = as_numbers([strength], "strength")
    tensors = algebra_negate(module.adapter_tensors(), strength)
    tensors |= {n: t for n, t in module.tensors.items() if role_of(n) == HEAD}
    result = PEM(tensors, module.config, module.base, "negation", module.head)
    term = Term(1.0, f"negate({module}, {strength:g})")
    provenance = _provenance([module], (term,), "parameter", "negation", None)
    certificate = Certificate(*certificate_of(result, [module], [-strength]))
    return replace(result, provenance=replace(provenance, certificate=certificate))


def analogy(
    classifier: PEM, target_lm: PEM, source_lm: PEM, coefficient: float = 0.5, **options: Any
) -> PEM:
    """lam * classifier + (1 - lam) * (target_lm - source_lm); options as for ``combine``.

    Keeps the classifier's head unless told otherwise. Source: section 3.3 of arXiv:2306.14870.
    """
    rest = 1.0 - coefficient
    return combine(
        [classifier, target_lm, source_lm],
        [coefficient, rest, -rest],
        **{"head": "first", **options},
    )


def _check_request(
    modules: Sequence[PEM], coefficients: Sequence[float], space: str, rank: int | None
) -> None:
    if not modules or len(modules) != len(coefficients):
        raise IncompatibleModules.build(
            "coefficients",
            "one coefficient per module is needed",
            found=f"{len(coefficients)} coefficients for {len(modules)} modules",
            do="give as many coefficients as modules",
        )
    if space not in SPACES:
        raise PEMError.build(
            "space", "unknown space", found=repr(space), expected=" or ".join(SPACES)
        )
    if rank is not None and space != "delta":
        raise PEMError.build(
            "rank",
            "a rank applies to delta space only",
            found=f"space {space}",
            do="add --space delta",
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise PEMError.build("rank", "not a rank", found=rank, expected="a whole number >= 1")
    if rank is not None and modules[0].kind != "lora":
        raise PEMError.build(
            "rank",
            "only LoRA modules have a rank",
            found=f"kind {modules[0].kind}",
            do="leave --rank out",
        )


def _flatten(
    modules: Sequence[PEM], coefficients: Sequence[float]
) -> tuple[list[PEM], list[float]]:
    """Replace each sum by its own terms: c * sum_j k_j m_j = sum_j (c k_j) m_j."""
    flat: list[tuple[float, PEM]] = []
    for c, m in zip(coefficients, modules, strict=True):
        flat += [(c * k, leaf) for k, leaf in m.operands] or [(c, m)]
    return [m for _, m in flat], [c for c, _ in flat]


def _label(module: PEM) -> str:
    terms = module.provenance.terms
    if module.provenance.space is None or not terms:
        return module.name
    if len(terms) == 1 and terms[0].coefficient == 1.0:
        return terms[0].label
    return f"{'delta' if module.provenance.space == 'delta' else ''}({module})"


def _provenance(
    modules: Sequence[PEM], terms: tuple[Term, ...], space: str, method: str, head: str | None
) -> Provenance:
    sources: dict[Source, None] = {}
    for m in modules:
        own = Source(m.name, init=m.provenance.init)
        sources |= dict.fromkeys(m.provenance.sources or (own,))
    inits = {s.init for s in sources}
    known = sorted(i for i in inits if i)
    notes = list(dict.fromkeys(note for m in modules for note in m.provenance.notes))
    if len(known) > 1:
        notes.append(
            "the modules start from different initialisations ("
            + ", ".join(i[:12] for i in known)
            + "): in parameter space their factors are not aligned"
        )
    return Provenance(
        terms=terms,
        sources=tuple(sources),
        space=space,
        method=method,
        init=known[0] if len(inits) == 1 and known else None,
        head_policy=head,
        notes=tuple(notes),
    )


def _choose_head(
    modules: Sequence[PEM], coefficients: Sequence[float], policy: str
) -> dict[str, Tensor]:
    if policy not in HEAD_POLICIES:
        raise PEMError.build(
            "head", "unknown policy", found=repr(policy), expected=", ".join(HEAD_POLICIES)
        )
    weighted = [(m.head_tensors(), c) for m, c in zip(modules, coefficients, strict=True)]
    heads = [(h, c) for h, c in weighted if h]
    if not heads or policy == "none":
        return {}
    if policy == "average":
        return average_heads([h for h, _ in heads], [c for _, c in heads])
    if policy == "error":
        first = heads[0][0]
        if any(
            h.keys() != first.keys() or any(not h[n].equal(first[n]) for n in h) for h, _ in heads
        ):
            raise IncompatibleModules.build(
                "head",
                "the heads differ",
                found=f"{len(heads)} heads",
                expected="equal heads",
                do="choose --head average, first, last or none",
            )
    return weighted[-1 if policy == "last" else 0][0] or heads[-1 if policy == "last" else 0][0]


def _head_notes(modules: Sequence[PEM], policy: str) -> list[str]:
    """Where the head is not what its policy's name promises."""
    holders = [m for m in modules if m.head_tensors()]
    answers = dict.fromkeys(m.head.labels for m in holders if m.head and m.head.labels)
    if policy == "average" and len(answers) > 1:
        classes = "; ".join(" ".join(labels) for labels in answers)
        return [f"the averaged heads answer different classes ({classes})"]
    at = -1 if policy == "last" else 0
    if policy in ("first", "last") and holders and modules[at] not in holders:
        return [f"{modules[at].name} has no head: that of {holders[at].name} is kept"]
    return []


def _choose_head_info(modules: Sequence[PEM], policy: str) -> HeadInfo | None:
    infos = [m.head for m in modules if m.head is not None]
    if policy == "none" or not infos:
        return None
    return infos[-1 if policy == "last" else 0]


def _common_base(modules: Sequence[PEM]) -> BaseIdentity:
    def first(attribute: str) -> Any:
        return next((v for m in modules if (v := getattr(m.base, attribute)) is not None), None)

    return BaseIdentity(*(first(f.name) for f in fields(BaseIdentity)))
