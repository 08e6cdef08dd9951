"""Plots from results.jsonl, with standard errors, as PNG and PDF.

``curve``: score against coefficient, one panel per task and one for their mean. Two modules and
analogies have one coefficient t; for more modules each panel shows, module by module, the best
score that is reached with so much of it. ``frontier`` (two tasks): the score on one against the
score on the other.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import MissingPackage, install
from pem_composition.report.records import Results, mean_of, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the Okabe-Ito palette: told apart in print and by colour-blind readers.
COLOURS = {"parameter": "#0072B2", "delta": "#D55E00", "log": "#009E73"}
MODULE_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
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
FRONTIER_INCHES = (5.6, 5.2)

Estimate = tuple[float, float]  # score and its standard error


@dataclass(frozen=True)
class Panel:
    """What one panel shows: a task, or the mean of them all."""

    results: Results
    task: int | None  # its place among the tasks; None: the mean

    def estimate(self, keys: Sequence[str]) -> Estimate:
        """Score and standard error of a point, from its records."""
        records = self.results.scored(keys)
        chosen = records if self.task is None else [records[self.task]]
        return mean_of((r["score"], r["standard_error"]) for r in chosen)

    @property
    def title(self) -> str:
        tasks = self.results.summary["tasks"]
        return f"mean of {len(tasks)} tasks" if self.task is None else str(tasks[self.task])

    @property
    def axis(self) -> str:
        """Metric, split and number of rows."""
        select = self.results.summary["select"]
        if self.task is None:
            return f"mean score ({select})"
        record = self.results.scored(self.results.summary["singles"][0])[self.task]
        return f"{record['metric'].replace('_', ' ')} ({select}, n = {record['n']})"

    def note(self, keys: Sequence[str]) -> str:
        """Beside a module that gives one answer to (nearly) everything."""
        dead = self.task is not None and self.results.scored(keys)[self.task]["degenerate"]
        return NOTE if dead else ""


def write(results: str | Path, out: Path) -> list[Path]:
    """Draw the sweep of a results.jsonl into ``out``; returns the files.

    Raises:
        MissingPackage: matplotlib is not installed.
        DataError: no finished sweep.
    """
    found = read(results)
    backend()
    files = save(curves(found), out, "curve")
    if len(found.summary["tasks"]) == 2:
        files += save(frontier(found), out, "frontier")
    return files


def backend() -> Any:
    """pyplot, drawing into files, without a display.

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
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write a figure in every format and close it."""
    from matplotlib import pyplot

    files = [out / f"{name}.{suffix}" for suffix in FORMATS]
    for file in files:
        # Without dates the same results give the same bytes.
        undated = {"CreationDate": None} if file.suffix == ".pdf" else None
        figure.savefig(file, dpi=150, metadata=undated)
    pyplot.close(figure)
    return files


def curves(results: Results) -> Figure:
    """One panel per task, and one for the mean of several."""
    from matplotlib import pyplot

    tasks = len(results.summary["tasks"])
    panels = [Panel(results, i) for i in range(tasks)]
    panels += [Panel(results, None)] if tasks > 1 else []
    width, height = PANEL_INCHES if tasks == 1 else SMALL_PANEL_INCHES
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(width * len(panels), height), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        draw(axes, panel)
    if tasks > 1:
        figure.suptitle(_subject(results.summary), fontsize=10)
    else:
        grid[0][0].set_title(f"{panels[0].title}, {results.summary['kind']}", fontsize=11)
    for axes in grid[0]:
        axes.set_xlabel(_coefficient(results.summary, short=tasks > 1), fontsize=9)
    handles, labels = _legend(grid[0])
    figure.legend(
        handles, labels, frameon=False, fontsize=8, ncols=2 if tasks == 1 else 3,
        loc="outside lower center",
    )  # fmt: skip
    return figure


def draw(axes: Axes, panel: Panel) -> None:
    """The curves of both spaces; modules alone, their average and the reference as lines."""
    summary = panel.results.summary
    if _one_coefficient(summary):
        for space, curve in summary["curve"].items():
            _draw_curve(axes, panel, space, curve, summary["selected"][space])
    else:
        for space, curve in summary["curve"].items():
            _draw_profiles(axes, panel, space, curve)
    for name, score, style in _levels(panel):
        axes.axhline(score, linewidth=1, label=name, **style)
    axes.set_title(panel.title, fontsize=10)
    best = "" if _one_coefficient(summary) else "best "
    axes.set_ylabel(best + panel.axis, fontsize=9)
    plain(axes)


def _levels(panel: Panel) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Horizontal lines: name, score and style."""
    summary = panel.results.summary
    singles = [panel.estimate(keys)[0] for keys in summary["singles"]]
    for place, (keys, score) in enumerate(zip(summary["singles"], singles, strict=True)):
        style = {"color": "0.45", "linestyle": LINES[place % len(LINES)]}
        yield summary["modules"][place] + panel.note(keys), score, style
    if summary["average"] is not None:
        yield "average of the modules", sum(singles) / len(singles), {"color": "0.15"}
    if summary["reference"] is not None:
        style = {"color": REFERENCE_COLOUR, "linestyle": (0, (6, 2))}
        yield _reference(summary), panel.estimate(summary["reference"])[0], style


def _draw_curve(
    axes: Axes,
    panel: Panel,
    space: str,
    curve: Sequence[Mapping[str, Any]],
    selected: Sequence[float],
) -> None:
    """One space: a line, one standard error as a band, the selected point circled."""
    t = [p["coefficients"][0] for p in curve]
    score, error = zip(*(panel.estimate(p["keys"]) for p in curve), strict=True)
    colour = COLOURS.get(space, "0.3")
    low, high = ([s + sign * e for s, e in zip(score, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(t, low, high, color=colour, alpha=0.15, linewidth=0)
    composition = panel.results.summary["composition"]
    axes.plot(
        t, score, color=colour, marker=MARKERS.get(space, "o"), markersize=3.5, **_stroke(space),
        label=f"{composition}, {space} space",
    )  # fmt: skip
    at = _place(curve, selected)
    if at is not None:
        _circle(axes, t[at], score[at], colour)


def _draw_profiles(
    axes: Axes, panel: Panel, space: str, curve: Sequence[Mapping[str, Any]]
) -> None:
    """For each module: the best score among the points that hold so much of it."""
    summary = panel.results.summary
    best = max if summary["greater_is_better"] else min
    for place, module in enumerate(summary["modules"]):
        reached: dict[float, list[float]] = {}
        for p in curve:
            share = p["coefficients"][place]
            reached.setdefault(share, []).append(panel.estimate(p["keys"])[0])
        shares = sorted(reached)
        axes.plot(
            shares, [best(reached[share]) for share in shares], linewidth=1.4, markersize=3.5,
            color=MODULE_COLOURS[place % len(MODULE_COLOURS)], marker=MARKERS.get(space, "o"),
            linestyle="-" if space == "parameter" else "--",
            label=f"{module}, {space} space",
        )  # fmt: skip


def frontier(results: Results) -> Figure:
    """Score on the first task against score on the second, along the coefficient."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=FRONTIER_INCHES, layout="constrained")
    draw_frontier(axes, results)
    handles, labels = _legend([axes])
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    return figure


def draw_frontier(axes: Axes, results: Results) -> None:
    """Points of both spaces, the selected ones circled, and the modules alone."""
    summary = results.summary
    first, second = Panel(results, 0), Panel(results, 1)

    def at(keys: Sequence[str]) -> tuple[float, float]:
        return first.estimate(keys)[0], second.estimate(keys)[0]

    line = "-" if _one_coefficient(summary) else "none"
    for space, curve in summary["curve"].items():
        places, colour = [at(p["keys"]) for p in curve], COLOURS.get(space, "0.3")
        axes.plot(
            *zip(*places, strict=True), color=colour, marker=MARKERS.get(space, "o"),
            markersize=3.5, **_stroke(space) | ({} if line == "-" else {"linestyle": line}),
            label=f"{summary['composition']}, {space} space",
        )  # fmt: skip
        chosen = _place(curve, summary["selected"][space])
        if chosen is not None:
            _circle(axes, *places[chosen], colour)
    singles = [at(keys) for keys in summary["singles"]]
    for place, spot in enumerate(singles):
        marker = MODULE_MARKERS[place % len(MODULE_MARKERS)]
        _mark(axes, spot, marker, "0.25", summary["modules"][place])
    if summary["average"] is not None:
        centre = tuple(sum(values) / len(singles) for values in zip(*singles, strict=True))
        _mark(axes, centre, "D", "0.55", "average of the modules")
        # Every point of this line has the same mean over the two tasks as the average.
        axes.axline(centre, slope=-1, color="0.7", linewidth=0.8, linestyle=":", label=EQUAL_MEAN)
    if summary["reference"] is not None:
        _mark(axes, at(summary["reference"]), "*", REFERENCE_COLOUR, _reference(summary))
    axes.set_xlabel(f"{first.title}: {first.axis}")
    axes.set_ylabel(f"{second.title}: {second.axis}")
    axes.set_title(_subject(summary), fontsize=10)
    plain(axes)


def _one_coefficient(summary: Mapping[str, Any]) -> bool:
    """True where one number t tells all coefficients."""
    return summary["composition"] == "analogy" or len(summary["modules"]) <= 2


def _formula(summary: Mapping[str, Any]) -> str:
    """What is added, as a function of t where there is one."""
    names = summary["modules"]
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


def _reference(summary: Mapping[str, Any]) -> str:
    """The name of the reference module, from its row of the table."""
    return str(next(row["row"] for row in summary["rows"] if row["id"] == "reference"))


def _place(curve: Sequence[Mapping[str, Any]], selected: Sequence[float]) -> int | None:
    wanted = list(selected)
    return next((i for i, p in enumerate(curve) if list(p["coefficients"]) == wanted), None)


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


def _mark(axes: Axes, spot: Sequence[float], marker: str, colour: str, label: str) -> None:
    axes.plot(*spot, marker=marker, markersize=7, color=colour, linestyle="none", label=label)


def _legend(panels: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    """One entry per label over all panels; a note on a module in one panel is not repeated."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    kept = {
        k: v for k, v in found.items() if (bare := k.removesuffix(NOTE)) == k or bare not in found
    }
    return list(kept.values()), list(kept)


def plain(axes: Axes) -> None:
    """A light grid, no frame at the top and the right."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
