"""What is searched: for each method a space of coefficients, settings and rank. No torch.

A dimension is a range of numbers or a list of words; a candidate gives each a value. Names of
coefficients: ``c`` for one that all modules share, else ``c0``, ``c1``, ...
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pem_composition.arithmetic.methods.registry import (
    METHODS,
    SIMPLE,
    SUM,
    Method,
    accepted,
    resolve,
)
from pem_composition.arithmetic.methods.registry import Choice as MethodChoice
from pem_composition.arithmetic.methods.settings import Setting, shown
from pem_composition.arithmetic.ranks import checked
from pem_composition.arithmetic.ranks import parse as parse_rank
from pem_composition.errors import PEMError, UsageError
from pem_composition.sweep.grids import MAX_POINTS, grid
from pem_composition.sweep.points import Input, Point, Settings, point

Choice = float | int | str
Candidate = Mapping[str, Choice]
EACH, SHARED, FIXED = "each", "shared", "fixed"
RANK, SPACE = "rank", "space"


@dataclass(frozen=True)
class Dimension:
    """One thing to choose: a number from low to high, or one of some values."""

    name: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def numeric(self) -> bool:
        """True for a range."""
        return not self.choices

    def values(self) -> tuple[Choice, ...]:
        """Every value, for a grid.

        Raises:
            UsageError: a range without a step.
        """
        if self.choices:
            return self.choices
        if self.step is None:
            raise UsageError.build(
                f"--search {self.name}", "a grid needs a step", found=f"{self.low:g}:{self.high:g}",
                expected=f"{self.name}={self.low:g}:{self.high:g}:STEP, or a list of values",
            )  # fmt: skip
        return grid(self.low, self.step, self.high, f"--search {self.name}")


@dataclass(frozen=True)
class Study:
    """The search of one method in one space.

    Attributes:
        grid: coefficients that a grid goes through, instead of the coefficients' dimensions.
    """

    method: str
    space: str
    modules: int
    kind: str
    dimensions: tuple[Dimension, ...]
    grid: tuple[tuple[float, ...], ...] = ()

    @property
    def name(self) -> str:
        """``ties``, or ``sum in delta space``."""
        return f"{SUM} in {self.space} space" if self.method == SIMPLE else self.method

    def candidates(self) -> Iterator[Candidate]:
        """Every candidate of a grid."""
        others = [d for d in self.dimensions if not _is_coefficient(d.name)]
        points: Sequence[Candidate] = [
            {f"c{i}": c for i, c in enumerate(p)} for p in self.grid
        ] or [dict(zip(_names(self.dimensions), v, strict=True)) for v in self._ranges()]
        for coefficients in points:
            for values in itertools.product(*(d.values() for d in others)):
                yield {**coefficients, **dict(zip((d.name for d in others), values, strict=True))}

    def _ranges(self) -> Iterator[tuple[Choice, ...]]:
        yield from itertools.product(
            *(d.values() for d in self.dimensions if _is_coefficient(d.name))
        )

    def coefficients(self, candidate: Candidate) -> tuple[float, ...]:
        """The modules' coefficients: the candidate's, or the method's own."""
        if "c" in candidate:
            return (float(candidate["c"]),) * self.modules
        if "c0" in candidate:
            return tuple(float(candidate[f"c{i}"]) for i in range(self.modules))
        return self.choice(candidate).default_coefficients(self.modules)

    def choice(self, candidate: Candidate) -> MethodChoice:
        """The method with the candidate's settings.

        Raises:
            PEMError: settings that do not go together.
        """
        own = {n: v for n, v in candidate.items() if not _is_coefficient(n) and n != RANK}
        return resolve(self.method, own, self.kind)

    def point(self, inputs: Sequence[Input], settings: Settings, candidate: Candidate) -> Point:
        """The point that a candidate stands for.

        Raises:
            PEMError: settings that do not go together.
        """
        choice = self.choice(candidate)
        rank = candidate.get(RANK)
        return point(
            inputs, self.coefficients(candidate), self.space, settings, method=str(choice),
            rank=None if rank is None else checked(rank),
        )  # fmt: skip


def _is_coefficient(name: str) -> bool:
    return name == "c" or (name[:1] == "c" and name[1:].isdecimal())


def _names(dimensions: Sequence[Dimension]) -> list[str]:
    return [d.name for d in dimensions if _is_coefficient(d.name)]


def parse(texts: Sequence[str]) -> dict[str, Dimension]:
    """``density=0.1:0.9``, ``density=0.1:0.9:0.2``, ``rank=4,8,0.95``, ``election=total``, by name.

    Raises:
        UsageError: not of this form, or a name given twice.
    """
    found: dict[str, Dimension] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError.build(
                "--search", "not a dimension", found=repr(text),
                expected="NAME=LOW:HIGH, NAME=LOW:HIGH:STEP or NAME=A,B,C",
            )  # fmt: skip
        if name in found:
            raise UsageError.build("--search", f"{name} given twice", do="give each name once")
        found[name] = _dimension(name, value)
    return found


def _dimension(name: str, value: str) -> Dimension:
    if ":" not in value:
        choices = tuple(value.split(","))
        if not all(choices) or len(set(choices)) < len(choices):
            raise UsageError.build(f"--search {name}", "not a list of values", found=repr(value))
        return Dimension(name, choices=choices)
    try:
        numbers = [float(part) for part in value.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or not all(map(math.isfinite, numbers)):
        raise UsageError.build(
            f"--search {name}",
            "not a range",
            found=repr(value),
            expected="LOW:HIGH or LOW:HIGH:STEP",
        )
    if not numbers[0] < numbers[1]:
        raise UsageError.build(f"--search {name}", "LOW must be below HIGH", found=repr(value))
    return Dimension(name, numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None)


@dataclass(frozen=True)
class Wishes:
    """What the user wants to be searched, whatever the method."""

    mode: str = EACH  # how coefficients vary
    low: float = 0.0
    high: float = 1.0
    values: tuple[float, ...] = ()  # of shared coefficients in a grid
    grid: tuple[tuple[float, ...], ...] = ()
    dimensions: Mapping[str, Dimension] | None = None


def study(method: str, space: str, kind: str, modules: int, wishes: Wishes) -> Study:
    """The study of one method: its coefficients, and the dimensions that it has.

    Raises:
        PEMError: a value out of the range of its setting.
    """
    entry = METHODS[method]
    dimensions = list(_coefficients(entry, modules, wishes))
    named = wishes.dimensions or {}
    for setting in accepted(entry):
        if setting.name in named and kind in setting.kinds:
            dimensions.append(_checked(named[setting.name], setting))
    if RANK in named and space == "delta" and kind == "lora":
        dimensions.append(_ranks(named[RANK]))
    points = wishes.grid if wishes.mode == EACH else ()
    if entry.shares:
        points = tuple(p for p in points if min(p) >= 0 and sum(p) > 0)
    return Study(method, space, modules, kind, tuple(dimensions), points)


def _coefficients(entry: Method, modules: int, wishes: Wishes) -> Iterator[Dimension]:
    if wishes.mode == FIXED or (entry.shares and wishes.mode == SHARED):
        return
    low = max(0.0, wishes.low) if entry.shares else wishes.low
    names = ["c"] if wishes.mode == SHARED else [f"c{i}" for i in range(modules)]
    for name in names:
        yield Dimension(name, low, wishes.high, choices=wishes.values)


def _checked(dimension: Dimension, setting: Setting) -> Dimension:
    where = f"--search {setting.name}"
    try:
        if dimension.choices:
            values = tuple(dict.fromkeys(setting.read(v, where) for v in dimension.choices))
            return Dimension(setting.name, choices=values)
        if not isinstance(setting.default, float):
            raise UsageError.build(where, "is no range of numbers", expected=setting.range)
        for bound in (dimension.low, dimension.high):
            setting.read(bound, where)
    except PEMError as error:
        raise UsageError(str(error)) from None
    return dimension


def _ranks(dimension: Dimension) -> Dimension:
    words = dimension.choices or dimension.values()
    if dimension.numeric and dimension.low >= 1:  # a range of ranks; below 1 it is one of shares
        words = [shown(value) for value in words]
    try:
        return Dimension(RANK, choices=tuple(parse_rank(str(w), "--search rank") for w in words))
    except PEMError as error:
        raise UsageError(str(error)) from None


def check_used(dimensions: Mapping[str, Dimension], studies: Sequence[Study]) -> None:
    """Refuse a dimension that none of the studies has.

    Raises:
        UsageError: naming it, and what the methods have.
    """
    used = {d.name for s in studies for d in s.dimensions}
    for name in dimensions:
        if name not in used:
            known = {x.name for s in studies for x in accepted(METHODS[s.method])} | {RANK}
            raise UsageError.build(
                "--search", f"no method of the search has {name!r}",
                expected=", ".join(sorted(known)), do="correct the name or --methods",
            )  # fmt: skip


def of_methods(
    methods: Sequence[str],
    spaces: Sequence[str],
    kind: str,
    modules: int,
    wishes: Wishes,
    sampler: str,
) -> tuple[Study, ...]:
    """One study per method, of the sum one per space.

    Raises:
        UsageError: a method that is not defined for the kind, a dimension that no method has, or
            more or fewer points than the sampler can use.
    """
    found = []
    for method in methods:
        name = SIMPLE if method == SUM else method
        if kind not in METHODS[name].kinds:
            raise UsageError.build(
                "--methods", f"{name} is not defined for modules of kind {kind}",
                expected=f"kind {' or '.join(METHODS[name].kinds)}", do="leave it out",
            )  # fmt: skip
        own = spaces if name == SIMPLE else (METHODS[name].space,)
        found += [study(name, space, kind, modules, wishes) for space in own]
    check_used(wishes.dimensions or {}, found)
    for one in found:
        numbers = sum(d.numeric for d in one.dimensions)
        if sampler == "cma" and numbers < 2:
            raise UsageError.build(
                "--sampler", f"CMA-ES needs two numbers to search over for {one.name}",
                found=numbers, do="use tpe, random or grid",
            )  # fmt: skip
        # Going through a grid once refuses a range without a step.
        if (
            sampler == "grid"
            and sum(1 for _ in itertools.islice(one.candidates(), MAX_POINTS + 1)) > MAX_POINTS
        ):
            raise UsageError.build(
                "--search", f"too many points for {one.name}", expected=f"at most {MAX_POINTS}",
                do="use --sampler tpe",
            )  # fmt: skip
    return tuple(found)
