"""Table and plot of a search, from results.jsonl alone.

One goal: the best value so far against the trials, a line per study. Two goals: every trial, the
front between them and the single modules.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pem_composition import json_lines
from pem_composition.errors import DataError
from pem_composition.report.plot import LINES, MODULE_COLOURS
from pem_composition.report.records import RESULTS, Results, distinct, overlap_note, setting_of

COLOURS = ("#0072B2", "#D55E00", *MODULE_COLOURS)
INCHES = (7.0, 4.6)
COLUMNS = (
    "row", "coefficients", "task", "score", "standard_error", "gain", "gain_standard_error",
    "normalised", "rank", "seconds",
)  # fmt: skip


def is_search(path: str | Path) -> bool:
    """True if the file, or the one in the directory, ends with the summary of a search."""
    last = [r for r in json_lines.read(_file(path)) if "summary" in r or "search" in r][-1:]
    return bool(last) and "search" in last[0]


def _file(path: str | Path) -> Path:
    return Path(path) / RESULTS if Path(path).is_dir() else Path(path)


def read(path: str | Path) -> Results:
    """The search that a results.jsonl ends with.

    Raises:
        DataError: no finished search, or a point of it is missing.
    """
    file = _file(path)
    lines = json_lines.read(file)
    summaries = [r for r in lines if "search" in r]
    if not summaries:
        raise DataError.build(
            file, "holds no finished search", found=f"{len(lines)} lines",
            do="run pem search to its end; it goes on where it was",
        )  # fmt: skip
    points = {r["key"]: r for r in lines if "key" in r}
    lost = [k for row in summaries[-1]["rows"] for k in row["keys"] if k not in points]
    if lost:
        raise DataError.build(
            file, "a point of the search cannot be read", found=f"{len(lost)} missing",
            do="run the search again; it fills the gap",
        )  # fmt: skip
    return Results(file, summaries[-1], points)


# --- table ---


def markdown(results: Results) -> str:
    """The table with its heading and what was chosen."""
    columns = list(_columns(results))
    header, *lines = zip(*([name, *cells] for name, cells in columns), strict=True)
    table = [_line(header), "|---" * len(header) + "|", *map(_line, lines)]
    return "\n".join([_heading(results), "", *table, "", *_footnotes(results)])


def _columns(results: Results) -> Iterator[tuple[str, list[str]]]:
    s = results.summary
    rows, costs = s["rows"], s["costs"]
    yield "module", [_title(s, row) for row in rows]
    yield "coefficients", [" ".join(f"{c:.3g}" for c in row["coefficients"]) for row in rows]
    for place, task in enumerate(s["tasks"]):
        records = [results.points[row["keys"][place]] for row in rows]
        name = f"{task} {records[0]['metric']} (n = {records[0]['n']})"
        yield name, [_with_error(r["score"], r["standard_error"]) for r in records]
    means = [row["mean"] for row in rows]
    if len(s["tasks"]) > 1:
        yield "mean", [_with_error(m["score"], m["standard_error"]) for m in means]
    if any(m.get("normalised") is not None for m in means):
        yield (
            "normalised",
            ["" if m["normalised"] is None else f"{m['normalised']:.4f}" for m in means],
        )
    yield f"gain over {_baseline(s)}", [_gain(m) for m in means]
    yield "rank", ["" if c is None else str(c["rank"] or "") for c in costs]
    yield "merge (s)", ["" if c is None else f"{c['seconds']:.2f}" for c in costs]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _title(s: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    best = " *" if row["row"] == f"best {s['best']}" else ""
    entry = next((e for e in s["studies"] if row["row"] == f"best {e['study']}"), None)
    settings = _settings(entry["candidate"]) if entry else ""
    missed = " (misses a condition)" if entry and entry["violation"] else ""
    return f"{row['row']}{settings}{missed}{best}"


def _settings(candidate: Mapping[str, Any]) -> str:
    """What was chosen besides coefficients, in brackets."""
    own = {
        k: v for k, v in candidate.items() if k != "c" and not (k[0] == "c" and k[1:].isdecimal())
    }
    shown = ", ".join(
        f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in own.items()
    )
    return f" ({shown})" if shown else ""


def _baseline(s: Mapping[str, Any]) -> str:
    return "the task's own module" if s["baseline"] == "own module" else "the average"


def _gain(mean: Mapping[str, Any]) -> str:
    return _with_error(mean["gain"], mean["gain_standard_error"], sign=True)


def _with_error(value: float, error: float, *, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.4f} +- {error:.4f}"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


def _heading(results: Results) -> str:
    s = results.summary
    heads = f", heads: {s['head']}" if s["head"] else ""
    return f"**{', '.join(s['tasks'])}**, {s['kind']} modules {', '.join(s['modules'])}{heads}"


def _footnotes(results: Results) -> Iterator[str]:
    s = results.summary
    tried = sum(e["tried"] for e in s["studies"])
    conditions = f" with {' and '.join(s['constraints'])}" if s["constraints"] else ""
    yield (
        f"{tried} trials ({s['sampler']}, seed {s['seed']}), chosen by {' and '.join(s['goals'])}"
        f"{conditions} on the {s['select']} rows; the table is on the {s['report']} rows. * best "
        "on the selection rows. +- is one standard error over the rows, that of a gain is paired."
    )
    if s["baseline"] == "own module":
        yield (
            "Each task is scored with the head of its own module; normalised: the mean over the "
            "tasks of score / score of the task's own module, without tasks where that is not two "
            "standard errors above 0."
        )
    if overlap := overlap_note(results):
        yield overlap


def to_csv(results: Results) -> str:
    """One line per row and task, and per row and mean."""
    s, text = results.summary, io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row, cost in zip(s["rows"], s["costs"], strict=True):
        shared = {"row": row["row"], "coefficients": " ".join(map(str, row["coefficients"]))}
        shared |= dict(cost or {})
        for task, key, gain in zip(s["tasks"], row["keys"], row["gains"], strict=True):
            record = results.points[key]
            own = {k: record[k] for k in ("score", "standard_error")}
            writer.writerow({**shared, "task": task, **own, **gain})
        writer.writerow({**shared, "task": "mean", **row["mean"]})
    return text.getvalue()


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv into ``out``; returns the Markdown."""
    found = read(results)
    text = markdown(found)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "table.csv").write_text(to_csv(found), encoding="utf-8")
    return text


def aggregate(paths: Sequence[str | Path]) -> str:
    """Several searches of one setting (seeds) as one Markdown table: mean +- standard deviation.

    Raises:
        DataError: searches of different tasks, kinds, bases or goals.
    """
    found = distinct(read(path) for path in paths)
    facts = ("tasks", "kind", "base_name", "goals", "head")
    first = {name: found[0].summary[name] for name in facts}
    for other in found[1:]:
        for name, value in first.items():
            if other.summary[name] != value:
                raise DataError.build(
                    other.path, f"another search: {name} differs", found=other.summary[name],
                    expected=value, do="report them apart",
                )  # fmt: skip
        asked, expected = setting_of(other), setting_of(found[0])
        for name in (n for n in asked if asked[n] != expected[n]):
            raise DataError.build(
                other.path, f"another search: {name} of its table differs", found=asked[name],
                expected=expected[name], do="report them apart",
            )  # fmt: skip
    rows: dict[str, list[tuple[Results, int]]] = {}
    for results in found:
        for place, row in enumerate(results.summary["rows"]):
            rows.setdefault(row["id"], []).append((results, place))
    header = ["module", "searches", *first["tasks"], "mean", "normalised", "rank", "merge (s)"]
    lines = [_line(header), "|---" * len(header) + "|"]
    lines += [_line(_over(same)) for same in rows.values()]
    note = "+- is the standard deviation between searches."
    return "\n".join([*lines, "", note])


def _over(same: Sequence[tuple[Results, int]]) -> list[str]:
    """One row of several searches."""
    first, place = same[0]
    entries = [(r, r.summary["rows"][i], r.summary["costs"][i]) for r, i in same]
    scores = []
    for task in range(len(first.summary["tasks"])):
        scores.append(_spread([r.points[e["keys"][task]]["score"] for r, e, _ in entries]))
    shares = [e["mean"].get("normalised") for _, e, _ in entries]
    costs = [c for *_, c in entries if c is not None]
    return [
        first.summary["rows"][place]["row"],
        str(len(entries)),
        *scores,
        _spread([e["mean"]["score"] for _, e, _ in entries]),
        _spread([s for s in shares if s is not None]),
        _spread([c["rank"] for c in costs], digits=0),
        _spread([c["seconds"] for c in costs], digits=2),
    ]


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return ""
    error = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


# --- plots ---


def plot(results: str | Path, out: Path) -> list[Path]:
    """Write search.png and search.pdf, or pareto.png and pareto.pdf for two goals.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    from pem_composition.report.plot import backend, save

    found = read(results)
    pyplot = backend()
    two = len(found.summary["goals"]) == 2
    figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
    (draw_pareto if two else draw_progress)(axes, found)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(_heading(found).replace("*", ""), fontsize=9, wrap=True)
    return save(figure, out, "pareto" if two else "search")


def draw_progress(axes: Any, results: Results) -> None:
    """Best value so far that meets the conditions, against the trials of each study."""
    s = results.summary
    sign = -1 if s["goals"][0] == "loss" else 1  # goals are maximised; the loss itself is shown
    for place, study in enumerate(s["studies"]):
        best: list[float] = []
        pairs = zip(study["values_of_trials"], study["violations"], strict=True)
        for values, violation in pairs:
            last = best[-1] if best else float("nan")
            value = values[0] if not violation else float("nan")
            best.append(value if not last >= value else last)
        colour = COLOURS[place % len(COLOURS)]
        line = LINES[place // len(COLOURS) % len(LINES)] if place >= len(COLOURS) else "-"
        # Thick below thin: curves that are equal are all seen.
        width = 1.2 + 2.4 * (len(s["studies"]) - 1 - place) / len(s["studies"])
        axes.step(range(1, len(best) + 1), [sign * v for v in best], where="post", color=colour,
                  linestyle=line, linewidth=width, label=study["study"])  # fmt: skip
    axes.set_xlabel("trials")
    axes.set_ylabel(f"best {s['goals'][0]} so far ({s['select']} rows)")
    axes.legend(fontsize=8)


def draw_pareto(axes: Any, results: Results) -> None:
    """Every trial that meets the conditions by its two values; the front as a line."""
    s = results.summary
    signs = [-1 if goal == "loss" else 1 for goal in s["goals"]]
    spots = []
    for place, study in enumerate(s["studies"]):
        rows = zip(study["values_of_trials"], study["violations"], strict=True)
        kept = [v for v, violation in rows if not violation]
        spots += kept
        x, y = ([signs[i] * v[i] for v in kept] for i in (0, 1))
        colour = COLOURS[place % len(COLOURS)]
        axes.scatter(x, y, s=14, alpha=0.6, label=study["study"], color=colour)
    lead = sorted(v for v in spots if not any(_beats(w, v) for w in spots))
    front = ([signs[i] * v[i] for v in lead] for i in (0, 1))
    axes.plot(*front, color="black", linewidth=1, label="front")
    axes.set_xlabel(f"{s['goals'][0]} ({s['select']} rows)")
    axes.set_ylabel(f"{s['goals'][1]} ({s['select']} rows)")
    axes.legend(fontsize=8)


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)
