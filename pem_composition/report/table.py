"""Tables from results.jsonl, as Markdown and CSV: one sweep, or the mean of several (seeds)."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError
from pem_composition.report.records import Results, read

COLUMNS = (
    "row",
    "coefficients",
    "metric",
    "score",
    "standard_error",
    "gain",
    "gain_standard_error",
    "auc",
    "predicted_share",
    "n",
    "note",
)
AVERAGE = "average of the modules"


def rows_of(results: Results) -> list[dict[str, Any]]:
    """The table's rows in order: modules, their average, merges; numbers, not text."""
    summary, points = results.summary, results.points
    rows = []
    for entry in summary["rows"]:
        record = points[entry["key"]]
        rows.append(
            {
                "row": entry["row"],
                "id": entry["id"],
                "coefficients": entry["coefficients"],
                "gain": entry["gain"],
                "gain_standard_error": entry["gain_standard_error"],
                **{
                    k: record[k]
                    for k in ("metric", "score", "standard_error", "auc", "predicted_share", "n")
                },
                "note": _note(record),
            }
        )
    average = {
        "row": AVERAGE,
        "id": "average",
        "coefficients": [],
        "gain": None,
        "gain_standard_error": None,
    }
    rows.insert(
        len(summary["modules"]),
        {**average, "predicted_share": {}, "note": "", **summary["average"]},
    )
    return rows


def _note(record: Mapping[str, Any]) -> str:
    """What a reader must know of a row: a module that gives (nearly) one answer to everything."""
    if not record["degenerate"]:
        return ""
    word, share = max(record["predicted_share"].items(), key=lambda item: item[1])
    return f"predicts one class ({word}, {share:.0%})"


def markdown(results: Results) -> str:
    """One sweep as a Markdown table with its heading."""
    header = "| module | coefficients | {} | gain over the average | AUC | predicted share | n | |"
    rows = rows_of(results)
    lines = [
        _heading(results),
        "",
        header.format(rows[0]["metric"]),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["row"],
            " ".join(f"{c:g}" for c in row["coefficients"]),
            _with_error(row["score"], row["standard_error"]),
            _with_error(row["gain"], row["gain_standard_error"], sign=True),
            "" if row["auc"] is None else f"{row['auc']:.4f}",
            " ".join(f"{word} {share:.2f}" for word, share in row["predicted_share"].items()),
            row["n"],
            row["note"],
        )
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join([*lines, "", *_footnotes(results)])


def _heading(results: Results) -> str:
    s = results.summary
    return f"**{s['task']}**, {s['kind']} modules {' and '.join(s['modules'])}, heads: {s['head']}"


def _footnotes(results: Results) -> list[str]:
    s = results.summary
    note = (
        f"Coefficients selected on the {s['select']} rows, table on the {s['report']} rows; "
        "+- is one standard error over the rows."
    )
    if s["select"] == s["report"]:
        note += " These are the same rows, so the selected row is optimistic (give --test_file)."
    return [note]


def _with_error(value: float | None, error: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    shown = f"{value:+.4f}" if sign else f"{value:.4f}"
    return shown if error is None else f"{shown} +- {error:.4f}"


def _cell(value: object) -> str:
    return str(value).replace("|", "/")


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


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv of one sweep into ``out``; returns the Markdown."""
    found = read(results)
    text = markdown(found)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "table.csv").write_text(to_csv(rows_of(found)), encoding="utf-8")
    return text


def aggregate(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Mean over several sweeps of one setting, with the sample standard deviation between them.

    Rows are matched by what they are (module 1, average, equal weights in delta space, ...); sweeps
    of different tasks, bases, kinds or head policies make separate groups.

    Raises:
        DataError: no paths, or a file without a finished sweep.
    """
    if not paths:
        raise DataError.build("report", "no results", expected="at least one results.jsonl")
    groups: dict[tuple[Any, ...], list[dict[str, dict[str, Any]]]] = {}
    for path in paths:
        found = read(path)
        setting = tuple(found.summary[k] for k in ("task", "kind", "base_name", "head", "rank"))
        groups.setdefault(setting, []).append({row["id"]: row for row in rows_of(found)})
    return [row for setting, sweeps in groups.items() for row in _mean_rows(setting, sweeps)]


def _mean_rows(
    setting: tuple[Any, ...], sweeps: list[dict[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    task, kind, base, _, _ = setting
    rows = []
    for identity in sweeps[0]:
        same = [sweep[identity] for sweep in sweeps if identity in sweep]
        rows.append(
            {
                "task": task,
                "kind": kind,
                "base": base,
                "row": identity,
                "sweeps": len(same),
                "metric": same[0]["metric"],
                **_statistics("score", [r["score"] for r in same]),
                **_statistics("gain", [r["gain"] for r in same if r["gain"] is not None]),
                "one_class": sum(bool(r["note"]) for r in same),
            }
        )
    return rows


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.fmean(values) if values else None, f"{name}_spread": spread}


def aggregate_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aggregated rows as Markdown; +- is the standard deviation between sweeps."""
    lines = [
        "| task | kind | base | module | sweeps | score | gain over the average | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        note = (
            f"predicts one class in {row['one_class']} of {row['sweeps']}"
            if row["one_class"]
            else ""
        )
        score = f"{_with_error(row['score'], row['score_spread'])} {row['metric']}"
        gain = _with_error(row["gain"], row["gain_spread"], sign=True)
        cells = (
            row["task"],
            row["kind"],
            row["base"],
            row["row"],
            row["sweeps"],
            score,
            gain,
            note,
        )
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join([*lines, "", "+- is the standard deviation between sweeps."])
