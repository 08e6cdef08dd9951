"""Tables from results.jsonl, as Markdown and CSV: one sweep, or the mean of several (seeds)."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError
from pem_composition.report.records import Results, distinct, overlap_note, read, setting_of

COLUMNS = (
    "row",
    "coefficients",
    "task",
    "metric",
    "score",
    "standard_error",
    "gain",
    "gain_standard_error",
    "auc",
    "predicted_share",
    "invalid_share",
    "n",
    "note",
)
AVERAGE = "average of the modules"
MEAN = "mean"  # over the tasks
NOTED_INVALID = 0.03  # a larger share of answers outside the format is said beside the score

Line = dict[str, Any]


def rows_of(results: Results) -> list[Line]:
    """The table's rows in order: modules, their average, merges; numbers, not text.

    Each has ``cells``: one dict per task and, for several tasks, one for their mean.
    """
    summary = results.summary
    rows = [_row(results, entry) for entry in summary["rows"]]
    if summary["average"] is not None:
        rows.insert(len(summary["singles"]), _average(summary))
    for row in rows:
        if row["id"] == summary["baseline"]:  # a gain over itself says nothing
            row["cells"] = [{**c, "gain": None, "gain_standard_error": None} for c in row["cells"]]
    return rows


def _row(results: Results, entry: Mapping[str, Any]) -> Line:
    tasks, records = results.summary["tasks"], results.scored(entry["keys"])
    cells: list[Line] = []
    for task, record, gain in zip(tasks, records, entry["gains"], strict=True):
        kept = ("metric", "score", "standard_error", "auc", "predicted_share", "n")
        numbers = {name: record[name] for name in kept}
        share = record.get("invalid_share")  # files of the first release have none
        cells.append(
            {"task": task, **numbers, **gain, "invalid_share": share, "note": _note(record)}
        )
    mean = [{"task": MEAN, **entry["mean"]}] if len(tasks) > 1 else []
    named = {name: entry[name] for name in ("id", "row", "coefficients")}
    return {**named, "cells": [*cells, *mean]}


def _average(summary: Mapping[str, Any]) -> Line:
    tasks, average = summary["tasks"], summary["average"]
    cells = [{"task": t, **a} for t, a in zip(tasks, average["tasks"], strict=True)]
    mean = [{"task": MEAN, **average["mean"]}] if len(tasks) > 1 else []
    return {"id": "average", "row": AVERAGE, "coefficients": [], "cells": [*cells, *mean]}


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


def markdown(results: Results) -> str:
    """One sweep as a Markdown table with its heading."""
    rows = rows_of(results)
    several = len(results.summary["tasks"]) > 1
    columns = _wide(results, rows) if several else _narrow(results, rows)
    header, *lines = zip(*([name, *cells] for name, cells in columns), strict=True)
    table = [_line(header), "|---" * len(header) + "|", *map(_line, lines)]
    return "\n".join([_heading(results), "", *table, "", *_footnotes(results)])


Column = tuple[str, list[object]]


def _narrow(results: Results, rows: Sequence[Line]) -> Iterator[Column]:
    """Columns for one task: everything that is known of it."""
    cells = [row["cells"][0] for row in rows]
    yield from _named(rows)
    yield cells[0]["metric"], [_with_error(c["score"], c["standard_error"]) for c in cells]
    yield f"gain over {_baseline(results)}", [_gain(c) for c in cells]
    if any(c["auc"] is not None for c in cells):
        yield "AUC", ["" if c["auc"] is None else f"{c['auc']:.4f}" for c in cells]
    if any(c.get("predicted_share") for c in cells):
        yield "predicted share", [_shares(c.get("predicted_share") or {}) for c in cells]
    if any(c.get("invalid_share") is not None for c in cells):
        yield "invalid", [_share(c) for c in cells]
    yield "n", [c["n"] for c in cells]
    yield "", [c.get("note", "") for c in cells]


def _wide(results: Results, rows: Sequence[Line]) -> Iterator[Column]:
    """Columns for several tasks: a score for each, their mean and its gain."""
    yield from _named(rows)
    tasks = results.summary["tasks"]
    for place, task in enumerate(tasks):
        cells = [row["cells"][place] for row in rows]
        scores = [_with_error(c["score"], c["standard_error"]) for c in cells]
        yield f"{task} {cells[0]['metric']} (n = {cells[0]['n']})", scores
    means = [row["cells"][-1] for row in rows]
    yield MEAN, [_with_error(c["score"], c["standard_error"]) for c in means]
    if any(c.get("normalised") is not None for c in means):
        yield "normalised", [_with_error(c.get("normalised"), None) for c in means]
    yield f"gain of the mean over {_baseline(results)}", [_gain(c) for c in means]
    per_task = [row["cells"][:-1] for row in rows]
    if any(c.get("invalid_share") is not None for cells in per_task for c in cells):
        yield f"invalid ({', '.join(tasks)})", [" ".join(map(_share, cells)) for cells in per_task]
    notes = [[f"{c['task']}: {c['note']}" for c in cs if c.get("note")] for cs in per_task]
    yield "", ["; ".join(own) for own in notes]


def _named(rows: Sequence[Line]) -> Iterator[Column]:
    yield "module", [row["row"] for row in rows]
    yield "coefficients", [" ".join(f"{c:g}" for c in row["coefficients"]) for row in rows]


def _baseline(results: Results) -> str:
    """What gains are against, as a reader calls it."""
    if results.summary["baseline"] == "average":
        return "the average"
    if results.summary["baseline"] == "own module":
        return "the task's own module"
    return str(results.summary["modules"][0])


def _gain(cell: Mapping[str, Any]) -> str:
    return _with_error(cell.get("gain"), cell.get("gain_standard_error"), sign=True)


def _shares(shares: Mapping[str, float]) -> str:
    return " ".join(f"{word} {share:.2f}" for word, share in shares.items())


def _share(cell: Mapping[str, Any]) -> str:
    share = cell.get("invalid_share")
    return "-" if share is None else f"{share:.2f}"


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


def _heading(results: Results) -> str:
    s = results.summary
    heads = f", heads: {s['head']}" if s["head"] else ""
    if s["composition"] == "analogy":
        classifier, target, source = s["modules"]
        what = f"{classifier} + ({target} - {source}), {s['kind']} modules"
    else:
        what = f"{s['kind']} modules {_listed(s['modules'])}"
    return f"**{', '.join(s['tasks'])}**, {what}{heads}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _footnotes(results: Results) -> list[str]:
    s = results.summary
    mean = " by the mean over the tasks" if len(s["tasks"]) > 1 else ""
    by = f" by {', '.join(s['selected_by'])}" if s.get("selected_by") else mean
    note = (
        f"Coefficients selected{by} on the {s['select']} rows, table on the {s['report']} rows; "
        "+- is one standard error over the rows."
    )
    if s["composition"] == "analogy":
        note += " t, 1 - t, t - 1 are the coefficients of the three modules in this order."
    if s.get("max_invalid") is not None:
        note += f" Valid: at most {s['max_invalid']:.0%} invalid answers on the {s['select']} rows."
    if not s["greater_is_better"]:
        note += " Smaller is better."
    if s["baseline"] == "own module":
        note += (
            " Each task is scored with the head of its own module; normalised: the mean over the "
            "tasks of score / score of the task's own module, without tasks where that is not two "
            "standard errors above 0."
        )
    if overlap := overlap_note(results):
        note += f" {overlap}"
    return [note]


def _with_error(value: float | None, error: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    shown = f"{value:+.4f}" if sign else f"{value:.4f}"
    return shown if error is None else f"{shown} +- {error:.4f}"


def share(cell: Mapping[str, Any], name: str) -> str:
    """A share with the ends of its interval, ``name_low`` and ``name_high``, where they are."""
    if cell[name] is None:
        return ""
    low, high = cell.get(f"{name}_low"), cell.get(f"{name}_high")
    return f"{cell[name]:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as CSV with full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_flat(row.get(c)) for c in columns])
    return text.getvalue()


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v:.6g}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(f"{v:g}" for v in value)
    return "" if value is None else value


def lines_of(results: Results) -> list[Line]:
    """One line per row and task, and per row and mean over the tasks, for CSV."""
    return [
        {**{k: v for k, v in row.items() if k != "cells"}, **cell}
        for row in rows_of(results)
        for cell in row["cells"]
    ]


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv of one sweep into ``out``; returns the Markdown."""
    found = read(results)
    text = markdown(found)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "table.csv").write_text(to_csv(lines_of(found)), encoding="utf-8")
    return text


def aggregate(paths: Sequence[str | Path]) -> list[Line]:
    """Mean over several sweeps of one setting, with the sample standard deviation between them.

    Rows are matched by what they are (module 1, average, equal weights in delta space, ...) and by
    task, whichever sweeps have them; a sweep that is named twice counts once. Sweeps of different
    tasks, rows, bases, kinds, head policies, compositions, lengths, prompts, precisions or ways to
    select make separate groups, and every line says what tells its group from the others.

    Raises:
        DataError: no paths, or a file without a finished sweep.
    """
    if not paths:
        raise DataError.build("report", "no results", expected="at least one results.jsonl")
    groups: dict[str, list[Results]] = {}
    for found in distinct(map(read, paths)):
        groups.setdefault(repr(_setting(found)), []).append(found)
    settings = [_setting(sweeps[0]) for sweeps in groups.values()]
    differing = [name for name in settings[0] if len({repr(s[name]) for s in settings}) > 1]
    return [
        {**line, "setting": ", ".join(_shown(name, setting[name]) for name in differing)}
        for sweeps, setting in zip(groups.values(), settings, strict=True)
        for line in _mean_lines(sweeps)
    ]


def _setting(found: Results) -> dict[str, Any]:
    """What the sweeps of a group have in common."""
    s = found.summary
    names = ("tasks", "kind", "base_name", "head", "rank", "composition")
    return {**{n: s[n] for n in names}, "modules": len(s["modules"]), **setting_of(found)}


def _shown(name: str, value: Any) -> str:
    """One setting in words: digests by their beginning, what all tasks share once."""
    if name == "grid":
        return f"grid of {len(value)} points" + (f" from {_flat(value[0])}" if value else "")
    values = value if isinstance(value, list) else [value]
    words = ["none" if v is None else str(v) for v in values]
    words = [word if len(word) <= 24 else f"{word[:8]}..." for word in dict.fromkeys(words)]
    return f"{name} {' '.join(words)}"


def _mean_lines(sweeps: Sequence[Results]) -> list[Line]:
    """Sweeps of one setting, row by row."""
    summary = sweeps[0].summary
    tasks, records = summary["tasks"], sweeps[0].scored(summary["rows"][0]["keys"])
    counts = {task: record["n"] for task, record in zip(tasks, records, strict=True)}
    cells = [{(line["id"], line["task"]): line for line in lines_of(sweep)} for sweep in sweeps]
    lines = []
    for identity, task in dict.fromkeys(place for sweep in cells for place in sweep):
        same = [sweep[identity, task] for sweep in cells if (identity, task) in sweep]
        gains = [g for line in same if (g := line.get("gain")) is not None]
        invalid = [s for line in same if (s := line.get("invalid_share")) is not None]
        lines.append(
            {
                "task": f"{MEAN} of {', '.join(tasks)}" if task == MEAN else task,
                "kind": summary["kind"],
                "base": summary["base_name"],
                "row": identity,
                "rows": summary.get("report"),
                "n": counts.get(task),
                "sweeps": len(same),
                "metric": same[0].get("metric", ""),
                **_statistics("score", [line["score"] for line in same]),
                **_statistics("gain", gains),
                "invalid_share": statistics.fmean(invalid) if invalid else None,
                "one_class": sum("one class" in line.get("note", "") for line in same),
            }
        )
    return lines


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.fmean(values) if values else None, f"{name}_spread": spread}


def aggregate_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aggregated rows as Markdown; +- is the standard deviation between sweeps."""
    header = (
        "task",
        "kind",
        "base",
        "rows",
        "n",
        "module",
        "sweeps",
        "score",
        "gain over the baseline",
        "",
    )
    several = any(row["setting"] for row in rows)
    header = (*header, "setting") if several else header
    lines = [_line(header), "|---" * len(header) + "|"]
    for row in rows:
        score = f"{_with_error(row['score'], row['score_spread'])} {row['metric']}".rstrip()
        gain = _with_error(row["gain"], row["gain_spread"], sign=True)
        named = ("task", "kind", "base", "rows", "n", "row", "sweeps")
        names = ("" if row[k] is None else row[k] for k in named)
        setting = (row["setting"],) if several else ()
        lines.append(_line((*names, score, gain, _remark(row), *setting)))
    explained = (
        "+- is the standard deviation between sweeps. The baseline of a merge is the average of "
        "its modules, that of an analogy its classifier (module 0)."
    )
    return "\n".join([*lines, "", explained])


def _remark(row: Mapping[str, Any]) -> str:
    remarks = []
    if row["one_class"]:
        remarks.append(f"predicts one class in {row['one_class']} of {row['sweeps']}")
    if (row["invalid_share"] or 0.0) > NOTED_INVALID:
        remarks.append(f"{row['invalid_share']:.0%} invalid answers")
    return ", ".join(remarks)
