"""PEM: one parameter-efficient module as a frozen value, with + - * and str().

Tensor names end in their role: ``roberta.encoder.layer.0.attention.self.query.lora_A``.
A module knows nothing about models or files; ``save`` hands it to the checkpoint layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from pem_composition.arithmetic import head_policies
from pem_composition.arithmetic.algebra import (
    HEAD,
    analogy_weights,
    as_numbers,
    check_request,
    layers_of,
    linear_combination,
    role_of,
)
from pem_composition.arithmetic.algebra import negate as algebra_negate
from pem_composition.arithmetic.compatible import (
    check_coefficients_of,
    check_compatible,
    check_linear,
    check_rank,
    space_of,
)
from pem_composition.arithmetic.labels import expression_of, label_of, method_text, notes_of
from pem_composition.arithmetic.logarithm import log_errors, log_sum
from pem_composition.arithmetic.merging import Written, merge_as
from pem_composition.arithmetic.methods.registry import (
    PEFT_LINEAR,
    REFERENCE_DETOXIFY,
    SIMPLE,
    Choice,
    resolve,
)
from pem_composition.arithmetic.methods.settings import shown
from pem_composition.arithmetic.operand import check_module, listed
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.statistics import Statistics
from pem_composition.arithmetic.statistics import check as check_statistics
from pem_composition.arithmetic.updates import (
    cast,
    certificate_of,
    certified,
    delta_sum,
)
from pem_composition.config import IN_BASE, AdapterConfig, BaseIdentity, Head, LoraConfig
from pem_composition.config import HeadInfo as HeadInfo
from pem_composition.errors import PEMError, listing
from pem_composition.record import (
    OWN_RESULT,
    PRODUCT,
    Certificate,
    Provenance,
    Source,
    Term,
    initialisation_fingerprint,
    leaf,
    record,
)

if TYPE_CHECKING:
    from torch import Tensor

CPU = "cpu"
FORMS = ("exact", "parameter", "reference")  # of a detoxification


@dataclass(frozen=True, eq=False, repr=False)
class PEM:
    """One module: named tensors, what they mean, which base they belong to, how they came to be.

    ``0.3 * a + 0.7 * b`` is the paper's elementwise sum (parameter space); nested sums of one space
    are evaluated as one flat sum over their leaves, so grouping never changes a bit. ``combine``
    offers the exact sum of updates (``space="delta"``) and other merging methods.

    Args:
        tensors: canonical name -> CPU tensor, float32 or float64; the name ends in the role.
        head: what the head tensors (role ``head``) predict; None if there are none.
        heads: further heads, kept beside the module by name; see ``with_head``.

    Examples:
        >>> from pem_composition.config import LoraConfig
        >>> import torch
        >>> config = LoraConfig(r=1, alpha=1, target_modules=("fc",))
        >>> factors = {"fc.lora_A": torch.ones(1, 2), "fc.lora_B": torch.ones(3, 1)}
        >>> a = PEM(factors, config, name="a")
        >>> a
        <PEM a: lora r=1, 1 layers>
        >>> print(0.3 * a + 0.7 * a)
        +0.3*a +0.7*a
        >>> (2 * a).tensors["fc.lora_B"].flatten().tolist()
        [2.0, 2.0, 2.0]
    """

    tensors: Mapping[str, Tensor]
    config: AdapterConfig
    base: BaseIdentity = BaseIdentity()
    name: str = "module"
    head: HeadInfo | None = None
    provenance: Provenance = Provenance()
    operands: tuple[tuple[float, PEM], ...] = ()
    heads: Mapping[str, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, MappingProxyType):  # one that is read-only stays as it is
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
        return layers_of(self.tensors)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the tensors that take part in sums, without reading any."""
        return tuple(n for n in self.tensors if role_of(n) != HEAD)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The tensors that take part in sums: everything but the head."""
        return {n: self.tensors[n] for n in self.adapter_names}

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names in the model of the head parameters, without reading any."""
        return tuple(n.removesuffix(f".{HEAD}") for n in self.tensors if role_of(n) == HEAD)

    def head_tensors(self) -> dict[str, Tensor]:
        """Head parameters by their name in the model (without the ``.head`` role)."""
        return {n: self.tensors[f"{n}.{HEAD}"] for n in self.head_names}

    def with_head(self, name: str) -> PEM:
        """The module with one of the heads beside it, or a part of a concatenated one, as its own.

        Raises:
            PEMError: no head of that name; says which there are.

        Examples:
            >>> from pem_composition.config import Head, HeadInfo, IA3Config
            >>> import torch
            >>> vector, weight = torch.ones(3), torch.zeros(2, 3)
            >>> rte = Head({"classifier.weight": weight}, HeadInfo(("yes", "no")))
            >>> m = PEM({"fc.ia3": vector}, IA3Config(("fc",)), name="m", heads={"rte": rte})
            >>> m.with_head("rte").head.labels
            ('yes', 'no')
        """
        return with_head(self, name)

    def save(
        self,
        path: str | PathLike[str],
        *,
        format: str = "peft",
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the module as a directory that plain PEFT opens; see ``checkpoint.save``.

        Examples:
            >>> import pem_composition, tempfile, torch
            >>> from pem_composition.config import IA3Config
            >>> m = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, IA3Config(("fc",)), name="m")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     m.save(f"{folder}/m")
            ...     pem_composition.load(f"{folder}/m").tensors["fc.ia3"].tolist()
            [1.0, 2.0]
        """
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

    def __repr__(self) -> str:
        """One line for a prompt: name, kind, size, base; the expression is ``str``."""
        rank = f" r={self.config.r}" if isinstance(self.config, LoraConfig) else ""
        base = f" of {self.base.name}" if self.base.name else ""
        return f"<PEM {self.name}: {self.kind}{rank}, {len(self.layers)} layers{base}>"

    def __str__(self) -> str:
        """The expression it was made by, in its own space; ``expression.parse`` reads it back."""
        return expression_of(self.provenance) or self.name


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def combine(
    modules: Sequence[PEM],
    coefficients: Sequence[float],
    *,
    space: str | None = None,
    method: str = SIMPLE,
    settings: Mapping[str, object] | None = None,
    rank: Rank | None = None,
    head: str = "average",
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    certify: bool = True,
    statistics: Sequence[Statistics] = (),
    compared: bool = False,
    device: str = CPU,
) -> PEM:
    """sum_i c_i m_i, coefficients as given; or another merging method on the updates c_i dW_i.

    ``space="parameter"``: the paper's sum on the module's own tensors, e + sum_i w_i (t_i - e)
    with w_i = c_i, or |c_i| for lora_A. ``space="delta"``: the exact sum of the updates
    dW = sum_i c_i dW_i, for LoRA by concatenating scaled factors (rank = sum of ranks) or, with
    ``rank=R``, its best rank-R approximation, ``rank=0.95`` the smallest rank by layer that keeps
    95 % of the update's energy (sum of squared singular values); ranks, alphas, rsLoRA and targets
    may differ.
    ``space="log"``: (IA)^3 only, the product of the vectors, prod_i l_i^(c_i), for l > 0; see
    ``arithmetic.logarithm``.

    Args:
        space: default: parameter for the sum; any other method has one space of its own.
        method: a name of ``arithmetic.methods.registry``, such as "ties".
        settings: its keywords, such as {"density": 0.2}.
        head: average (weights |c_i| / sum |c_j|), first, last, none, error if the heads differ,
            per-task (each kept by its module's name) or concat (one head over all labels).
        dtype: float32 | bfloat16 | float16 | float64; tensors are rounded to it, and the
            certificate is that of the rounded result; float64 is computed in float64. Default: as
            loaded (float32 or float64).
        certify: compute the relative error of the result, see ``Certificate``.
        statistics: of each module, for the methods that need them ("fisher", "regmean"); see
            ``checkpoint.statistics.read``.
        compared: ``check_compatible`` has taken the modules already, by their headers.
        device: where it is computed, such as "cuda" (in float64, as on the CPU: results are equal
            to rounding); methods with ``statistics`` compute on the CPU. The result is on the CPU.

    Raises:
        IncompatibleModules: kinds, bases, or (parameter space) ranks, scalings or targets differ;
            or (log space) a kind other than (IA)^3.
        PEMError: wrong space, method, setting, rank, coefficient or device; (log) an entry that is
            not > 0.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> config = IA3Config(("fc",))
        >>> a = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, config, name="a")
        >>> b = PEM({"fc.ia3": torch.tensor([3.0, 1.0])}, config, name="b")
        >>> m = combine([a, b], [0.5, 0.5])  # 1 + 0.5 (a - 1) + 0.5 (b - 1)
        >>> print(m, m.tensors["fc.ia3"].tolist())
        +0.5*a +0.5*b [2.0, 1.5]
        >>> ties = combine([a, b], [1.0, 1.0], method="ties", settings={"density": 0.5})
        >>> ties.provenance.space
        'delta'
    """
    modules, coefficients = listed(modules), as_numbers(coefficients)
    check_request(modules, coefficients)
    choice = resolve(method, settings, modules[0].kind)
    check_coefficients_of(choice, coefficients)
    space = space_of(choice, space)
    check_rank(rank, space, choice, modules[0].kind)
    if not compared:
        check_compatible(
            modules,
            space="delta" if choice.method == PEFT_LINEAR else space,
            allow_base_mismatch=allow_base_mismatch,
        )
    flat = choice.method == SIMPLE and head == "average"
    if flat:
        modules, coefficients = _flatten(modules, coefficients, space)
    check_statistics(choice.entry.needs, choice.method, modules, statistics)
    device = CPU if choice.entry.needs else device
    exact = [in_dtype(m, dtype) for m in modules]
    with computing_on(device):
        if device != CPU:
            exact = [_mapped(m, lambda t: t.to(device)) for m in exact]
        tensors, config, certifier = _combined(
            exact, coefficients, choice, space, rank, dtype, statistics, certify
        )
        chosen = head_policies.choose(exact, coefficients, head, dtype)
        result = PEM(
            tensors=tensors | cast(_as_roles(chosen.tensors), dtype),
            config=_saving(config, modules, chosen.tensors),
            base=BaseIdentity().completed(*(m.base for m in modules)),
            name="combination",
            head=chosen.info,
            heads={n: _cast_head(h, dtype) for n, h in chosen.beside.items()},
            operands=tuple(zip(coefficients, modules, strict=True))
            if flat and dtype is None and rank is None
            else (),
        )
        certificate = certifier(result).covering(chosen.saved) if certify else None
    if device != CPU:
        result = _mapped(result, lambda t: t.cpu())
    terms = tuple(Term(c, label_of(m, space)) for c, m in zip(coefficients, modules, strict=True))
    provenance = _provenance(modules, terms, space, method_text(choice, rank), head)
    recipe = None
    if not choice.entry.needs:  # statistics come from files that no recipe names
        recipe = record(
            "combine", modules, coefficients=coefficients, space=space, method=choice.method,
            settings=choice.as_dict(), rank=rank, head=head, dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
        )  # fmt: skip
    notes = (*provenance.notes, *chosen.notes)
    provenance = replace(provenance, certificate=certificate, recipe=recipe, notes=notes)
    return replace(result, provenance=provenance)


def with_chosen(
    module: PEM, tensors: dict[str, Tensor], chosen: head_policies.ChosenHead, dtype: str | None
) -> PEM:
    """A combination of one module: other tensors, and the head that a policy chose."""
    return replace(
        module,
        tensors=tensors | cast(_as_roles(chosen.tensors), dtype),
        config=_saving(module.config, [module], chosen.tensors),
        name="combination",
        head=chosen.info,
        heads={n: _cast_head(h, dtype) for n, h in chosen.beside.items()},
        operands=(),
    )


def _combined(
    modules: Sequence[PEM],
    coefficients: Sequence[float],
    choice: Choice,
    space: str,
    rank: Rank | None,
    dtype: str | None,
    statistics: Sequence[Statistics],
    certify: bool,
) -> tuple[dict[str, Tensor], AdapterConfig, Callable[[PEM], Certificate]]:
    """Tensors without heads, rounded, their config, and what certifies the result."""
    if choice.entry.needs or (choice.method != SIMPLE and space == "delta"):
        from pem_composition.arithmetic import informed, method_sums

        out = Written(dtype, certify)
        config = (
            informed.merge_informed(modules, coefficients, choice, statistics, rank, out)
            if choice.entry.needs
            else method_sums.merge(modules, coefficients, choice, rank, out)
        )
        return out.tensors, config, lambda m: certified(out.errors, OWN_RESULT)
    weights = list(coefficients)
    if choice.method != SIMPLE:
        tensors, config, weights = merge_as(modules, coefficients, choice)
        tensors = cast(tensors, dtype)
    elif space == "log":
        tensors, config = log_sum(modules, coefficients)
        return (
            cast(tensors, dtype),
            config,
            lambda m: certified(log_errors(m, modules, weights), PRODUCT),
        )
    elif space == "parameter":
        tensors = cast(linear_combination([m.tensors for m in modules], coefficients), dtype)
        config = modules[0].config
    else:  # rounded layer by layer
        tensors, config = delta_sum(modules, coefficients, rank, dtype)
    return tensors, config, lambda m: certificate_of(m.tensors, m.config, modules, weights)


def in_dtype(module: PEM, dtype: str | None) -> PEM:
    """The module to compute with where a dtype is written: in float64 for that one."""
    if dtype != "float64":
        return module
    return _mapped(module, lambda t: t.double())


def rounded(module: PEM, dtype: str | None) -> PEM:
    """The module with the values that a file of this dtype holds, and with their certificate.

    A flat sum is certified anew against its operands. Of another result, and of parts saved whole,
    the errors of what rounding changes become unknown; ``combine(dtype=...)`` knows more of them.
    """
    origin = module.provenance
    changed = {
        n.rpartition(".")[0] for n, t in module.tensors.items() if not head_policies.holds(t, dtype)
    }
    if origin.certificate is None or not changed:
        return module
    known = origin.certificate.layers
    result = replace(module, tensors=cast(module.tensors, dtype), operands=())
    errors = {n: math.inf if n in changed else e for n, e in known.items()}
    certificate = Certificate(math.inf, errors, origin.certificate.against)
    if module.operands:
        modules, weights = [m for _, m in module.operands], [c for c, _ in module.operands]
        if origin.space == "log":
            certificate = certified(log_errors(result, modules, weights), PRODUCT)
        else:
            certificate = certificate_of(result.tensors, result.config, modules, weights)
        saved = {n: math.isfinite(e) for n, e in errors.items() if n not in module.layers}
        certificate = certificate.covering(saved)
    lost = [n for n, e in certificate.layers.items() if math.isinf(e) and math.isfinite(known[n])]
    notes = (f"rounded to {dtype} when saved: errors unknown: {listing(lost, 4)}",) if lost else ()
    provenance = replace(origin, certificate=certificate, notes=(*origin.notes, *notes))
    return replace(result, provenance=provenance)


def _mapped(module: PEM, change: Callable[[Tensor], Tensor]) -> PEM:
    """The module with every tensor changed."""
    heads = {
        name: replace(head, tensors={n: change(t) for n, t in head.tensors.items()})
        for name, head in module.heads.items()
    }
    return replace(module, tensors={n: change(t) for n, t in module.tensors.items()}, heads=heads)


@contextmanager
def computing_on(device: str) -> Iterator[None]:
    """New tensors are made on the device.

    Raises:
        PEMError: torch has no such device here, or none that computes in float64.
    """
    if device == CPU:
        yield
        return
    import torch

    try:
        with torch.device(device):
            float(torch.ones(1, dtype=torch.float64))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PEMError.build(
            "device", f"torch cannot compute in float64 there: {reason}", found=device,
            expected="cpu, or cuda on a machine that has one",
        ) from error  # fmt: skip
    with torch.device(device):
        yield


def negate(module: PEM, strength: float = 1.0, *, dtype: str | None = None) -> PEM:
    """Reverse the module's effect, dW -> -strength dW: {A, -s B}, 1 - s (l - 1), -s delta.

    Linear in the strength, unlike ``-s * module``, whose two factors both carry s. The head and
    parameters of the base that are saved whole are left as they are; a note names the latter.

    Args:
        dtype: as for ``combine``.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> config = IA3Config(("fc",))
        >>> m = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, config, name="m")
        >>> negate(m, 0.5).tensors["fc.ia3"].tolist()
        [1.0, 0.5]
    """
    check_module("module", module)
    (strength,) = as_numbers([strength], "strength")
    check_linear(module)
    settings = {"strength": strength} | ({} if dtype is None else {"dtype": dtype})
    exact = in_dtype(module, dtype)
    tensors = algebra_negate(exact.adapter_tensors(), strength)
    kept = head_policies.choose([exact], [-strength], "first", dtype)
    tensors = cast(tensors | _as_roles(kept.tensors), dtype)
    heads = {n: _cast_head(h, dtype) for n, h in exact.heads.items()}
    result = PEM(tensors, module.config, module.base, "negation", module.head, heads=heads)
    term = Term(1.0, f"negate({_inner(module)}, {shown(strength)})")
    provenance = _provenance([module], (term,), "parameter", "negation", None)
    certificate = certificate_of(result.tensors, result.config, [module], [-strength])
    provenance = replace(
        provenance,
        certificate=certificate.covering(kept.saved),
        recipe=record("negate", [module], **settings),
        notes=(*provenance.notes, *kept.notes),
    )
    return replace(result, provenance=provenance)


def _inner(module: PEM) -> str:
    """What stands for a module in parameter space where parentheses stand around it already."""
    text = label_of(module, "parameter")
    return text[1:-1] if text == f"({module})" else text


def with_head(module: PEM, name: str) -> PEM:
    """``module.with_head(name)``; no other head is left."""
    chosen = head_policies.select(module, name)
    saved = head_policies.saved_parts(module)
    tensors = module.adapter_tensors() | _as_roles({**saved, **chosen.tensors})
    provenance = replace(module.provenance, recipe=record("with_head", [module], name=name))
    return replace(
        module, tensors=tensors, head=chosen.info, heads={}, operands=(), provenance=provenance
    )


def _saving(config: AdapterConfig, modules: Sequence[PEM], kept: Collection[str]) -> AdapterConfig:
    """The config that lists what any of the modules saves whole, as far as all of it is kept."""
    extra = dict(config.extra)
    for key in ("modules_to_save", IN_BASE):
        words = (
            word
            for m in modules
            for word in m.config.extra.get(key) or ()
            if all(n in kept for n in head_policies.saved_parts(m) if f"{word}." in f"{n}.")
        )
        if found := tuple(dict.fromkeys(words)):
            extra[key] = found
        else:
            extra.pop(key, None)
    return config if extra == config.extra else replace(config, extra=extra)


def _as_roles(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{n}.{HEAD}": t for n, t in head.items()}


def _cast_head(head: Head, dtype: str | None) -> Head:
    tensors = cast(_as_roles(head.tensors), dtype)
    return Head({n.removesuffix(f".{HEAD}"): t for n, t in tensors.items()}, head.info)


def analogy(
    classifier: PEM, target_lm: PEM, source_lm: PEM, coefficient: float = 0.5, **options: Any
) -> PEM:
    """lam * classifier + (1 - lam) * (target_lm - source_lm); options as for ``combine``.

    Language models have no head of a task, so their average is the classifier's; ``head="first"``
    keeps it where they have one. Source: section 3.3 of arXiv:2306.14870.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> config = IA3Config(("fc",))
        >>> x, y, z = (PEM({"fc.ia3": torch.tensor([v])}, config, name=n)
        ...            for n, v in (("classifier", 3.0), ("target", 2.0), ("source", 1.0)))
        >>> moved = analogy(x, y, z, 0.5)  # 1 + 0.5 (3 - 1) + 0.5 (2 - 1)
        >>> print(moved, moved.tensors["fc.ia3"].tolist())
        +0.5*classifier +0.5*target -0.5*source [2.5]
    """
    (coefficient,) = as_numbers([coefficient])
    weights = analogy_weights(coefficient)
    return combine([classifier, target_lm, source_lm], weights, **options)


def detoxify(
    module: PEM,
    toxic: PEM,
    strength: float = 1.0,
    *,
    form: str = "exact",
    rank: Rank | None = None,
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    certify: bool = True,
    compared: bool = False,
) -> PEM:
    """Take out of a module what training on toxic data put into ``toxic``, which started from it.

    ``form="exact"``: a - lam (toxic - a) of the updates themselves, in delta space,

        dW = (1 + lam) dW_a - lam dW_toxic

    exact at rank r_a + r_toxic, or its best approximation of rank (or share) ``rank``. The other
    two are sums of factors, "a + lam (a - toxic)", and other updates:

    ``form="parameter"``: the paper's sum, the sign on B,

        A = A_a + lam (A_a + A_toxic),  B = B_a + lam (B_a - B_toxic)

    ``form="reference"``: as the code behind the paper forms it (LoRA only), the sign on A,

        A = A_a + lam (A_a - A_toxic),  B = B_a + lam (B_a + B_toxic)

    With A_toxic = A_a + dA and B_toxic = B_a + dB, at first order in dA and dB, k = 1 + 2 lam:

        exact      B_a A_a - lam B_a dA - lam dB A_a
        parameter  k B_a A_a + lam B_a dA - k lam dB A_a
        reference  k B_a A_a - k lam B_a dA + lam dB A_a

    So both amplify the module, and take off only what training moved in one of the factors; what it
    moved in the other one they add. The certificate is the distance from the exact form. The
    module's head is kept.

    Raises:
        IncompatibleModules: kinds or bases differ; in sums of factors also ranks or targets.
        PEMError: unknown form, a rank for a sum of factors, the reference's without LoRA factors.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> config = IA3Config(("fc",))
        >>> a = PEM({"fc.ia3": torch.tensor([2.0])}, config, name="a")
        >>> toxic = PEM({"fc.ia3": torch.tensor([3.0])}, config, name="toxic")
        >>> clean = detoxify(a, toxic, 0.5)  # a - 0.5 (toxic - a)
        >>> print(clean, clean.tensors["fc.ia3"].tolist())
        +1.5*a -0.5*toxic [1.5]
    """
    (strength,) = as_numbers([strength], "strength")
    if form not in FORMS:
        raise PEMError.build("form", "unknown", found=repr(form), expected=" or ".join(FORMS))
    if rank is not None and form != "exact":
        raise PEMError.build("rank", f"the {form} form keeps the modules' own", do="leave it out")
    return combine(
        [module, toxic], [1.0 + strength, -strength],
        space="delta" if form == "exact" else "parameter",
        method=REFERENCE_DETOXIFY if form == "reference" else SIMPLE, rank=rank, head="first",
        dtype=dtype, allow_base_mismatch=allow_base_mismatch, certify=certify, compared=compared,
    )  # fmt: skip


def _flatten(
    modules: Sequence[PEM], coefficients: Sequence[float], space: str
) -> tuple[list[PEM], list[float]]:
    """Replace each sum of this space by its own terms: c * sum_j k_j m_j = sum_j (c k_j) m_j."""
    flat: list[tuple[float, PEM]] = []
    for c, m in zip(coefficients, modules, strict=True):
        own = m.operands if m.provenance.space == space else ()
        flat += [(c * k, leaf) for k, leaf in own] or [(c, m)]
    return [m for _, m in flat], [c for c, _ in flat]


def _provenance(
    modules: Sequence[PEM], terms: tuple[Term, ...], space: str, method: str, head: str | None
) -> Provenance:
    sources: dict[Source, None] = {}
    for m in modules:
        composed = m.provenance.space is not None
        sources |= dict.fromkeys(m.provenance.sources if composed else (leaf(m),))
    inits = _beginnings(modules, {s.init for s in sources})
    known = sorted(i for i in inits if i)
    notes = list(dict.fromkeys(note for m in modules for note in notes_of(m)))
    if len(known) > 1:
        notes.append(
            "the modules start from different initialisations ("
            + ", ".join(i[:12] for i in known)
            + "), heads counted: where their lora_A differ, parameter space has factors that are "
            "not aligned"
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


def _beginnings(modules: Sequence[PEM], inits: set[str | None]) -> set[str | None]:
    """Initial fingerprints, where a module's that was trained from another one of them is its own.

    Such a module's initial fingerprint is that of the other one's tensors.
    """
    if len(inits) < 2:
        return inits
    before = {initialisation_fingerprint(m.tensors): m.provenance.init for m in modules}

    def first(init: str | None) -> str | None:
        seen: set[str | None] = {None}
        while init not in seen and before.get(str(init)) is not None:
            seen.add(init)
            init = before[str(init)]
        return init

    return {first(init) for init in inits}
