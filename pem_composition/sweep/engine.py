"""Score combinations of modules over a grid of coefficients: one process, one model, resumable.

The base model and the tokenised rows of every task are loaded once; each point's module is combined
in memory and folded into the base weights in place, so a point costs one evaluation per task and
nothing else. One line per point and task goes to results.jsonl as soon as it is known, under a key
of everything that it depends on (``evaluation/keys.py``). A finished point is never computed again,
and a changed input never meets an old result.

Coefficients are selected on the validation split, by the mean score over the tasks, and reported
on the test split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE, RULES
from pem_composition.arithmetic.methods.registry import SIMPLE
from pem_composition.evaluation.keys import shared_rows
from pem_composition.report.records import SUMMARY_VERSION, mean_of
from pem_composition.sweep.controls import ALONE, Controls, Line
from pem_composition.sweep.goals import mean_worths, normalised, signs_of, smaller_of, units_of
from pem_composition.sweep.points import PER_TASK, Input, Point, Settings, alone, point
from pem_composition.sweep.result_store import Record
from pem_composition.sweep.rows import Rows
from pem_composition.sweep.runner import Runner

SWEPT_SPACES = ("parameter", "delta")  # where none is named
NO_MEAN: dict[str, float | None] = dict.fromkeys(
    ("score", "standard_error", "gain", "gain_standard_error")
)
MERGE, ANALOGY = "merge", "analogy"

Coefficients = Sequence[float]
Curve = list[tuple[Coefficients, list[Record]]]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sweep scores: modules, points per space, and modules to compare with.

    Attributes:
        inputs: the modules of the sum; of an analogy classifier, target_lm, source_lm.
        composition: merge (gains are against the average of the modules, or with a head per task
            against the task's own module) or analogy (against the classifier alone).
        tasks: names of the tasks as the user knows them, in the order of the runner's rows.
        metrics: for each task the metric that selects; none: its own.
        controls: of the selected merge, an exact sum where there is one.
        rule: of the coefficients that equal weights are.
        max_invalid: also choose among the points at which no task has a larger share of invalid
            answers; text-to-text models lose the format of the answer before they lose the answer.
    """

    inputs: tuple[Input, ...]
    points: tuple[tuple[float, ...], ...]
    tasks: tuple[str, ...]
    spaces: tuple[str, ...] = SWEPT_SPACES
    composition: str = MERGE
    reference: Input | None = None
    base_name: str = ""
    max_invalid: float | None = None
    metrics: tuple[str, ...] = ()
    command: str = ""
    controls: Controls | None = None
    rule: str = DEFAULT_RULE

    @property
    def singles(self) -> tuple[Input, ...]:
        """The modules that are scored alone: a language model answers no task."""
        return self.inputs if self.composition == MERGE else self.inputs[:1]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table: its line, its record on each task, and those with new last layers."""

    line: Line
    records: list[Record]
    refitted: list[Record] | None = None


class Compared(Protocol):
    """What the summary and the gains need to know of a sweep or a search."""

    @property
    def inputs(self) -> tuple[Input, ...]: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def base_name(self) -> str: ...
    @property
    def command(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def singles(self) -> tuple[Input, ...]: ...
    @property
    def composition(self) -> str: ...
    @property
    def controls(self) -> Controls | None: ...


def run(plan: Plan, runner: Runner, select: str, report: str) -> dict[str, Any]:
    """Score the grid on ``select``, choose a point per space, score the table's rows on ``report``.

    Returns the summary, which is also the last line of results.jsonl: the curve and the table's
    rows, each by the keys of its points, one per task.
    """
    # One beyond its dtype is refused before any score: of sums the largest in any case, and every
    # point where the dtype of the output is asked for.
    for space in plan.spaces if runner.settings.method == SIMPLE else ():
        largest = max(plan.points, key=lambda c: sum(map(abs, c)))
        point(plan.inputs, largest, space, runner.settings).module(runner.settings)
    for target in _targets(plan, runner.settings):
        target.check(runner.settings)
    runner.share(((t, select) for t in _targets(plan, runner.settings)), choosing=True)
    curves: dict[str, Curve] = {
        space: [
            (list(c), runner.choose(point(plan.inputs, c, space, runner.settings), select))
            for c in plan.points
        ]
        for space in plan.spaces
    }
    singles = [runner.choose(alone(module), select) for module in plan.singles]
    ceiling = runner.choose(alone(plan.reference), select) if plan.reference is not None else None
    chosen = {
        space: _selected(curve, plan.composition, plan.metrics) for space, curve in curves.items()
    }
    valid = _selected_valid(curves, plan)
    table = _table(plan, runner.settings, chosen, valid)
    space = "delta" if "delta" in chosen else plan.spaces[0]
    merge = next(
        line for line in table if line.id == _name(plan, runner.settings, "selected", space)
    )
    rows = score_table(table, merge, plan.controls, runner, report)
    summary = {
        "summary": SUMMARY_VERSION,
        **setting(plan, runner, singles[0], select, report),
        "singles": [_keys(records) for records in singles],
        "reference": None if ceiling is None else _keys(ceiling),
        "selected": {space: list(c) for space, c in chosen.items()},
        "max_invalid": plan.max_invalid,
        "selected_valid": {space: list(c) for space, c in valid.items()},
        "curve": {
            space: [{"coefficients": c, "keys": _keys(records)} for c, records in curve]
            for space, curve in curves.items()
        },
        **compared(plan, runner.settings, runner.splits[report], rows, merge),
    }
    runner.store.conclude(summary)
    return summary


def score_table(
    table: Sequence[Line], merge: Line, controls: Controls | None, runner: Runner, split: str
) -> list[Row]:
    """The rows of a table and, where they are wanted, the controls of one of them."""

    target = merge.target if isinstance(merge.target, Point) and merge.target.space else None
    if controls is not None and target is None:
        runner.say(f"note: {merge.name} is one module as it is, which has no controls")

    def lines() -> Iterator[Line]:  # random modules are drawn when their turn comes
        yield from table
        if controls is not None and target is not None:
            yield from controls.of(target, runner.settings)

    runner.share((line.target, split) for line in lines())
    return [
        Row(
            replace(line, target=()),
            runner.score(line.target, split),
            runner.refit(line.target, split),
        )
        for line in lines()
    ]


def _targets(plan: Plan, settings: Settings) -> Iterator[Point]:
    """Every point of the selection rows."""
    for space in plan.spaces:
        yield from (point(plan.inputs, c, space, settings) for c in plan.points)
    yield from map(alone, (*plan.singles, *([plan.reference] if plan.reference else [])))


def _table(
    plan: Plan,
    settings: Settings,
    chosen: dict[str, Coefficients],
    valid: dict[str, Coefficients],
) -> list[Line]:
    """Rows of the table: modules alone, and for each space equal weights and what was selected."""
    control = ALONE if plan.controls is not None else ""
    rows = [Line(f"module {n}", i.name, (), alone(i), control) for n, i in enumerate(plan.singles)]
    if plan.reference is not None:
        name = f"{plan.reference.name} (reference)"
        rows.append(Line("reference", name, (), alone(plan.reference)))
    equal, how_equal = equal_weights(plan.rule, len(plan.inputs))
    for space in plan.spaces:
        merged = [(how_equal, equal)] if plan.composition == MERGE else []
        within = [("selected, valid", valid[space])] if space in valid else []
        for how, c in (*merged, ("selected", chosen[space]), *within):
            name = _name(plan, settings, how, space)
            rows.append(Line(name, name, c, point(plan.inputs, c, space, settings)))
    return rows


def equal_weights(rule: str, modules: int) -> tuple[tuple[float, ...], str]:
    """The coefficients of a rule, and what the row is called."""
    named = "equal weights" if rule == DEFAULT_RULE else f"equal weights {RULES[rule].name}"
    return RULES[rule].of(modules), named


def _name(plan: Plan, settings: Settings, how: str, space: str) -> str:
    what = plan.composition if settings.method == SIMPLE else settings.method
    return f"{what}, {how}, {space} space"


def setting(
    plan: Compared, runner: Runner, records: Sequence[Record], select: str, report: str
) -> dict[str, Any]:
    """What a sweep or a search was about.

    Of each task it counts how many reported rows are among those that are selected on, and among
    those that new last layers are fitted on, by content.
    """
    module, settings = plan.inputs[0].pem, runner.settings
    seen = {"shared_rows": [rows.examples for rows in runner.splits[select]]}
    if runner.refitting is not None:
        seen["refit_shared_rows"] = list(runner.refitting.rows)
    shown = [rows.examples for rows in runner.splits[report]]
    return {
        "composition": plan.composition,
        "command": plan.command,
        "modules": [i.name for i in plan.inputs],
        "paths": [i.path for i in plan.inputs],
        "kind": module.kind,
        "base": settings.base,
        "base_name": plan.base_name,
        "tasks": list(plan.tasks),
        "signs": signs_of(records),
        **smaller_of(records),
        "head": settings.head if module.head_names else None,
        "rank": settings.rank,
        **({} if settings.method == SIMPLE else {"method": settings.method}),
        **({} if settings.dtype is None else {"dtype": settings.dtype}),
        "select": select,
        "report": report,
        **{name: list(map(shared_rows, of, shown)) for name, of in seen.items()},
        "selected_by": list(plan.metrics),
        **({"refit_select": True} if runner.chooses_refitted else {}),
    }


def compared(
    plan: Compared, settings: Settings, tasks: Sequence[Rows], rows: Sequence[Row], merge: Line
) -> dict[str, Any]:
    """The rows with their gains over the baseline, per task and in the mean over the tasks; with
    controls or new last layers also their differences to a merge."""
    own = settings.head == PER_TASK
    singles = [row.records for row in rows[: len(plan.singles)]]
    per_task: list[Sequence[Record]] = list(zip(*singles, strict=True))
    if own:
        per_task = [(records[place],) for place, records in enumerate(per_task)]
    anchor = next(row for row in rows if row.line.id == merge.id)
    against_merge = plan.controls is not None or anchor.refitted is not None
    out = []
    for row in rows:
        found = {"gain": _paired(tasks, row.records, per_task)}
        if against_merge:
            found["difference"] = _paired(tasks, row.records, [[r] for r in anchor.records])
        if row.refitted is not None and anchor.refitted is not None:
            found["refit"] = [(r["score"], r["standard_error"]) for r in row.refitted]
            against = [[r] for r in anchor.refitted]
            found["refit_difference"] = _paired(tasks, row.refitted, against)
        control = {"control": row.line.control} if row.line.control else {}
        refitted = {} if row.refitted is None else {"refit_keys": _keys(row.refitted)}
        out.append(
            {
                "id": row.line.id,
                "row": row.line.name,
                "coefficients": list(row.line.coefficients),
                **control,
                "keys": _keys(row.records),
                **refitted,
                "gains": [
                    _flat(dict(zip(found, one, strict=True)))
                    for one in zip(*found.values(), strict=True)
                ],
                "mean": _mean(row.records, found, per_task if own else None),
            }
        )
    over_modules = plan.composition == MERGE
    averages = [task.average(others) for task, others in zip(tasks, per_task, strict=True)]
    return {
        "baseline": "own module" if own else "average" if over_modules else "module 0",
        **({"controlled": merge.id} if against_merge else {}),
        "rows": out,
        "average": _average(averages) if over_modules and not own else None,
    }


def _paired(
    tasks: Sequence[Rows], records: Sequence[Record], against: Sequence[Sequence[Record]]
) -> list[tuple[float, float]]:
    """Of each task the gain over the mean of others, with its standard error."""
    return [t.gain(r, others) for t, r, others in zip(tasks, records, against, strict=True)]


def _flat(estimates: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """As columns: a value and its standard error."""
    errors = {f"{name}_standard_error": e for name, (_, e) in estimates.items()}
    return {name: value for name, (value, _) in estimates.items()} | errors


def _mean(
    records: Sequence[Record],
    found: Mapping[str, Sequence[tuple[float, float]]],
    own: Sequence[Sequence[Record]] | None,
) -> dict[str, float | None]:
    """Mean of scores, gains and differences over the tasks; with a head per task also of score /
    own score.

    Measures in different units have no mean.
    """
    score, error = mean_of((r["score"], r["standard_error"]) for r in records)
    columns = _flat({name: mean_of(pairs) for name, pairs in found.items()})
    mean: dict[str, float | None] = {"score": score, "standard_error": error, **columns}
    if len(units_of(records)) > 1:
        mean = dict.fromkeys(mean)
    if own is not None:
        mean["normalised"] = normalised(records, [alone for (alone,) in own])
    return mean


def _average(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(units_of(tasks)) > 1:
        return {"tasks": list(tasks), "mean": dict.fromkeys(("score", "standard_error"))}
    score, error = mean_of((t["score"], t["standard_error"]) for t in tasks)
    return {"tasks": list(tasks), "mean": {"score": score, "standard_error": error}}


def _selected(
    curve: Iterable[tuple[Coefficients, Sequence[Record]]],
    composition: str,
    metrics: Sequence[str] = (),
) -> tuple[float, ...]:
    """Coefficients of the best mean score among true mixtures, 0 < |c| < 1 for every module; where
    the tasks' measures have different units, of the best mean rank (``goals.mean_worths``).

    A single module is no mixture: choosing among them too would let a merge borrow the better one's
    score; and a module with coefficient 0 is left out of the merge. Such points count only where
    the grid has nothing else. Of equals, the most even merge, or the analogy that keeps most of
    the classifier.
    """
    points = [(tuple(c), records) for c, records in curve]
    inner = [(c, r) for c, r in points if all(0 < abs(x) < 1 for x in c)] or points
    worths = mean_worths([records for _, records in inner], metrics)

    def rank(candidate: tuple[float, tuple[float, ...]]) -> tuple[float, float]:
        worth, c = candidate
        return worth, -sum(x * x for x in c) if composition == MERGE else c[0]

    return max(zip(worths, (c for c, _ in inner), strict=True), key=rank)[1]


def _selected_valid(curves: dict[str, Curve], plan: Plan) -> dict[str, Coefficients]:
    """The same choice among the points that keep the format; no entry where none does."""
    found: dict[str, Coefficients] = {}
    if plan.max_invalid is None:
        return found
    for space, curve in curves.items():
        kept = [
            (c, records)
            for c, records in curve
            if all((r["invalid_share"] or 0.0) <= plan.max_invalid for r in records)
        ]
        if kept:
            found[space] = _selected(kept, plan.composition, plan.metrics)
    return found


def _keys(records: Sequence[Record]) -> list[str]:
    return [record["key"] for record in records]
