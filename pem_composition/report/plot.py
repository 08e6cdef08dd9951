"""Plots from results.jsonl, with standard errors, as PNG and PDF.

``curve``: score against coefficient, one panel per task and one for their mean. Two modules and
analogies have one coefficient t; for more modules each panel shows, module by module, the best
score that is reached with so much of it. ``frontier`` (two tasks): the score on one against the
score on the other. ``search``: the best value so far against the trials, a line per study;
``pareto`` (two goals): every trial and the front between them. ``controls``: how far each control,
and each merge that was chosen, is from the merge that the controls are of.
"""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import MissingPackage, install
from pem_composition.report import text
from pem_composition.report.frames import ERROR, JOINT, MEAN, SINGLE, Points, points
from pem_composition.report.records import Results, read
from pem_composition.report.table import AVERAGE, SAME, compared_with, merges_of, rows, subject
from pem_composition.safe_files import write_bytes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the Okabe-Ito palette: told apart in print and by colour-blind readers.
COLOURS = {"parameter": "#0072B2", "delta": "#D55E00", "log": "#009E73"}
MODULE_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STUDIES = ("#0072B2", "#D55E00", *MODULE_COLOURS)
MARKERS = {"parameter": "o", "delta": "s", "log": "^"}
MODULE_MARKERS = ("^", "v", "<", ">", "P", "X")
LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
REFERENCE_COLOUR = "#009E73"
FORMATS = ("png", "pdf")
NOTE = ", one class"
SELECTED = "selected"
EQUAL_MEAN = "same mean over the tasks"
PANEL_INCHES = (6.4, 4.2)
LABEL_LETTERS = 80  # of a line below one panel
SMALL_PANEL_INCHES = (4.0, 3.8)
SEARCH_INCHES = (7.0, 4.6)
FRONTIER_INCHES = (5.6, 5.2)


def write(results: str | Path, out: Path) -> list[Path]:
    """Draw the sweep or the search of a results.jsonl into ``out``; returns the files.

    Raises:
        MissingPackage: matplotlib is not installed.
        DataError: no finished sweep.
    """
    found = read(results)
    backend()
    if found.is_search:
        files = _search(found, out)
    else:
        files = save(curves(found), out, "curve")
        if len(found.summary["tasks"]) == 2:
            files += save(frontier(found), out, "frontier")
    if "controlled" in found.summary:
        files += save(controls(found), out, "controls")
    return files


def _search(found: Results, out: Path) -> list[Path]:
    """search.png and search.pdf, or pareto.png and pareto.pdf for two goals."""
    pyplot = backend()
    two = len(found.summary["goals"]) == 2
    figure, axes = pyplot.subplots(figsize=SEARCH_INCHES, layout="constrained")
    (draw_pareto if two else draw_progress)(axes, points(found))
    axes.set_title(f"{', '.join(found.summary['tasks'])}, {subject(found)}", fontsize=9, wrap=True)
    legend_below(figure, [axes], 2)
    return save(figure, out, "pareto" if two else "search")


def backend() -> Any:
    """pyplot, drawing into files, without a display; a program that has pyplot keeps its own way.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingPackage.build(
            "no plot",
            "matplotlib is not installed",
            do=f"{install('matplotlib')}, then pem report (or pem compare) draws it",
        ) from None
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write a figure in every format and close it."""
    pyplot = backend()
    files = [out / f"{name}.{suffix}" for suffix in FORMATS]
    for file in files:
        # Without dates the same results give the same bytes.
        undated = {"CreationDate": None} if file.suffix == ".pdf" else None
        drawn = io.BytesIO()
        figure.savefig(drawn, format=file.suffix[1:], dpi=150, metadata=undated)
        write_bytes(file, drawn.getvalue())
    pyplot.close(figure)
    return files


def curves(results: Results) -> Figure:
    """One panel per task, and one for the mean of several that have one."""
    pyplot = backend()
    found, tasks = points(results), results.summary["tasks"]
    names = [*tasks, MEAN] if found.signs.get(MEAN) else tasks
    width, height = PANEL_INCHES if len(tasks) == 1 else SMALL_PANEL_INCHES
    figure, grid = pyplot.subplots(
        1, len(names), figsize=(width * len(names), height), layout="constrained", squeeze=False
    )
    for axes, name in zip(grid[0], names, strict=True):
        draw(axes, results.summary, found, name)
    if len(tasks) > 1:
        figure.suptitle(_subject(results.summary), fontsize=10)
    else:
        grid[0][0].set_title(f"{tasks[0]}, {results.summary['kind']}", fontsize=11)
    for axes in grid[0]:
        axes.set_xlabel(_coefficient(results.summary, short=len(tasks) > 1), fontsize=9)
    legend_below(figure, grid[0], 2 if len(tasks) == 1 else 3)
    return figure


def draw(axes: Axes, summary: Mapping[str, Any], found: Points, name: str) -> None:
    """The curves of every space; modules alone, their average and the reference as lines."""
    for series, curve in found.curves():
        if found.across:
            _draw_curve(axes, series, curve, name)
        else:
            _draw_profiles(axes, summary["modules"], series, curve, name, found.signs[name])
    for label, score, style in _levels(summary, found, name):
        axes.axhline(score, linewidth=1, label=label, zorder=1.5, **style)  # below the curves
    axes.set_title(f"mean of {len(summary['tasks'])} tasks" if name == MEAN else name, fontsize=10)
    axes.set_ylabel(("" if found.across else "best ") + found.labels[name], fontsize=9)
    plain(axes)


def _levels(
    summary: Mapping[str, Any], found: Points, name: str
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Horizontal lines: name, score and style."""
    for place, line in enumerate(found.lines[SINGLE]):
        dead = NOTE if name in line["dead"] else ""  # it gives one answer to (nearly) everything
        style = {"color": "0.45", "linestyle": LINES[place % len(LINES)]}
        yield line["name"] + dead, line[name], style
    if summary["average"] is not None:
        yield AVERAGE, found.of(SINGLE)[name].mean(), {"color": "0.15"}
    for line in found.lines[JOINT]:
        style = {"color": REFERENCE_COLOUR, "linestyle": (0, (6, 2))}
        yield line["name"], line[name], style


def _draw_curve(axes: Axes, series: str, curve: pd.DataFrame, name: str) -> None:
    """One space: a line, one standard error as a band, the selected point circled."""
    at, score, error = (curve[c].astype(float) for c in ("at", name, name + ERROR))
    space = curve["space"].iloc[0]
    colour = COLOURS.get(space, "0.3")
    axes.fill_between(at, score - error, score + error, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        at, score, color=colour, marker=MARKERS.get(space, "o"), markersize=3.5, **_stroke(space),
        label=series,
    )  # fmt: skip
    for _, point in curve[curve["chosen"].astype(bool)].iterrows():
        _circle(axes, point["at"], point[name], colour)


def _draw_profiles(
    axes: Axes, modules: Sequence[str], series: str, curve: pd.DataFrame, name: str, sign: int
) -> None:
    """For each module: the best score among the points that hold so much of it."""
    space = curve["space"].iloc[0]
    for place, module in enumerate(modules):
        shares = curve["coefficients"].str[place].astype(float)
        scores = curve[name].astype(float).groupby(shares)
        reached = scores.min() if sign < 0 else scores.max()
        axes.plot(
            reached.index, reached, linewidth=1.4, markersize=3.5,
            color=MODULE_COLOURS[place % len(MODULE_COLOURS)], marker=MARKERS.get(space, "o"),
            linestyle="-" if space == "parameter" else "--",
            label=f"{module}, {space} space",
        )  # fmt: skip


def frontier(results: Results) -> Figure:
    """Score on the first task against score on the second, along the coefficient."""
    pyplot = backend()
    figure, axes = pyplot.subplots(figsize=FRONTIER_INCHES, layout="constrained")
    draw_frontier(axes, results)
    legend_below(figure, [axes], 2)
    return figure


def draw_frontier(axes: Axes, results: Results) -> None:
    """Points of every space, the selected ones circled, and the modules alone."""
    summary, found = results.summary, points(results)
    tasks = summary["tasks"][:2]
    for series, curve in found.curves():
        space = curve["space"].iloc[0]
        stroke = _stroke(space) | ({} if found.across else {"linestyle": "none"})
        axes.plot(
            *(curve[task].astype(float) for task in tasks), color=COLOURS.get(space, "0.3"),
            marker=MARKERS.get(space, "o"), markersize=3.5, **stroke, label=series,
        )  # fmt: skip
        for _, point in curve[curve["chosen"].astype(bool)].iterrows():
            _circle(axes, *(point[task] for task in tasks), COLOURS.get(space, "0.3"))
    singles = found.of(SINGLE)
    for place, line in enumerate(found.lines[SINGLE]):
        marker = MODULE_MARKERS[place % len(MODULE_MARKERS)]
        _mark(axes, [line[task] for task in tasks], marker, "0.25", line["name"])
    if summary["average"] is not None:
        centre = tuple(singles[task].mean() for task in tasks)
        _mark(axes, centre, "D", "0.55", AVERAGE, markersize=10, fillstyle="none")
        if found.signs[MEAN]:
            # Every point of this line has the same mean over the two tasks as the average.
            axes.axline(centre, slope=-1, color="0.7", lw=0.8, linestyle=":", label=EQUAL_MEAN)
    for line in found.lines[JOINT]:
        _mark(axes, [line[task] for task in tasks], "*", REFERENCE_COLOUR, line["name"])
    axes.set_xlabel(f"{tasks[0]}: {found.labels[tasks[0]]}")
    axes.set_ylabel(f"{tasks[1]}: {found.labels[tasks[1]]}")
    axes.set_title(_subject(summary), fontsize=10)
    plain(axes)


def controls(results: Results) -> Figure:
    """Differences to the merge that the controls are of, with two standard errors, on the reported
    rows: in the mean over the tasks, or task by task where scores have no mean."""
    s, frame = results.summary, rows(results)
    shown = frame["control"].notna() | frame["id"].isin(merges_of(s))
    frame = frame[shown].assign(wide=frame["difference_standard_error"].astype(float) * SAME)
    one = [MEAN] if frame.loc[frame["task"] == MEAN, "score"].notna().any() else s["tasks"]
    names = list(frame["row"].drop_duplicates())
    size = (PANEL_INCHES[0] * len(one), 1.2 + 0.26 * len(names))
    figure, grid = backend().subplots(
        1, len(one), figsize=size, layout="constrained", squeeze=False
    )
    for axes, task in zip(grid[0], one, strict=True):
        own = frame[frame["task"] == task].fillna({"difference": 0.0, "wide": 0.0})
        places = [names.index(name) for name in own["row"]]
        for place, (_, line) in zip(places, own.iterrows(), strict=True):
            style = {"color": "0.35", "marker": "o"}
            if text.absent(line["control"]):
                style = {"color": COLOURS["delta"], "marker": "s"}
            axes.errorbar(line["difference"], place, xerr=line["wide"], markersize=4, **style)
        axes.axvline(0, color="0.6", linewidth=1, zorder=0)
        axes.set_yticks(range(len(names)), names if axes is grid[0][0] else [""] * len(names))
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        metric = "mean score" if task == MEAN else task
        against = f"minus that of the {compared_with(s['composition'])}, two standard errors"
        axes.set_xlabel(f"{metric} {against}", fontsize=9)
        plain(axes)
    figure.suptitle(f"{_subject(s)}: {s['controlled']}", fontsize=9, wrap=True)
    return figure


def draw_progress(axes: Axes, found: Points) -> None:
    """Best value so far that meets the conditions, against the trials of each study."""
    goal, sign = next(iter(found.signs.items()))
    studies = list(found.curves())
    for place, (name, trials) in enumerate(studies):
        values = trials[goal].astype(float)
        best = values.cummin() if sign < 0 else values.cummax()
        line = LINES[place // len(STUDIES) % len(LINES)] if place >= len(STUDIES) else "-"
        # Thick below thin: curves that are equal are all seen.
        width = 1.2 + 2.4 * (len(studies) - 1 - place) / len(studies)
        axes.step(trials["at"].astype(int), best, where="post", linestyle=line, linewidth=width,
                  color=STUDIES[place % len(STUDIES)], label=name)  # fmt: skip
    axes.set_xlabel("trials")
    axes.set_ylabel(f"best {found.labels[goal]} so far")
    plain(axes)


def draw_pareto(axes: Axes, found: Points) -> None:
    """Every trial that meets the conditions by its two values; the front as a line."""
    first, second = list(found.signs)[:2]
    for place, (name, trials) in enumerate(found.curves()):
        axes.scatter(trials[first].astype(float), trials[second].astype(float), s=14, alpha=0.6,
                     label=name, color=STUDIES[place % len(STUDIES)])  # fmt: skip
    lead = found.front(first, second)
    axes.plot(lead[first], lead[second], color="black", linewidth=1, label="front")
    axes.set_xlabel(found.labels[first])
    axes.set_ylabel(found.labels[second])
    plain(axes)


def _one_coefficient(summary: Mapping[str, Any]) -> bool:
    """True where one number t tells all coefficients."""
    return summary["composition"] == "analogy" or len(summary["modules"]) <= 2


def _formula(summary: Mapping[str, Any]) -> str:
    """What is added, as a function of t where there is one."""
    names = summary["modules"]
    if len(names) == 1:
        return f"base + t * {names[0]}"
    if summary["composition"] == "analogy":
        return f"t * {names[0]} + (1 - t) * ({names[1]} - {names[2]})"
    if _one_coefficient(summary):
        return f"t * {names[0]} + (1 - t) * {names[1]}"
    return ", ".join(names)


def _subject(summary: Mapping[str, Any]) -> str:
    return f"{summary['kind']} modules, {_formula(summary)}"


def _coefficient(summary: Mapping[str, Any], *, short: bool) -> str:
    """Label of the horizontal axis; ``short`` where the formula stands elsewhere."""
    if not _one_coefficient(summary):
        return "coefficient of the module"
    whole = f"coefficient t: {_formula(summary)}"
    return "coefficient t" if short else textwrap.fill(whole, LABEL_LETTERS, break_on_hyphens=False)


def _circle(axes: Axes, x: float, y: float, colour: str) -> None:
    """The point that was selected."""
    axes.plot(
        x, y, marker="o", markersize=9, fillstyle="none", color=colour, linestyle="none",
        label=SELECTED,
    )  # fmt: skip


def _stroke(space: str) -> dict[str, Any]:
    """How the curve of a space is drawn: two that are equal are both seen."""
    if space == "parameter":
        return {"linestyle": "-", "linewidth": 2.4}
    return {"linestyle": "--", "linewidth": 1.2, "markerfacecolor": "white"}


def _mark(
    axes: Axes, spot: Sequence[float], marker: str, colour: str, label: str, **style: Any
) -> None:
    look = {"marker": marker, "markersize": 7, "color": colour, "linestyle": "none"} | style
    axes.plot(*spot, label=label, **look)


def legend_below(figure: Figure, panels: Iterable[Axes], columns: int) -> None:
    """One entry per label over all panels; a note on a module in one panel is not repeated."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    kept = {
        k: v for k, v in found.items() if (bare := k.removesuffix(NOTE)) == k or bare not in found
    }
    figure.legend(
        kept.values(), kept, frameon=False, fontsize=8, ncols=columns, loc="outside lower center"
    )


def plain(axes: Axes) -> None:
    """A light grid, no frame at the top and the right."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
