"""What a module's negation costs and gains, task by task: the strengths of a grid on any tasks.

Rows are the base model, the module as it is applied, and its negation at every strength. Gains are
to the base model and paired row by row. Tasks to forget and tasks to keep have no common mean, and
nothing is selected: with one task of either the table and the frontier show what each strength
trades.
"""

from __future__ import annotations

from typing import Any

from pem_composition.report.records import SUBTRACTION, SUMMARY_VERSION
from pem_composition.sweep.engine import NO_MEAN, Plan
from pem_composition.sweep.goals import signs_of, smaller_of
from pem_composition.sweep.points import Point, alone
from pem_composition.sweep.runner import Runner
from pem_composition.tasks.data import VALIDATION

SPACE = "parameter"


def run(plan: Plan, runner: Runner) -> dict[str, Any]:
    """Score every strength, the coefficients of the plan's points with a minus sign.

    Returns the summary, which is also the last line of results.jsonl.
    """
    (module,) = plan.inputs
    named = {
        "base": ("base model", (0.0,), Point((), (), None)),
        "module": (f"{module.name} applied", (1.0,), alone(module)),
    }
    for (c,) in plan.points:
        if c not in (0.0, 1.0):
            row = f"negated, {-c:.12g}" if c < 0 else f"{module.name} applied, {c:.12g}"
            named[f"strength {-c:.12g}"] = (row, (c,), Point((module,), (c,), None))
    runner.share((target, VALIDATION) for *_, target in named.values())
    scored = {i: runner.score(target, VALIDATION) for i, (*_, target) in named.items()}
    rows = [
        {"id": i, "row": row, "coefficients": list(c), "keys": [r["key"] for r in scored[i]],
         "gains": _gains(runner, scored[i], scored["base"]), "mean": NO_MEAN}
        for i, (row, c, _) in named.items()
    ]  # fmt: skip
    summary = {
        "summary": SUMMARY_VERSION,
        "composition": SUBTRACTION,
        "command": plan.command,
        "modules": [module.name],
        "paths": [module.path],
        "kind": module.pem.kind,
        "base": runner.settings.base,
        "base_name": plan.base_name,
        "tasks": list(plan.tasks),
        "signs": signs_of(scored["base"]),
        **smaller_of(scored["base"]),
        "head": None,
        "rank": None,
        "select": VALIDATION,
        "report": VALIDATION,
        "shared_rows": [0] * len(plan.tasks),  # nothing is chosen on them
        "singles": [rows[1]["keys"]],
        "reference": None,
        "selected": {SPACE: []},
        "curve": {
            SPACE: sorted(
                ({name: row[name] for name in ("coefficients", "keys")} for row in rows),
                key=lambda point: point["coefficients"],
            )
        },
        "baseline": "base",
        "rows": rows,
        "average": None,
    }
    runner.store.conclude(summary)
    return summary


def _gains(runner: Runner, records: Any, base: Any) -> list[dict[str, float]]:
    """Of each task the difference to the base model, with its standard error."""
    pairs = zip(runner.splits[VALIDATION], records, base, strict=True)
    found = [rows.gain(record, [before]) for rows, record, before in pairs]
    return [{"gain": g, "gain_standard_error": e} for g, e in found]
