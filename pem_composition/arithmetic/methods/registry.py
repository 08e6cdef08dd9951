"""Looking methods up: choices with every setting decided, their recorded text, the docs table.

The command line, the expression parser, error messages and docs/methods.md read this. A method's
code is imported when it is run. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pem_composition.arithmetic import ranks
from pem_composition.arithmetic.methods.catalogue import (
    ELEMENTWISE,
    FORM,
    METHODS,
    PARITY,
    PEFT_LINEAR,
    REFERENCE_DETOXIFY,
    SEED,
    SIMPLE,
    SPECTRAL,
    SUM,
    Method,
)
from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE, RULES
from pem_composition.arithmetic.methods.settings import Setting, Value, shown
from pem_composition.arithmetic.ranks import Rank
from pem_composition.config import KINDS
from pem_composition.errors import PEMError, close_match, wrong_type

__all__ = [
    "ELEMENTWISE",
    "FORM",
    "METHODS",
    "PARITY",
    "PEFT_LINEAR",
    "REFERENCE_DETOXIFY",
    "SEED",
    "SIMPLE",
    "SPECTRAL",
    "SUM",
    "Choice",
    "Method",
    "RecordedMethod",
    "accepted",
    "method",
    "recorded",
    "resolve",
    "table",
    "use_of_coefficients",
]


@dataclass(frozen=True)
class Choice:
    """A method with every setting decided; its text is what pem.json records."""

    method: str
    settings: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """``ties(density=0.2, election=total)``."""
        inside = ", ".join(f"{name}={shown(value)}" for name, value in self.settings)
        return f"{self.method}({inside})" if inside else self.method

    @property
    def entry(self) -> Method:
        """Its line in the registry."""
        return METHODS[self.method]

    @property
    def inner(self) -> Choice | None:
        """The method that this one applies, with its settings."""
        name = self.as_dict().get("inner")
        if name is None:
            return None
        own = {s.name for s in METHODS[str(name)].settings}
        return Choice(str(name), tuple((k, v) for k, v in self.settings if k in own))

    @property
    def default(self) -> float | None:
        """The method's own coefficient where none are given, else that of its inner one; None
        where a rule says them."""
        own = self.entry.default
        return self.inner.entry.default if own is None and self.inner is not None else own

    def default_coefficients(self, modules: int, rule: str = DEFAULT_RULE) -> tuple[float, ...]:
        """What a merge without coefficients uses: the method's own, else those of a rule."""
        own = self.default
        return RULES[rule].of(modules) if own is None else (own,) * modules

    def as_dict(self) -> dict[str, Value]:
        """Settings by name."""
        return dict(self.settings)


def method(name: str, where: str = "method") -> Method:
    """The method of a name.

    Raises:
        PEMError: unknown; the nearest name is suggested, or all are listed.
    """
    if not isinstance(name, str):
        raise wrong_type(where, name, "the name of a method")
    if name not in METHODS:
        remedy = close_match(name, METHODS)
        expected = None if remedy else ", ".join(METHODS)
        raise PEMError.build(where, f"unknown method {name!r}", expected=expected, do=remedy)
    return METHODS[name]


def resolve(
    name: str,
    settings: Mapping[str, object] | None = None,
    kind: str | None = None,
    *,
    where: str = "",
    places: Mapping[str, str] | None = None,
) -> Choice:
    """The method with its settings checked and its defaults filled in.

    Args:
        kind: of the modules. While it is unknown, settings of some kinds only stay open unless
            they are given.
        where: the place of an error, default the method's name; ``places``: those of settings.

    Raises:
        PEMError: unknown method or setting, a value out of range, or a kind it is not defined for.
    """
    entry = method(name, where or "method")
    if settings is not None and not isinstance(settings, Mapping):
        raise wrong_type("settings", settings, "a dictionary of values by the names of settings")
    given = dict(settings or {})
    places = dict.fromkeys(given, where or name) | dict(places or {})
    if kind is not None and kind not in entry.kinds:
        raise PEMError.build(
            where or name, f"not defined for modules of kind {kind}",
            expected=f"kind {' or '.join(entry.kinds)}", do="use another method",
        )  # fmt: skip
    decided: dict[str, Value] = {}
    for setting in accepted(entry, given.get("inner")):
        applies = kind is None or kind in setting.kinds
        if setting.name in given and not applies:
            raise PEMError.build(
                places[setting.name],
                f"{setting.name} applies to modules of kind {' or '.join(setting.kinds)}",
                found=f"kind {kind}", do="leave it out",
            )  # fmt: skip
        if setting.name in given:
            value = given.pop(setting.name)
            decided[setting.name] = setting.read(value, places[setting.name])
        elif applies and (kind is not None or setting.kinds == KINDS):
            decided[setting.name] = setting.default
    for unknown in given:
        _refuse(unknown, entry, decided, places[unknown])
    _check_together(entry, decided, where or name)
    return Choice(name, tuple(decided.items()))


def accepted(entry: Method, inner: object = None) -> Iterable[Setting]:
    """The method's settings, then those of its inner method but for the coordinates."""
    yield from entry.settings
    own = next((s for s in entry.settings if s.name == "inner"), None)
    if own is not None:
        name = inner if inner in own.choices else own.default
        yield from (s for s in METHODS[str(name)].settings if s.name != FORM.name)


def _refuse(name: str, entry: Method, decided: Mapping[str, Value], place: str) -> None:
    known = [s.name for s in accepted(entry, decided.get("inner"))]
    remedy = close_match(str(name), known)
    raise PEMError.build(
        place, f"{entry.name} has no setting {name!r}",
        expected=None if remedy else ", ".join(known) or "no settings", do=remedy,
    )  # fmt: skip


def _check_together(entry: Method, decided: Mapping[str, Value], place: str) -> None:
    """Ranges that two settings share."""
    density, gamma, epsilon = (decided.get(n) for n in ("density", "gamma", "epsilon"))
    if isinstance(density, float) and isinstance(gamma, float) and density + gamma > 1:
        raise PEMError.build(
            place, "density + gamma must be at most 1", found=f"{shown(density)} + {shown(gamma)}"
        )
    if isinstance(density, float) and isinstance(epsilon, float):
        low, high = density - epsilon / 2, density + epsilon / 2
        if low <= 0 or high > 1:
            raise PEMError.build(
                place, "density -+ epsilon/2 must be in (0, 1]",
                found=f"density {shown(density)}, epsilon {shown(epsilon)}",
                do="lower epsilon",
            )  # fmt: skip


RECORD = re.compile(
    rf"(?P<name>[a-z_]+)(\((?P<settings>[^()]*)\))?(, rank (?P<rank>{ranks.NUMBER}))?", re.ASCII
)


class RecordedMethod(NamedTuple):
    """The parts of a pem.json's ``method``: ``ties(density=0.2), rank 8``."""

    name: str
    settings: tuple[str, ...]  # name=value
    rank: Rank | None

    @classmethod
    def split(cls, text: str) -> RecordedMethod:
        """The parts, not checked against the registry.

        Raises:
            PEMError: not of this form.
        """
        found = RECORD.fullmatch(text)
        if found is None:
            raise PEMError.build("method", "not a recorded method", found=repr(text))
        settings = tuple(part for part in (found["settings"] or "").split(", ") if part)
        return cls(found["name"], settings, ranks.parse(found["rank"]) if found["rank"] else None)


def recorded(text: str) -> tuple[Choice, Rank | None]:
    """The method and the rank that a pem.json's ``method`` names; ``sum`` is ``simple``.

    Raises:
        PEMError: not a method of this registry.
    """
    record = RecordedMethod.split(text)
    name = SIMPLE if record.name == SUM else record.name
    pairs = [part.partition("=") for part in record.settings]
    return resolve(name, {key: value for key, _, value in pairs}), record.rank


def use_of_coefficients(entry: Method) -> str:
    """What coefficients do, and what they are where none are given."""
    if entry.shares:
        use = "shares c_t / sum c of the result"
    else:
        use = "scale dW_t first" if entry.space == "delta" else "as in the rule"
    if entry.default is None and any(s.name == "inner" for s in entry.settings):
        return f"{use}; default: that of inner"
    default = RULES[DEFAULT_RULE].name if entry.default is None else shown(entry.default)
    return f"{use}; default {default} each"


def table() -> str:
    """The registry as the Markdown tables of docs/methods.md: methods, then settings."""
    lines = [
        "| method | result | acts on | coefficients | rank | kinds | source |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{m.name}` {m.title} | {m.rule} | {m.acts_on} | {use_of_coefficients(m)} | {m.rank} | "
        f"{', '.join(m.kinds)} | {m.source} |"
        for m in METHODS.values()
    ]
    lines += ["", "| setting | range | meaning |", "|---|---|---|"]
    lines += [
        f"| {m.name}: `{s.name}={shown(s.default)}` | {s.range} | {s.meaning} |"
        for m in METHODS.values()
        for s in m.settings
    ]
    return "\n".join(lines)
