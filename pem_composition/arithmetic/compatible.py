"""Which modules can be combined, and the message that says why two cannot. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from pem_composition.arithmetic.algebra import USE_DELTA
from pem_composition.arithmetic.methods.registry import SIMPLE, Choice
from pem_composition.arithmetic.ranks import Rank, checked, is_share
from pem_composition.config import AdapterConfig, BaseIdentity, FullConfig, IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError

if TYPE_CHECKING:
    from pem_composition.arithmetic.operand import Described

SPACES = ("parameter", "delta", "log")
LOG_REMEDY = "use another space (--space parameter or delta)"


@dataclass(frozen=True)
class BaseModel:
    """A base model in the role of a module, to be compared with one."""

    name: str
    base: BaseIdentity
    kind: str = "full"
    config: AdapterConfig = FullConfig()
    layers: tuple[str, ...] = ()


def check_compatible(
    modules: Sequence[Described],
    *,
    space: str,
    allow_base_mismatch: bool = False,
    exact: str = USE_DELTA,
) -> None:
    """Refuse modules of different kind or base, or that name one layer in two ways; in parameter
    space also other layers, rank or scaling, in log space anything but (IA)^3; and DoRA in any.

    Args:
        exact: how the exact sum is asked for, which takes other layers, ranks and scalings.

    Raises:
        IncompatibleModules: names both modules, both values and the remedy.
    """
    if space == "log":
        check_log_kind(modules)
    for module in modules:
        check_linear(module)
    check_spellings(modules)
    first = modules[0]
    for other in modules[1:]:
        if first.kind != other.kind:
            raise _differ(
                first, other, "kind", first.kind, other.kind, "combine modules of one kind"
            )
        if not allow_base_mismatch:
            check_same_base(first, other)
        if isinstance(first.config, IA3Config) and isinstance(other.config, IA3Config):
            _check_placement(first, other)
        if space == "parameter":
            _check_layers(first, other, exact)
            if isinstance(first.config, LoraConfig) and isinstance(other.config, LoraConfig):
                _check_factors(first, other, first.config, other.config, exact)


def check_spellings(modules: Sequence[Described]) -> None:
    """Refuse names of one layer with and without the base model's prefix (``roberta.encoder...``
    and ``encoder...``): a sum would take them for two, and a model has one of them.

    Compared without their numbers. Two layers of one module are two, whatever their names.

    Raises:
        IncompatibleModules: both modules and names.
    """
    stacks: list[dict[str, str]] = [
        {
            ".".join("#" if p.isdecimal() else p for p in layer.split(".")): layer
            for layer in (m.layers if m.kind != "full" else ())
        }
        for m in modules
    ]
    for module, own in zip(modules, stacks, strict=True):
        for stack, layer in own.items():
            parts = stack.split(".")
            for i in range(1, parts.index("#") + 1 if "#" in parts else 0):
                short = ".".join(parts[i:])
                if any(short in s and stack in s for s in stacks):
                    continue
                for other, its in zip(modules, stacks, strict=True):
                    if short in its:
                        prefix = ".".join(layer.split(".")[:i])
                        raise IncompatibleModules.build(
                            f"{module.name} and {other.name}",
                            "name the same layers in two ways",
                            found=f"{layer} in {module.name} and {its[short]} in {other.name}",
                            expected="one way, that of the model they will be used with",
                            do=f"give {other.name} the prefix (pem convert IN OUT --prefix "
                            f"{prefix})",
                        )


def check_linear(module: Described) -> None:
    """Refuse a DoRA module where its update must be linear: it scales the base's own weights.

    Raises:
        IncompatibleModules: naming it and the way round.
    """
    if isinstance(module.config, LoraConfig) and module.config.use_dora:
        raise IncompatibleModules.build(
            module.name, "DoRA scales the base's weights, so its modules have no sum",
            found="use_dora", expected="LoRA",
            do="fold it into its base (pem fold), then take its LoRA out of that (pem extract)",
        )  # fmt: skip


def check_log_kind(modules: Sequence[Described]) -> None:
    """Refuse what has no logarithm: log space is of (IA)^3 vectors, which multiply.

    Raises:
        IncompatibleModules: a module of another kind.
    """
    for module in modules:
        if module.kind != "ia3":
            raise no_logarithm(module.name, module.kind)


def no_logarithm(name: str, kind: str) -> PEMError:
    """The error of a module of a kind that log space is not for."""
    return IncompatibleModules.build(
        name, "log space multiplies (IA)^3 vectors", found=f"kind {kind}", expected="kind ia3",
        do=LOG_REMEDY,
    )  # fmt: skip


def check_same_base(first: Described, other: Described) -> None:
    """Compare base models as far as both are known: fingerprint, else name; type, width."""
    a, b = first.base, other.base
    do = "use modules of one base model, or --allow_base_mismatch if these are the same weights"
    for what, x, y in (
        ("base model type", a.model_type, b.model_type),
        ("hidden size of the base", a.hidden_size, b.hidden_size),
        ("base fingerprint", a.fingerprint, b.fingerprint),
    ):
        if x is not None and y is not None and x != y:
            raise _differ(first, other, what, x, y, do)
    proven = a.fingerprint is not None and b.fingerprint is not None
    if not proven and a.name and b.name and _short(a.name) != _short(b.name):
        raise _differ(first, other, "base model", a.name, b.name, do)


def _short(name: str) -> str:
    """Last component: FacebookAI/roberta-base and models/roberta-base are one name."""
    return PurePath(name.rstrip("/")).name


def _check_layers(first: Described, other: Described, exact: str) -> None:
    only = sorted(set(first.layers) ^ set(other.layers))
    if only:
        whole = first.kind == "full"
        holder = first if only[0] in first.layers else other
        raise _differ(
            first,
            other,
            f"set of {'weights' if whole else 'adapted layers'} ({only[0]} in {holder.name} only)",
            len(first.layers),
            len(other.layers),
            "use models of one architecture" if whole else exact,
        )


def _check_factors(
    first: Described, other: Described, a: LoraConfig, b: LoraConfig, exact: str
) -> None:
    for layer in first.layers:
        if a.rank(layer) != b.rank(layer):
            raise _differ(first, other, f"rank r at {layer}", a.rank(layer), b.rank(layer), exact)
        if a.scaling(layer) != b.scaling(layer):
            x = f"{a.scaling(layer):g} (lora_alpha {a.alpha:g}, use_rslora {a.use_rslora})"
            y = f"{b.scaling(layer):g} (lora_alpha {b.alpha:g}, use_rslora {b.use_rslora})"
            raise _differ(first, other, f"scaling at {layer}", x, y, exact)


def _check_placement(first: Described, other: Described) -> None:
    assert isinstance(first.config, IA3Config) and isinstance(other.config, IA3Config)
    words = {True: "input", False: "output"}
    for layer in sorted(set(first.layers) & set(other.layers)):
        a, b = first.config.scales_input(layer), other.config.scales_input(layer)
        if a != b:
            raise _differ(
                first,
                other,
                f"(IA)^3 placement at {layer}",
                f"scales the {words[a]}",
                f"scales the {words[b]}",
                "train both with one placement (feedforward_modules)",
            )


def _differ(
    first: Described, other: Described, what: str, x: object, y: object, do: str
) -> IncompatibleModules:
    error = IncompatibleModules.build(
        f"{first.name} and {other.name}",
        f"{what} differs",
        found=f"{x} in {first.name} and {y} in {other.name}",
        expected="equal values",
        do=do,
    )
    assert isinstance(error, IncompatibleModules)
    return error


def space_of(choice: Choice, space: str | None) -> str:
    """The space of a combination: a sum's is parameter unless given, a method's is its own.

    Raises:
        PEMError: unknown, or not the method's.
    """
    if space is not None and space not in SPACES:
        raise PEMError.build(
            "space", "unknown space", found=repr(space), expected=" or ".join(SPACES)
        )
    own = choice.entry.space
    if choice.method == SIMPLE:
        return space or "parameter"
    if space not in (None, own):
        what = "updates" if own == "delta" else "the modules' own tensors"
        raise PEMError.build(
            "space",
            f"{choice.method} merges {what}",
            found=f"space {space}",
            expected=f"space {own}",
            do="leave --space out",
        )
    return own


def check_rank(
    rank: Rank | None, space: str, choice: Choice, kind: str, where: str = "rank"
) -> None:
    """Refuse a rank where nothing has one, and a share of the energy where the method needs R."""
    if rank is None:
        return
    if space != "delta":
        raise PEMError.build(
            where,
            "applies to delta space only",
            found=f"space {space}",
            do="add --space delta",
        )
    if is_share(checked(rank, where)) and choice.entry.own_rank:
        raise PEMError.build(
            where, f"{choice.method} merges in R directions of its own", found=f"a share, {rank}",
            expected="a whole number >= 1",
        )  # fmt: skip
    if kind != "lora":
        raise PEMError.build(
            where,
            "only LoRA modules have a rank",
            found=f"kind {kind}",
            do="leave --rank out",
        )


def check_coefficients_of(choice: Choice, coefficients: Sequence[float]) -> None:
    """Refuse a number of modules or signs of coefficients that the method cannot use."""
    entry = choice.entry
    low, high = entry.modules
    if not low <= len(coefficients) <= high:
        raise PEMError.build(
            entry.name, "wrong number of modules", found=len(coefficients),
            expected=low if low == high else f"{low} to {high}",
            do="use karcher for more than two" if entry.name == "slerp" else "",
        )  # fmt: skip
    if entry.shares and (min(coefficients) < 0 or not sum(coefficients)):
        raise PEMError.build(
            entry.name, "only the ratios of its coefficients count, as shares c / sum c",
            found=", ".join(f"{c:g}" for c in coefficients),
            expected="coefficients >= 0, not all 0",
            do="negate the module instead, or use another method",
        )  # fmt: skip
