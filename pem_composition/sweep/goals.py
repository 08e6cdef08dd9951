"""What a search maximises, and the conditions that a result has to meet. No torch.

A goal is the mean score over the tasks, the worst of them, the normalised mean (score / score of
the task's own module), minus the mean loss, or one task's score. Metrics that are better when they
are smaller count with a minus sign; their ratio in the normalised mean is turned round.

A task whose own module scores 0, or not more than two standard errors above it, has learned nothing
that could be divided by; it does not count in the normalised mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pem_composition.errors import DataError, UsageError
from pem_composition.report.records import units_of as units_of_measures

Record = Mapping[str, Any]
MEAN, WORST, NORMALISED, LOSS, INVALID = "mean", "worst", "normalised", "loss", "invalid"
NAMES = (MEAN, WORST, NORMALISED, LOSS)
OVER_TASKS = (*NAMES, INVALID)  # no task is called so
TINY = 1e-9  # no loss that is divided by is smaller
CONDITION = re.compile(r"(.+?)(>=|<=)([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


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
    def worths(self) -> list[float]:
        """Of each task; higher is better."""
        return worths_of(self.records, self.metrics)

    @property
    def signs(self) -> list[int]:
        """Of each task: -1 where a smaller number is the better one."""
        return signs_of(self.records, self.metrics)


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
        """The value of a point; higher is better.

        Raises:
            DataError: a mean or the worst of measures in different units.
        """
        signed = scored.worths
        if self.name in (MEAN, WORST):
            check_units(f"goal {self.name}", scored.records, scored.metrics)
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

    def sign(self, scored: Scored) -> int:
        """What turns the value into the number that a reader knows: -1 for the loss, for a task by
        a metric that is better when smaller, and for the mean or the worst of such tasks alone.
        """
        if self.name in (LOSS, NORMALISED):
            return -1 if self.name == LOSS else 1
        if self.name in scored.tasks:
            return scored.signs[scored.tasks.index(self.name)]
        return max(scored.signs)

    def number(self, scored: Scored) -> float:
        """The value as a reader knows it: a loss is positive."""
        return self.sign(scored) * self.value(scored)


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
        else:
            found = Goal(self.name).number(scored)
        return max(0.0, self.bound - found if self.above else found - self.bound)


def normalised(
    records: Sequence[Record], own: Sequence[Record], metrics: Sequence[str] = ()
) -> float | None:
    """Mean of score / score of the task's own module, over the tasks that count; None without.

    Of a metric that is better when smaller the share is turned round, so that higher is better.
    """
    names = metrics or [r["metric"] for r in records]
    ways = zip(signs_of(records, names), own, strict=True)
    pairs = zip(ways, values_of(records, names), values_of(own, names), strict=True)
    counted = [(sign, value, alone) for (sign, o), value, alone in pairs if counts(o) and alone]
    shares = [v / alone if sign > 0 else alone / max(v, TINY) for sign, v, alone in counted]
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


def check_name(
    name: str, tasks: Sequence[str], where: str, *, own: bool, loss: bool = True, extra: str = ""
) -> None:
    """Refuse a name that is no goal.

    Args:
        own: every task has a module of its own.
        loss: the records have one.

    Raises:
        UsageError: unknown, normalised without own modules, or the loss of scores alone.
    """
    known = [*NAMES, *tasks, *([extra] if extra else [])]
    if name not in known:
        raise UsageError.build(where, "nothing of that name", found=name, expected=", ".join(known))
    if name == NORMALISED and not own:
        raise UsageError.build(
            where, "normalised needs a module of its own for each task",
            expected="as many tasks as modules, in the same order",
        )  # fmt: skip
    if name == LOSS and not loss:
        raise UsageError.build(
            where, "tasks of the harness have scores, no loss", found=name, do="use mean"
        )


def condition(text: str, tasks: Sequence[str], *, own: bool, loss: bool = True) -> Condition:
    """A condition from its text.

    Raises:
        UsageError: not NAME>=NUMBER or NAME<=NUMBER, or an unknown name.
    """
    found = CONDITION.fullmatch(text.replace(" ", ""))
    if found is None or not math.isfinite(float(found[3])):
        raise UsageError.build(
            "--constraint",
            "not a condition",
            found=repr(text),
            expected="NAME>=NUMBER or NAME<=...",
        )
    check_name(found[1], tasks, "--constraint", own=own, loss=loss, extra=INVALID)
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


def signs_of(records: Sequence[Record], metrics: Sequence[str] = ()) -> list[int]:
    """Of each record: 1 where its metric is better when greater, -1 where it is when smaller."""
    return [_sign(name) for name in metrics or [r["metric"] for r in records]]


def smaller_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """Scores beside the metric that are better when smaller, for a summary; empty without."""
    names = {name for r in records for name in r["scores"] if _sign(name) < 0}
    return {"smaller_is_better": sorted(names)} if names else {}


def worths_of(records: Sequence[Record], metrics: Sequence[str] = ()) -> list[float]:
    """The values, so that higher is better: the one rule by which a sweep or a search chooses."""
    signed = zip(signs_of(records, metrics), values_of(records, metrics), strict=True)
    return [sign * value for sign, value in signed]


def units_of(records: Sequence[Record], metrics: Sequence[str] = ()) -> set[str]:
    """The units of the tasks' measures, by a metric each, by their task's own where none is."""
    names = metrics or [r["metric"] for r in records]
    return units_of_measures(names, signs_of(records, names))


def check_units(where: str, records: Sequence[Record], metrics: Sequence[str] = ()) -> None:
    """Refuse measures that cannot be added or compared.

    Raises:
        DataError: naming them.
    """
    units = units_of(records, metrics)
    if len(units) > 1:
        raise DataError.build(
            where, "measures in different units have no common value",
            found=", ".join(metrics or [r["metric"] for r in records]),
            expected="measures in one unit",
            do=f"name each task, or {NORMALISED} where each has a module of its own",
        )  # fmt: skip


def mean_worths(points: Sequence[Sequence[Record]], metrics: Sequence[str] = ()) -> list[float]:
    """By what points are chosen, higher is better: the mean over the tasks; of measures in
    different units, minus the mean rank that a point has among them all.

    Args:
        points: the records of each, one for each task.
    """
    worths_pt = [worths_of(records, metrics) for records in points]
    if points and len(units_of(points[0], metrics)) > 1:
        columns_tp = list(zip(*worths_pt, strict=True))
        worths_pt = [
            [-_rank(w, column) for w, column in zip(worths, columns_tp, strict=True)]
            for worths in worths_pt
        ]
    return [sum(worths) / len(worths) for worths in worths_pt]


def _rank(worth: float, worths: Sequence[float]) -> float:
    """1 for the best; equals share the mean of their ranks."""
    return 1 + sum(w > worth for w in worths) + (sum(w == worth for w in worths) - 1) / 2


def _sign(metric: str) -> int:
    from pem_composition.evaluation.metrics import greater_is_better

    return 1 if greater_is_better(metric) else -1


def _by(record: Record, metric: str) -> float:
    if metric == LOSS:
        return float(record[LOSS])
    own = metric == record.get("metric", metric)
    return float(record["score"] if own else record["scores"][metric])
