"""Tables of sweeps and searches, as Markdown and CSV: one of them, or the mean of several (seeds).

``rows`` is the table as a data frame of numbers: one line per row and task, and per row and mean
over the tasks. Everything that is written is made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pem_composition.report import text
from pem_composition.report.records import (
    SUBTRACTION,
    Results,
    averaged,
    overlap_note,
    read,
    refit_note,
    setting_of,
)

COLUMNS = (
    "row", "coefficients", "task", "metric", "score", "standard_error", "gain",
    "gain_standard_error", "auc", "predicted_share", "invalid_share", "n", "note",
)  # fmt: skip
COSTS = ("normalised", "rank", "seconds")  # further columns of a search
CONTROLS = ("control", "difference", "difference_standard_error")  # of a table with controls
REFITTED = (
    "refit", "refit_standard_error", "refit_difference", "refit_difference_standard_error",
)  # fmt: skip  # of new last layers
SPREAD = ("difference", "refit", "refit_difference", "auc")  # also as means over several sweeps
SIGNED = ("difference", "refit_difference")
TITLES = ("minus the {}", "with new heads", "with new heads minus the {}", "AUC")  # merge, analogy
SAME = 2.0  # standard errors: what differs by less is marked
MARK = " ~"
AVERAGE = "average of the modules"
MEAN = "mean"  # over the tasks
NOTED_INVALID = 0.03  # a larger share of answers outside the format is said beside the score
BASELINES = {
    "average": "the average of the modules",
    "own module": "the task's own module",
    "module 0": "the classifier (module 0)",
    "base": "the base model",
}
KEPT = ("metric", "score", "standard_error", "auc", "predicted_share", "n")
OWN_HEADS = (
    "Each task is scored with the head of its own module; normalised: the mean over the tasks of "
    "score / score of the task's own module, without tasks where that is not two standard errors "
    "above 0."
)


def rows(results: Results) -> pd.DataFrame:
    """Modules, their average, merges, in the order of the table; numbers, not text."""
    s = results.summary
    tasks, several = s["tasks"], len(s["tasks"]) > 1
    costs = s.get("costs") or [None] * len(s["rows"])
    lines = []
    for entry, cost in zip(s["rows"], costs, strict=True):
        named = {name: entry[name] for name in ("id", "row", "coefficients")} | dict(cost or {})
        named |= {"control": entry.get("control")}
        records = results.scored(entry["keys"])
        for task, record, gain in zip(tasks, records, entry["gains"], strict=True):
            numbers = {name: record[name] for name in KEPT} | dict(gain)
            share = record.get("invalid_share")  # files of the first release have none
            numbers |= {"invalid_share": share, "note": _note(record)}
            lines.append({**named, "task": task, **numbers})
        if several:
            lines.append({**named, "task": MEAN, **entry["mean"]})
        if s["average"] is not None and entry["id"] == f"module {len(s['modules']) - 1}":
            lines += _average(s)
    for line in lines:
        if line["id"] == s["baseline"]:  # a gain over itself says nothing
            line |= {"gain": None, "gain_standard_error": None}
        if line["id"] == s.get("controlled"):
            names = (n for n in (*CONTROLS, *REFITTED) if "difference" in n)
            line |= dict.fromkeys(names)
    return text.frame_of(lines).reindex(columns=["id", *COLUMNS, *CONTROLS, *REFITTED, *COSTS])


def _average(s: Mapping[str, Any]) -> list[dict[str, Any]]:
    named = {"id": "average", "row": AVERAGE, "coefficients": []}
    cells = [{"task": t, **a} for t, a in zip(s["tasks"], s["average"]["tasks"], strict=True)]
    cells += [{"task": MEAN, **s["average"]["mean"]}] if len(s["tasks"]) > 1 else []
    return [{**named, **cell} for cell in cells]


def _note(record: Mapping[str, Any]) -> str:
    """What a reader must know of a score: one answer to (nearly) everything, or no answer."""
    notes = []
    if record["degenerate"]:
        word, share = max(record["predicted_share"].items(), key=lambda item: item[1])
        notes.append(f"predicts one class ({word}, {share:.0%})")
    invalid = record.get("invalid_share") or 0.0
    if invalid > NOTED_INVALID:
        notes.append(f"{invalid:.0%} invalid answers")
    return ", ".join(notes)


def shown(results: Results) -> tuple[list[text.Column], list[str]]:
    """The columns of the table, and what is said below it."""
    return list(_columns(results, rows(results))), _footnotes(results)


def markdown(results: Results) -> str:
    """One sweep or search as a Markdown table with its heading."""
    columns, notes = shown(results)
    heading = f"**{', '.join(results.summary['tasks'])}**, {subject(results)}"
    return "\n".join([heading, "", text.markdown(columns), "", *notes])


def _columns(results: Results, frame: pd.DataFrame) -> Iterator[text.Column]:
    """Of one task everything that is known; of several a score each, their mean and its gain."""
    s, tasks = results.summary, results.summary["tasks"]
    cells = [frame[frame["task"] == task].to_dict("records") for task in tasks]
    last = frame[frame["task"] == MEAN].to_dict("records") if len(tasks) > 1 else cells[0]
    form = ".3g" if results.is_search else "g"
    yield "module", [_title(s, c) for c in last]
    yield "coefficients", [" ".join(f"{x:{form}}" for x in c["coefficients"]) for c in last]
    alone = len(tasks) == 1 and not results.is_search
    by_task = s["composition"] == SUBTRACTION or not results.common_mean
    for task, own in zip(tasks, cells, strict=True):
        metric = own[0]["metric"]
        title = metric if alone else f"{task} {metric} (n = {own[0]['n']})"
        yield title, [text.with_error(c["score"], c["standard_error"]) for c in own]
        if by_task:
            yield (
                f"{task} against {_baseline(results)}",
                [text.with_error(c["gain"], c["gain_standard_error"], sign=True) for c in own],
            )
    if len(tasks) > 1 and not by_task:
        yield MEAN, [text.with_error(c["score"], c["standard_error"]) for c in last]
    if any(not text.absent(c.get("normalised")) for c in last):
        yield "normalised", [text.with_error(c.get("normalised")) for c in last]
    gain = "gain of the mean over" if len(tasks) > 1 else "gain over"
    if not by_task:
        yield (
            f"{gain} {_baseline(results)}",
            [text.with_error(c["gain"], c["gain_standard_error"], sign=True) for c in last],
        )
    against, fresh, fresh_against, auc = (t.format(compared_with(s["composition"])) for t in TITLES)
    if "controlled" in s:
        for task, own in zip(tasks, cells, strict=True) if by_task else [("", last)]:
            yield f"{task} {against}".strip(), [_difference(c) for c in own]
            if any(not text.absent(c["refit"]) for c in own):
                scores = [text.with_error(c["refit"], c["refit_standard_error"]) for c in own]
                yield f"{task} {fresh}".strip(), scores
                yield (
                    f"{task} {fresh_against}".strip(),
                    [_difference(c, "refit_difference") for c in own],
                )
    if alone and any(not text.absent(c["auc"]) for c in last):
        yield auc, [text.with_error(c["auc"]) for c in last]
    if alone and any(isinstance(c["predicted_share"], Mapping) for c in last):
        yield "predicted share", [_shares(c["predicted_share"]) for c in last]
    if any(not text.absent(c["invalid_share"]) for own in cells for c in own):
        shares = [" ".join(map(_invalid, across)) for across in zip(*cells, strict=True)]
        yield "invalid" + ("" if alone else f" ({', '.join(tasks)})"), shares
    if alone:
        yield "n", [c["n"] for c in last]
    if results.is_search:
        yield "rank", ["" if text.absent(c["rank"]) else c["rank"] or "" for c in last]
        yield "merge (s)", [text.with_error(c["seconds"], digits=2) for c in last]
    notes = [[c for c in across if isinstance(c["note"], str) and c["note"]]
             for across in zip(*cells, strict=True)]  # fmt: skip
    if any(notes) or not results.is_search:
        named = [[c["note"] if alone else f"{c['task']}: {c['note']}" for c in n] for n in notes]
        yield "", ["; ".join(own) for own in named]


def compared_with(composition: str) -> str:
    """What differences are to; a search finds merges."""
    return composition if composition == "analogy" else "merge"


def _difference(cell: Mapping[str, Any], name: str = "difference") -> str:
    """A difference to the merge that controls are of, marked where it may be none."""
    value, error = cell[name], cell[f"{name}_standard_error"]
    shown = text.with_error(value, error, sign=True)
    return shown + (MARK if shown and is_same(value, error) else "")


def merges_of(s: Mapping[str, Any]) -> list[str]:
    """Rows of merges, by what they are: no module alone, no control."""
    alone = ("module ", "reference", "compared ")
    return [
        row["id"] for row in s["rows"] if "control" not in row and not row["id"].startswith(alone)
    ]


def is_same(difference: float, error: float) -> bool:
    """True for a difference below two standard errors, or of exactly 0."""
    return abs(difference) < SAME * error or difference == 0


def _title(s: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A row's name; of what a search found, its settings and whether it is the best."""
    entry = next((e for e in s.get("studies", ()) if row["row"] == f"best {e['study']}"), None)
    if entry is None:
        return str(row["row"])
    own = {
        k: v for k, v in entry["candidate"].items() if k != "c" and not k[1:].isdecimal()
    }  # besides coefficients
    shown = ", ".join(
        f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in own.items()
    )
    settings = f" ({shown})" if shown else ""
    missed = " (misses a condition)" if entry["violation"] else ""
    return f"{row['row']}{settings}{missed}{' *' if entry['study'] == s['best'] else ''}"


def _baseline(results: Results) -> str:
    """What gains are against, as a reader calls it."""
    named = {
        "average": "the average",
        "own module": BASELINES["own module"],
        "base": BASELINES["base"],
    }
    return named.get(results.summary["baseline"]) or str(results.summary["modules"][0])


def _shares(shares: Any) -> str:
    return (
        " ".join(f"{w} {s:.2f}" for w, s in shares.items()) if isinstance(shares, Mapping) else ""
    )


def _invalid(cell: Mapping[str, Any]) -> str:
    return "-" if text.absent(cell["invalid_share"]) else f"{cell['invalid_share']:.2f}"


def subject(results: Results) -> str:
    """What was added, in words."""
    s = results.summary
    heads = f", heads: {s['head']}" if s["head"] else ""
    if s["composition"] == "analogy":
        classifier, target, source = s["modules"]
        return f"{classifier} + ({target} - {source}), {s['kind']} modules{heads}"
    names = s["modules"]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{s['kind']} modules {listed}{heads}"


def _footnotes(results: Results) -> list[str]:
    s = results.summary
    notes = [_searched(s) if results.is_search else _selected(results)]
    smaller = [t for t, sign in zip(s["tasks"], s["signs"], strict=True) if sign < 0]
    if smaller:
        of = f" of {', '.join(smaller)}" if len(smaller) < len(s["tasks"]) else ""
        notes.append(f"Smaller is better{of}.")
    if not results.common_mean and s["composition"] != SUBTRACTION:
        notes.append("Measures in different units have no common mean.")
    if s["baseline"] == "own module":
        notes.append(OWN_HEADS)
    notes.append(overlap_note(results))
    return [" ".join(filter(None, notes)), *_controlled(results)]


def _controlled(results: Results) -> list[str]:
    """What differences are to, controls that the merge does not differ from, what heads are new."""
    s = results.summary
    if "controlled" not in s:
        return []
    frame = rows(results)
    last = frame[frame["task"] == (MEAN if len(s["tasks"]) > 1 else s["tasks"][0])]
    controls = last[last["control"].notna() & last["difference"].notna()].to_dict("records")
    same = [
        str(c["row"]) for c in controls if is_same(c["difference"], c["difference_standard_error"])
    ]
    notes = [
        f"Differences are to the row {s['controlled']!r} and paired over the same rows; ~ marks "
        "those below two standard errors."
    ]
    if same:
        notes.append(f"Controls from which it does not differ: {'; '.join(same)}.")
    elif controls:
        notes.append("It differs from every control.")
    if last["refit"].notna().any():
        notes.append(refit_note(results))
    return [" ".join(notes)]


def _by_new_heads(summary: Mapping[str, Any]) -> str:
    return " with new heads" if summary.get("refit_select") else ""


def _selected(results: Results) -> str:
    s = results.summary
    if s["composition"] == SUBTRACTION:
        return (
            "The module is added to the base model with the coefficient. +- is one standard error "
            "over the rows, that of a difference is paired."
        )
    what = "mean" if results.common_mean else "mean rank"
    mean = f" by the {what} over the tasks" if len(s["tasks"]) > 1 else ""
    by = f" by {', '.join(s['selected_by'])}" if s.get("selected_by") else mean
    by += _by_new_heads(s)
    note = (
        f"Coefficients selected{by} on the {s['select']} rows, table on the {s['report']} rows; "
        "+- is one standard error over the rows."
    )
    if s["composition"] == "analogy":
        note += " t, 1 - t, t - 1 are the coefficients of the three modules in this order."
    if s.get("max_invalid") is not None:
        note += f" Valid: at most {s['max_invalid']:.0%} invalid answers on the {s['select']} rows."
    return note


def _searched(s: Mapping[str, Any]) -> str:
    tried = sum(e["tried"] for e in s["studies"])
    conditions = f" with {' and '.join(s['constraints'])}" if s["constraints"] else ""
    by = " and ".join(s["goals"]) + _by_new_heads(s) + conditions
    return (
        f"{tried} trials ({s['sampler']}, seed {s['seed']}), chosen by {by}"
        f" on the {s['select']} rows; the table is on the {s['report']} rows. * best "
        "on the selection rows. +- is one standard error over the rows, that of a gain is paired."
    )


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv of one sweep or search into ``out``; returns the Markdown."""
    found = read(results)
    frame = rows(found)
    columns = (*COLUMNS, *(CONTROLS if "controlled" in found.summary else ()))
    columns += REFITTED if frame["refit"].notna().any() else ()
    columns += COSTS if found.is_search else ()
    return text.write(out, markdown(found), frame, columns)


# --- several ---


def aggregate(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Mean over several of one setting, with the sample standard deviation between them.

    Rows are matched by what they are (module 1, average, equal weights in delta space, ...) and by
    task, whichever sweeps have them, and ``name`` is the name that all of them give to it, where
    they agree; a sweep that is named twice counts once. Sweeps of different tasks, rows, bases,
    kinds, head policies, compositions, lengths, prompts, precisions or ways to select make separate
    groups, and every line says what tells its group from the others.

    Raises:
        DataError: no paths, or a file without a finished sweep.
    """
    return text.frame_of(averaged(paths, _setting, _mean_lines))


def _setting(found: Results) -> dict[str, Any]:
    """What the sweeps of a group have in common."""
    s = found.summary
    names = ("tasks", "kind", "base_name", "head", "rank", "composition", "goals", "penalty")
    names += ("constraints", "sampler", "baseline")
    return {
        **{n: s.get(n) or None for n in names},
        "modules": len(s["modules"]),
        **setting_of(found),
    }


def _mean_lines(sweeps: Sequence[Results]) -> Iterator[dict[str, Any]]:
    """Sweeps of one setting, row by row."""
    s = sweeps[0].summary
    first = sweeps[0].scored(s["rows"][0]["keys"])
    counts = {task: record["n"] for task, record in zip(s["tasks"], first, strict=True)}
    every = pd.concat([rows(sweep) for sweep in sweeps], ignore_index=True)
    for (identity, task), same in every.groupby(["id", "task"], sort=False):
        if task == MEAN and same["score"].isna().all():
            continue
        metric = same["metric"].iloc[0]
        names = list(same["row"].unique())
        yield {
            "task": f"{MEAN} of {', '.join(s['tasks'])}" if task == MEAN else task,
            "kind": s["kind"],
            "base": s["base_name"],
            "composition": s["composition"],
            "row": identity,
            "name": names[0] if len(names) == 1 else identity,
            "rows": s.get("report"),
            "n": counts.get(task),
            "sweeps": len(same),
            "metric": metric if isinstance(metric, str) else "",
            "baseline": BASELINES[s["baseline"]],
            **text.spread(same, ("score", "gain", *SPREAD, *COSTS)),
            "compared": int(same["difference"].notna().sum()) or None,
            "invalid_share": text.spread(same, ["invalid_share"])["invalid_share"],
            "one_class": int(same["note"].astype(str).str.contains("one class").sum()),
        }


def aggregate_columns(frame: pd.DataFrame) -> list[str]:
    """Columns of the aggregated CSV: those that hold anything."""
    costs = ["compared", *(c for name in (*SPREAD, *COSTS) for c in (name, f"{name}_spread"))]
    return [c for c in frame.columns if c not in costs or frame[c].notna().any()]


def aggregate_markdown(frame: pd.DataFrame) -> str:
    """Aggregated rows as Markdown; +- is the standard deviation between sweeps."""
    lines = frame.to_dict("records")

    def estimates(name: str, digits: int = 4, *, sign: bool = False) -> list[str]:
        return [text.with_error(x[name], x[f"{name}_spread"], digits, sign=sign) for x in lines]

    named = ("task", "kind", "base", "rows", "n", "name", "sweeps")
    titles = [*named[:-2], "module", "sweeps"]
    columns: list[text.Column] = [
        (title, ["" if text.absent(x[name]) else x[name] for x in lines])
        for title, name in zip(titles, named, strict=True)
    ]
    scores = zip(estimates("score"), lines, strict=True)
    columns.append(("score", [f"{score} {x['metric']}".rstrip() for score, x in scores]))
    columns.append(("gain over the baseline", estimates("gain", sign=True)))
    what = " or ".join(dict.fromkeys(compared_with(x["composition"]) for x in lines))
    for name, title in zip(SPREAD, TITLES, strict=True):
        if frame[name].notna().any():
            columns.append((title.format(what), estimates(name, sign=name in SIGNED)))
    for name, title, digits in (("normalised", "normalised", 4), ("rank", "rank", 0),
                                ("seconds", "merge (s)", 2)):  # fmt: skip
        if frame[name].notna().any():
            columns.append((title, estimates(name, digits)))
    columns.append(("", [_remark(x) for x in lines]))
    columns += text.settings(lines)
    baselines = " or ".join(dict.fromkeys(x["baseline"] for x in lines))
    explained = f"+- is the standard deviation between sweeps. Gains are over {baselines}."
    return "\n".join([text.markdown(columns), "", explained])


def _remark(row: Mapping[str, Any]) -> str:
    remarks = []
    if row["one_class"]:
        remarks.append(f"predicts one class in {row['one_class']} of {row['sweeps']}")
    if not text.absent(row["invalid_share"]) and row["invalid_share"] > NOTED_INVALID:
        remarks.append(f"{row['invalid_share']:.0%} invalid answers")
    if row["compared"] and row["compared"] < row["sweeps"]:
        remarks.append(f"the difference of {row['compared']:.0f} of {row['sweeps']}")
    return ", ".join(remarks)
