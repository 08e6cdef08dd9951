"""Plots from results.jsonl: score against coefficient, with standard errors. PNG and PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import RunFailed
from pem_composition.report.records import Results, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and orange of the Okabe-Ito palette: told apart in print and by colour-blind readers.
COLOURS = {"parameter": "#0072B2", "delta": "#D55E00"}
MARKERS = {"parameter": "o", "delta": "s"}
FORMATS = ("png", "pdf")
SIZE_INCHES = (6.4, 4.2)


def write(results: str | Path, out: Path, name: str = "curve") -> list[Path]:
    """Draw the sweep of a results.jsonl into ``out``; returns the files.

    Raises:
        RunFailed: matplotlib is not installed.
        DataError: no finished sweep.
    """
    found = read(results)
    try:
        import matplotlib
    except ImportError:
        raise RunFailed.build(
            "plot", "matplotlib is not installed", do="pip install matplotlib, then: pem report DIR"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
    draw(axes, found)
    files = [out / f"{name}.{suffix}" for suffix in FORMATS]
    for file in files:
        # Without dates the same results give the same bytes.
        figure.savefig(
            file, dpi=150, metadata={"CreationDate": None} if file.suffix == ".pdf" else None
        )
    pyplot.close(figure)
    return files


def draw(axes: Axes, results: Results) -> None:
    """Curves of both spaces, the single modules and their average as horizontal lines."""
    summary, points = results.summary, results.points
    for space, curve in summary["curve"].items():
        _draw_curve(axes, space, curve, points, summary["selected"][space])
    singles = [points[key] for key in summary["singles"]]
    for name, record, style in zip(summary["modules"], singles, ("--", ":"), strict=False):
        note = ", one class" if record["degenerate"] else ""
        axes.axhline(
            record["score"], color="0.45", linestyle=style, linewidth=1, label=f"{name}{note}"
        )
    average = sum(r["score"] for r in singles) / len(singles)
    axes.axhline(average, color="0.15", linewidth=1, label="average of the two")
    first, second = summary["modules"][:2]
    axes.set_xlabel(f"coefficient t:  t * {first} + (1 - t) * {second}")
    axes.set_ylabel(
        f"{singles[0]['metric'].replace('_', ' ')} ({summary['select']}, n = {singles[0]['n']})"
    )
    axes.set_title(f"{summary['task']}, {summary['kind']}", fontsize=11)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_curve(
    axes: Axes,
    space: str,
    curve: Sequence[Mapping[str, Any]],
    points: Mapping[str, Mapping[str, Any]],
    selected: Sequence[float],
) -> None:
    """One space: a line, one standard error as a band, the selected point circled."""
    t = [p["coefficients"][0] for p in curve]
    score = [points[p["key"]]["score"] for p in curve]
    error = [points[p["key"]]["standard_error"] for p in curve]
    colour = COLOURS.get(space, "0.3")
    low, high = ([s + sign * e for s, e in zip(score, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(t, low, high, color=colour, alpha=0.15, linewidth=0)
    label = f"merge, {space} space"
    axes.plot(
        t,
        score,
        color=colour,
        marker=MARKERS.get(space, "o"),
        markersize=3.5,
        linewidth=1.4,
        label=label,
    )
    at = next((i for i, p in enumerate(curve) if list(p["coefficients"]) == list(selected)), None)
    if at is not None:
        axes.plot(
            t[at],
            score[at],
            marker="o",
            markersize=9,
            fillstyle="none",
            color=colour,
            linestyle="none",
        )
