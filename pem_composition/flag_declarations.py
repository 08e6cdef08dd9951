"""How a flag is declared: a dataclass field with its help text and its range. No torch.

The parser (cli/parser.py) makes command lines of such dataclasses; the same checks hold where one
is built in Python.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from typing import Any, TypeVar

from pem_composition.errors import UsageError

T = TypeVar("T")

RANGES: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "least": (">=", operator.ge),
    "above": (">", operator.gt),
    "most": ("<=", operator.le),
    "below": ("<", operator.lt),
}
GIVEN = "given"  # a flag of a later release enters a run's key only where it is given


def flag(default: T, text: str, **meta: Any) -> T:
    """A dataclass field with its help text; the flag's name is the field's.

    Args:
        meta: what the parser knows (cli/parser.py), and
            least, above, most, below: range of a number; without them any finite one.
            do: the remedy for a number outside its range.
            key: False for what names a place or changes speed, reporting and bookkeeping, but not
                the trained numbers, and for what enters the key of a run by its content; or GIVEN.
            of: the kinds of run or module whose numbers it decides; default: all.
    """
    return field(default=default, metadata={"help": text, **meta})  # type: ignore[no-any-return]


def required(text: str, **meta: Any) -> Any:
    """The same for a flag that must be given."""
    return field(metadata={"help": text, **meta})


def seed_flag(text: str, default: int | None = 42) -> Any:
    """A seed, in the range that the generators of NumPy and of transformers take."""
    return flag(default, text, least=0, most=2**32 - 1)


def same(declared: type, name: str) -> Any:
    """The flag that another dataclass declares, with its default, text and range."""
    spec = next(spec for spec in dataclasses.fields(declared) if spec.name == name)
    return field(default=spec.default, metadata=spec.metadata)


def check_ranges(config_class: type, values: Mapping[str, Any]) -> None:
    """Refuse a number that is outside the range its flag declares, or not finite.

    Raises:
        UsageError: naming the flag.
    """
    for spec in dataclasses.fields(config_class):
        value = values.get(spec.name)
        bounds = [(*RANGES[k], spec.metadata[k]) for k in RANGES if k in spec.metadata]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not math.isfinite(number):
                raise refused(spec.name, number, "a finite number")
            if not all(holds(number, bound) for _, holds, bound in bounds):
                limits = " and ".join(f"{sign} {bound:.10g}" for sign, _, bound in bounds)
                raise refused(spec.name, number, f"a number {limits}", spec.metadata.get("do"))


def check_choice(config: object, name: str, allowed: Collection[str]) -> None:
    """Refuse a value that is none of these.

    Raises:
        UsageError: naming the flag.
    """
    if getattr(config, name) not in allowed:
        raise refused(name, getattr(config, name), ", ".join(allowed))


def refuse_idle(config: Any, name: str, needed: str, *, has: bool) -> None:
    """Refuse a flag that was given without the one that it needs to have an effect.

    Raises:
        UsageError: naming both.
    """
    value = getattr(config, name)
    if value is not None and not has:
        raise UsageError.build(
            f"--{name}",
            f"has no effect without {needed}",
            found=value,
            do=f"add {needed} or leave it out",
        )


def refused(name: str, found: object, expected: str, do: str | None = None) -> UsageError:
    """The error of a flag's value."""
    return UsageError.build(f"--{name}", "cannot be used", found=found, expected=expected, do=do)  # type: ignore[return-value]
