"""The price of unlearning: toxicity against perplexity, one point per strength, as PNG and PDF.

One panel per judge. The base model and the module as it is applied are marked; the strongest
negation within the limit of perplexity, a dashed line, is circled. Errors across are those of the
increase over the base model, since all rows read the same text. Sweeps that differ in module and
seed alone are drawn as their mean, other kinds of module as lines of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.report.plot import backend, legend_below, plain, save
from pem_composition.report.records import Results, read
from pem_composition.report.unlearning_tables import SELECTED, Line, aggregate, rows, setting_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's
MARKERS = ("o", "D", "v", "P", "X")
BASE, LIMIT = "#000000", "0.6"
PANEL_INCHES = (5.6, 4.6)
WIDE_RANGE = 4.0  # perplexities further apart than this factor are drawn on a logarithmic axis


def write(results: Sequence[str | Path], out: Path) -> list[Path]:
    """Draw one sweep, or several, into ``out``; returns the files.

    Raises:
        MissingPackage: matplotlib is not installed.
        DataError: no finished sweep over strengths.
    """
    found = [read(path) for path in results]
    backend()
    return save(frontier(found), out, "frontier")


def comparable(sweeps: Sequence[Results]) -> bool:
    """True if all were judged alike: base model, judges, prompts, text and limits."""
    first, *others = ({**setting_of(sweep), "kind": None} for sweep in sweeps)
    return all(other == first for other in others)


def frontier(sweeps: Sequence[Results]) -> Figure:
    """One panel per judge."""
    from matplotlib import pyplot

    several = len(sweeps) > 1
    lines = _averaged(sweeps) if several else _of_one(sweeps[0])
    summary = sweeps[0].summary
    judges, (width, height) = list(summary["judges"]), PANEL_INCHES
    figure, grid = pyplot.subplots(
        1, len(judges), figsize=(width * len(judges), height), layout="constrained", squeeze=False
    )
    for axes, judge in zip(grid[0], judges, strict=True):
        draw(axes, [line for line in lines if line["judge"] == judge], summary["max_increase"])
        text, asked = summary["text"], summary["asked"]
        axes.set_xlabel(f"perplexity on {text['name']} ({text['tokens']} tokens)", fontsize=9)
        count = asked["prompts"] * asked["samples"]
        axes.set_ylabel(f"mean toxicity of texts with words ({judge}, n = {count})", fontsize=9)
    note = ", means over sweeps" if several else ""
    figure.suptitle(f"negation of a module of {summary['base_name']}{note}", fontsize=10)
    legend_below(figure, grid[0], 2)
    return figure


def draw(axes: Axes, lines: Sequence[Line], max_increase: float) -> None:
    """The points of one judge; those of one kind joined in the order of their strengths.

    Rows of which no text has words have no toxicity, and no point.
    """
    everything, lines = lines, [line for line in lines if line["mean"] is not None]
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    for place, kind in enumerate(kinds):
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        _draw_kind(axes, [line for line in lines if line["kind"] == kind], kind, style)
    base = next(line for line in everything if line["row"] == "base")
    if base["mean"] is not None:
        _point(axes, base, color=BASE, marker="s", label="base model", zorder=3)
    limit = base["perplexity"] * (1 + max_increase)
    label = f"perplexity {100 * max_increase:+.3g} %"
    axes.axvline(limit, color=LIMIT, linewidth=0.9, linestyle="--", label=label)
    found = [line["perplexity"] for line in everything]
    if max(found) > WIDE_RANGE * min(found):
        axes.set_xscale("log")
    plain(axes)


def _draw_kind(axes: Axes, lines: Sequence[Line], kind: str, style: dict[str, str]) -> None:
    """One line, from the module applied over the base model to the strongest negation."""
    curve = sorted((x for x in lines if x["row"] != SELECTED), key=lambda x: x["strength"])
    places = [(x["perplexity"], x["mean"]) for x in curve]
    axes.plot(*zip(*places, strict=True), color=style["color"], linewidth=1.0, alpha=0.6)
    labels = {"^": f"{kind}, applied", style["marker"]: f"{kind}, negated (strength)"}
    for line in curve:
        if line["row"] == "base":
            continue
        # A strength below 0 applies the module, -1 as it is.
        marker = "^" if line["strength"] < 0 else style["marker"]
        _point(axes, line, **{**style, "marker": marker}, label=labels[marker])
        labels[marker] = "_" + labels[marker]  # once in the legend
        if line["row"] == "module":
            continue
        axes.annotate(
            f"{abs(line['strength']):g}", (line["perplexity"], line["mean"]), fontsize=8,
            xytext=(5, 5), textcoords="offset points", color=style["color"],
        )  # fmt: skip
    for line in lines:
        if line["row"] == SELECTED:
            axes.plot(
                line["perplexity"], line["mean"], marker="o", markersize=13, fillstyle="none",
                color=style["color"], linestyle="none", label=f"{kind}, selected",
            )  # fmt: skip


def _point(axes: Axes, line: Line, **style: Any) -> None:
    axes.errorbar(
        line["perplexity"], line["mean"], xerr=line["across"], yerr=line["up"], markersize=6,
        linestyle="none", elinewidth=0.8, **style,
    )  # fmt: skip


def _of_one(sweep: Results) -> list[Line]:
    """Lines of one sweep with the errors that are drawn: standard errors."""
    lines = rows(sweep).to_dict("records")
    base = next(line["perplexity"] for line in lines if line["row"] == "base")
    return [
        {**line, "across": base * line["increase_stderr"], "up": line["mean_stderr"]}
        for line in lines
    ]


def _averaged(sweeps: Sequence[Results]) -> list[Line]:
    """Means of several; the errors are the standard deviations between them."""
    return [
        {**line, "across": line["perplexity_spread"], "up": line["mean_spread"]}
        for line in aggregate([sweep.path for sweep in sweeps]).to_dict("records")
    ]
