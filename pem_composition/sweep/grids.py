"""Which coefficients a sweep scores: ranges, pairs, simplexes and analogies. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pem_composition.arithmetic.algebra import analogy_weights
from pem_composition.errors import UsageError

MAX_POINTS = 1001
BASE, APPLIED = 0.0, -1.0  # strengths: nothing is subtracted, the module is added

Coefficients = tuple[float, ...]


def grid(start: float, step: float, stop: float, where: str = "--grid") -> tuple[float, ...]:
    """start, start + step, ..., stop; rounded to 12 digits, so that 0.1 + 0.2 is 0.3.

    Raises:
        UsageError: a step that does not lead from start to stop, or more than 1,001 points.
    """
    if step <= 0 or stop < start:
        raise UsageError.build(
            where,
            "the step does not lead from start to stop",
            found=f"{start:g} {step:g} {stop:g}",
            expected="START STEP STOP with START <= STOP and STEP > 0, such as 0 0.05 1",
        )
    steps = (stop - start) / step + 1e-9
    _check_count(_floor(steps) + 1, where)
    return tuple(round(start + i * step, 12) for i in range(math.floor(steps) + 1))


def union(values: Sequence[float]) -> tuple[float, ...]:
    """The numbers of one range or several, START STEP STOP each, in rising order, each once.

    Raises:
        UsageError: not three numbers per range, no such range, or too many points.
    """
    if not values or len(values) % 3:
        raise UsageError.build(
            "--grid",
            "not a range",
            found=f"{len(values)} numbers",
            expected="START STEP STOP, or several such ranges: 0 0.1 1 0.8 0.02 1",
        )
    found = {t for i in range(0, len(values), 3) for t in grid(*values[i : i + 3])}
    _check_count(len(found))
    return tuple(sorted(found))


def strengths(values: Sequence[float]) -> tuple[float, ...]:
    """The base model, the module applied, then the strengths of START STEP STOP, or of several.

    Raises:
        UsageError: no such range, or none above 0.
    """
    found = union(values)
    if found[-1] <= 0:
        raise UsageError.build(
            "--grid", "no strength above 0, so nothing is negated", found=f"{found[-1]:g} at most",
            expected="START STEP STOP with STOP > 0, such as 0 0.1 1",
        )  # fmt: skip
    return (BASE, APPLIED, *(s for s in found if s not in (BASE, APPLIED)))


def merges(values: Sequence[float], modules: int) -> tuple[Coefficients, ...]:
    """(t, 1 - t) for two modules; for more, every point of the simplex in steps of STEP.

    Raises:
        UsageError: fewer than two modules, or a grid that does not fit their number.
    """
    if modules < 2:
        raise UsageError.build(
            "--grid",
            "a grid is over two modules or more",
            found=modules,
            expected="at least 2",
            do="give another module, or scale one with negation.py",
        )
    if modules > 2:
        return _simplex(values, modules)
    return tuple((t, round(1 - t, 12)) for t in union(values))


def analogies(values: Sequence[float]) -> tuple[Coefficients, ...]:
    """(t, 1 - t, t - 1): t * classifier + (1 - t) * (target_lm - source_lm)."""
    return tuple(analogy_weights(t) for t in union(values))


def _simplex(values: Sequence[float], modules: int) -> tuple[Coefficients, ...]:
    """All multiples of STEP that sum to 1."""
    expected = f"0 STEP 1 for {modules} modules: all multiples of STEP that sum to 1"
    if len(values) != 3 or values[0] != 0 or values[2] != 1 or not 0 < values[1] <= 1:
        raise UsageError.build(
            "--grid", "does not fit", found=" ".join(f"{v:g}" for v in values), expected=expected
        )
    _check_count(_floor(1 / values[1]))
    steps = round(1 / values[1])
    if abs(steps * values[1] - 1) > 1e-9:
        raise UsageError.build(
            "--grid", "1 is no multiple of STEP", found=f"{values[1]:g}", expected=expected
        )
    _check_count(math.comb(steps + modules - 1, modules - 1))
    return tuple(tuple(round(i / steps, 12) for i in shares) for shares in _shares(steps, modules))


def _shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as an ordered sum of ``parts`` whole numbers >= 0."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        yield from ((first, *rest) for rest in _shares(total - first, parts - 1))


def _floor(steps: float) -> float:
    """Whole steps; infinity where there is no end of them."""
    return math.floor(steps) if math.isfinite(steps) else math.inf


def _check_count(count: float, where: str = "--grid") -> None:
    if count > MAX_POINTS:
        raise UsageError.build(
            where, "too many points", found=count, expected=f"at most {MAX_POINTS}"
        )
