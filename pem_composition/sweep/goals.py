"""What a search maximises, and the conditions that a result has to meet. No torch.

A goal is the mean score over the tasks, the worst of them, the normalised mean (score / score of
the task's own module), minus the mean loss, or one task's score. Metrics that are better when they
are smaller count with a minus sign.

A task whose own module scores 0, or not more than two standard errors above it, has learned nothing
that could be divided by; it does not count in the normalised mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pem_composition.errors import DataError, UsageError

Record = Mapping[str, Any]
MEAN, WORST, NORMALISED, LOSS, INVALID = "mean", "worst", "normalised", "loss", "invalid"
NAMES = (MEAN, WORST, NORMALISED, LOSS)
CONDITION = re.compile(r"(.+?)(>=|<=)([-+]?[0-9.]+(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Scored:
    """The records of one point, and of the modules alone.

    Attributes:
        own: for each task, the record of its own module (module i alone on task i); empty where
            modules and tasks do not go together.
        size: mean of the absolute coefficients.
        metrics: for each task the metric that counts; none: its own.
    """

    tasks: tuple[str, ...]
    records: Sequence[Record]
    own: Sequence[Record] = ()
    size: float = 0.0
    metrics: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        """Of each task."""
        return values_of(self.records, self.metrics)

    @property
    def worths(self) -> list[float]:
        """Of each task; higher is better."""
        return worths_of(self.records, self.metrics)


@dataclass(frozen=True)
class Goal:
    """Something to maximise.

    Attributes:
        name: one of NAMES, or a task.
        penalty: of the loss: this much times the mean absolute coefficient is added to it.
    """

    name: str
    penalty: float = 0.0

    def value(self, scored: Scored) -> float:
        """The value of a point; higher is better."""
        signed = scored.worths
        if self.name == MEAN:
            return sum(signed) / len(signed)
        if self.name == WORST:
            return min(signed)
        if self.name == LOSS:
            losses = [r["loss"] for r in scored.records]
            return -(sum(losses) / len(losses) + self.penalty * scored.size)
        if self.name == NORMALISED:
            share = normalised(scored.records, scored.own, scored.metrics)
            assert share is not None, "check_normalised comes first"
            return share
        return signed[scored.tasks.index(self.name)]


@dataclass(frozen=True)
class Condition:
    """``rte>=0.55``, ``mean>=0.6``, ``invalid<=0.1`` (the largest share over the tasks)."""

    name: str
    above: bool
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.above else '<='}{self.bound:g}"

    def violation(self, scored: Scored) -> float:
        """By how much a point misses it; 0 if it is met."""
        if self.name == INVALID:
            found = max(r["invalid_share"] or 0.0 for r in scored.records)
        elif self.name in scored.tasks:
            found = scored.values[scored.tasks.index(self.name)]
        else:
            found = Goal(self.name).value(scored)
        return max(0.0, self.bound - found if self.above else found - self.bound)


def normalised(
    records: Sequence[Record], own: Sequence[Record], metrics: Sequence[str] = ()
) -> float | None:
    """Mean of score / score of the task's own module, over the tasks that count; None without."""
    names = metrics or [r["metric"] for r in records]
    pairs = zip(values_of(records, names), values_of(own, names), own, strict=True)
    shares = [value / alone for value, alone, o in pairs if counts(o) and alone]
    return sum(shares) / len(shares) if shares else None


def counts(own: Record) -> bool:
    """True if the task's own module scores more than two standard errors above 0."""
    return bool(own["score"] > 2 * own["standard_error"])


def check_normalised(goals: Sequence[str], tasks: Sequence[str], own: Sequence[Record]) -> str:
    """What to say of tasks that do not count in the normalised mean; empty if it is not asked for.

    Raises:
        DataError: none counts.
    """
    if NORMALISED not in goals:
        return ""
    without = [
        f"{t} ({o['score']:.4f} +- {o['standard_error']:.4f})"
        for t, o in zip(tasks, own, strict=True)
        if not counts(o)
    ]
    if not without:
        return ""
    if len(without) == len(tasks):
        raise DataError.build(
            NORMALISED, "no task's own module scores above 0", found=", ".join(without),
            expected="more than two standard errors", do="train the modules longer, or --goal mean",
        )  # fmt: skip
    return (
        f"note: not in the normalised mean, their own modules learned nothing: {', '.join(without)}"
    )


def check_name(name: str, tasks: Sequence[str], where: str, *, own: bool, extra: str = "") -> None:
    """Refuse a name that is no goal.

    Args:
        own: every task has a module of its own.

    Raises:
        UsageError: unknown, or normalised without own modules.
    """
    known = [*NAMES, *tasks, *([extra] if extra else [])]
    if name not in known:
        raise UsageError.build(where, "nothing of that name", found=name, expected=", ".join(known))
    if name == NORMALISED and not own:
        raise UsageError.build(
            where, "normalised needs a module of its own for each task",
            expected="as many tasks as modules, in the same order",
        )  # fmt: skip


def condition(text: str, tasks: Sequence[str], *, own: bool) -> Condition:
    """A condition from its text.

    Raises:
        UsageError: not NAME>=NUMBER or NAME<=NUMBER, or an unknown name.
    """
    found = CONDITION.fullmatch(text.replace(" ", ""))
    if found is None:
        raise UsageError.build(
            "--constraint",
            "not a condition",
            found=repr(text),
            expected="NAME>=NUMBER or NAME<=...",
        )
    check_name(found[1], tasks, "--constraint", own=own, extra=INVALID)
    return Condition(found[1], found[2] == ">=", float(found[3]))


def front(values: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other point beats in one goal and equals in the rest."""
    return [
        i
        for i, v in enumerate(values)
        if not any(
            _dominates(w, v) or (tuple(w) == tuple(v) and j < i) for j, w in enumerate(values)
        )
    ]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def values_of(records: Sequence[Record], metrics: Sequence[str] = ()) -> list[float]:
    """The records by a metric each, by their task's own where there is none."""
    return [
        _by(r, m) for r, m in zip(records, metrics or [r["metric"] for r in records], strict=True)
    ]


def worths_of(records: Sequence[Record], metrics: Sequence[str] = ()) -> list[float]:
    """The same, so that higher is better: the one rule by which a sweep or a search chooses."""
    from pem_composition.evaluation.metrics import greater_is_better

    names = metrics or [r["metric"] for r in records]
    values = zip(values_of(records, names), names, strict=True)
    return [v if greater_is_better(name) else -v for v, name in values]


def _by(record: Record, metric: str) -> float:
    if metric == LOSS:
        return float(record[LOSS])
    own = metric == record.get("metric", metric)
    return float(record["score"] if own else record["scores"][metric])
