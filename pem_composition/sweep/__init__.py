"""Score combinations of modules over a grid of coefficients: one process, one model, resumable.

The base model and the tokenised rows are loaded once; each point's module is combined in memory
and folded into the base weights in place, so a point costs one evaluation and nothing else. One
line per point goes to results.jsonl as soon as it is known, under a key made of content: module
files, base model, rows, metric code, space, coefficients. A finished point is never computed again,
and a changed input never meets an old result.

Coefficients are selected on the validation split and reported on the test split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pem_composition.sweep.bench import Bench, Rows
from pem_composition.sweep.ledger import Ledger
from pem_composition.sweep.points import Input, Point, Settings, alone, digest_of, grid, point

__all__ = [
    "SPACES",
    "TEST",
    "VALIDATION",
    "Bench",
    "Input",
    "Ledger",
    "Plan",
    "Point",
    "Rows",
    "Settings",
    "alone",
    "digest_of",
    "grid",
    "point",
    "run",
]

SPACES = ("parameter", "delta")
VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sweep scores: two modules (or more), points per space, and modules to compare with."""

    inputs: tuple[Input, ...]
    points: tuple[tuple[float, ...], ...]
    spaces: tuple[str, ...] = SPACES
    reference: Input | None = None
    base_name: str = ""


def run(plan: Plan, bench: Bench, select: str, report: str) -> dict[str, Any]:
    """Score the grid on ``select``, choose a point per space, score the table's rows on ``report``.

    Returns the summary, which is also the last line of results.jsonl: the curve and the table's
    rows, each by the keys of its points.
    """
    curve = {
        space: [
            (list(c), bench.score(point(plan.inputs, c, space, bench.settings.head), select))
            for c in plan.points
        ]
        for space in plan.spaces
    }
    for module in plan.inputs:
        bench.score(alone(module), select)
    chosen = {space: _selected(curve[space]) for space in plan.spaces}
    rows = [
        (row, name, c, bench.score(target, report))
        for row, name, c, target in _table(plan, bench.settings, chosen)
    ]
    summary = _summarise(plan, bench, select, report, curve, rows, chosen)
    if bench.ledger.last != summary:
        bench.ledger.append(summary)
    return summary


def _table(
    plan: Plan, settings: Settings, chosen: Mapping[str, tuple[float, ...]]
) -> list[tuple[str, str, tuple[float, ...], Point]]:
    """Rows of the table: what they are, their name, coefficients, and the point to score."""
    rows = [(f"module {n}", i.name, (), alone(i)) for n, i in enumerate(plan.inputs)]
    if plan.reference is not None:
        rows.append(("reference", f"{plan.reference.name} (reference)", (), alone(plan.reference)))
    equal = (1.0 / len(plan.inputs),) * len(plan.inputs)
    for space in plan.spaces:
        for how, c in (("equal weights", equal), ("selected", chosen[space])):
            name = f"merge, {how}, {space} space"
            rows.append((name, name, c, point(plan.inputs, c, space, settings.head)))
    return rows


def _summarise(
    plan: Plan,
    bench: Bench,
    select: str,
    report: str,
    curve: Mapping[str, Sequence[tuple[list[float], dict[str, Any]]]],
    rows: Sequence[tuple[str, str, tuple[float, ...], dict[str, Any]]],
    chosen: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The line that ties the points of one sweep together, for tables and plots."""
    settings, split = bench.settings, bench.splits[report]
    singles = [record for *_, record in rows[: len(plan.inputs)]]
    gains = [split.gain(record, singles) for *_, record in rows]
    return {
        "summary": 1,
        "modules": [i.name for i in plan.inputs],
        "kind": plan.inputs[0].pem.kind,
        "base": settings.base,
        "base_name": plan.base_name,
        "task": settings.task,
        "head": settings.head,
        "rank": settings.rank,
        "select": select,
        "report": report,
        "singles": [bench.score(alone(i), select)["key"] for i in plan.inputs],
        "selected": {space: list(c) for space, c in chosen.items()},
        "curve": {
            space: [{"coefficients": c, "key": r["key"]} for c, r in points]
            for space, points in curve.items()
        },
        "rows": [
            {
                "id": row,
                "row": name,
                "coefficients": list(c),
                "key": record["key"],
                "gain": gain,
                "gain_standard_error": error,
            }
            for (row, name, c, record), (gain, error) in zip(rows, gains, strict=True)
        ],
        "average": split.average(singles),
    }


def _selected(curve: Iterable[tuple[Sequence[float], Mapping[str, Any]]]) -> tuple[float, ...]:
    """Coefficients of the best score among true mixtures (0 < c < 1); of equals, the most even.

    The end points are the single modules: choosing among them too would let a merge borrow the
    better one's score. They count only where the grid has nothing else.
    """
    points = [(tuple(c), r) for c, r in curve]
    inner = [(c, r) for c, r in points if all(0 < x < 1 for x in c)] or points
    best = min(inner, key=lambda p: (-_score(p[1]), sum(x * x for x in p[0])))
    return best[0]


def _score(record: Mapping[str, Any]) -> float:
    score = record["score"]
    return -math.inf if score is None else float(score)
