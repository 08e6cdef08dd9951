"""Heat maps of a comparison (``pem compare``): depth from left to right, targets downwards.

One figure per pair of modules, one panel per measure, as PNG and PDF.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.report.plot import backend, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# measure -> title, colour map, smallest and largest value (None: of the data)
PANELS: Mapping[str, tuple[str, str, float | None, float | None]] = {
    "cosine": ("cosine of dW_a and dW_b", "RdBu_r", -1.0, 1.0),
    "weighted_sign_conflict": ("sign conflict, weighted by |x y|", "viridis", 0.0, 1.0),
    "column_overlap": ("column spaces: mean cos$^2$ of the angles", "viridis", 0.0, 1.0),
    "row_overlap": ("row spaces: mean cos$^2$ of the angles", "viridis", 0.0, 1.0),
    "cross_term_error": ("cross-term error of the paper's sum", "magma", 0.0, None),
}
CELL_INCHES = 0.42
MIN_PANEL_INCHES, MAX_PANEL_INCHES = 4.0, 16.0
LABEL_INCHES, TITLE_INCHES = 2.4, 0.95
MOST_DIGITS = 5  # after the point; smaller numbers have an exponent
MAX_NUMBERED = 16  # columns; with more, cells have no numbers


def write(comparison: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw every pair of a ``pem.compare/1`` object into ``out``; returns the files.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    backend()
    pairs = [p for p in comparison["pairs"] if p["layers"]]
    named = zip(file_names(len(pairs)), pairs, strict=True)
    return [file for name, pair in named for file in save(draw(pair), out, name)]


def file_names(pairs: int) -> list[str]:
    """Stems of the figures, in the order of the pairs."""
    return ["heatmap"] if pairs == 1 else [f"heatmap-{i}" for i in range(pairs)]


def place_of(layer: str) -> tuple[str, int]:
    """A layer's row (its name with the block's number taken out) and its depth."""
    match = re.search(r"(?<=\.)\d+(?=\.)", layer)
    if match is None:
        return layer, 0
    return layer[: match.start()] + "#" + layer[match.end() :], int(match[0])


def grid_of(
    pair: Mapping[str, Any], measure: str
) -> tuple[list[str], list[int], list[list[float]]]:
    """Rows, depths, and a value for each of their cells (NaN where there is no such layer)."""
    found = {place_of(layer): row[measure] for layer, row in pair["layers"].items()}
    rows = list(dict.fromkeys(row for row, _ in found))
    depths = sorted({depth for _, depth in found})

    def value(row: str, depth: int) -> float:
        number = found.get((row, depth))
        return float("nan") if number is None else number

    return rows, depths, [[value(row, depth) for depth in depths] for row in rows]


def form_of(largest: float) -> str:
    """How cells are printed: two digits after the point, of small numbers two digits in all.

    Examples:
        >>> f"{0.5:{form_of(1.0)}}", f"{0.000123:{form_of(0.0005)}}"
        ('0.50', '0.00012')
    """
    if largest <= 0:
        return ".2f"
    digits = max(2, 1 - math.floor(math.log10(largest)))
    return f".{digits}f" if digits <= MOST_DIGITS else ".1e"


def draw(pair: Mapping[str, Any]) -> Figure:
    """One panel per measure that the pair has."""
    from matplotlib import pyplot

    measures = [m for m in PANELS if any(r[m] is not None for r in pair["layers"].values())]
    rows, depths, _ = grid_of(pair, measures[0])
    width = min(max(CELL_INCHES * len(depths), MIN_PANEL_INCHES), MAX_PANEL_INCHES)
    height = CELL_INCHES * len(rows) + TITLE_INCHES
    figure, grid = pyplot.subplots(
        len(measures), 1, squeeze=False, layout="constrained",
        figsize=(width + LABEL_INCHES, height * len(measures) + 0.4),
    )  # fmt: skip
    for axes, measure in zip(grid[:, 0], measures, strict=True):
        _panel(axes, pair, measure)
    grid[-1, 0].set_xlabel("block", fontsize=9)
    figure.suptitle(f"a = {pair['a']}, b = {pair['b']}", fontsize=10)
    return figure


def _panel(axes: Axes, pair: Mapping[str, Any], measure: str) -> None:
    title, colours, low, high = PANELS[measure]
    rows, depths, values = grid_of(pair, measure)
    numbered = len(depths) <= MAX_NUMBERED
    form = form_of(high if high is not None else max(v for row in values for v in row if v == v))
    # Cells that print the same number have the same colour.
    shown = [[float(f"{v:{form}}") for v in row] for row in values] if numbered else values
    image = axes.imshow(shown, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(depths)), map(str, depths), fontsize=7)
    axes.set_yticks(range(len(rows)), short(rows), fontsize=7)
    total = pair["total"][measure]
    axes.set_title(title + ("" if total is None else f" (total {total:.3g})"), fontsize=9)
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    if numbered:
        _numbers(axes, image, shown, form)


def _numbers(axes: Axes, image: Any, values: Sequence[Sequence[float]], form: str) -> None:
    """The value in its cell, in black or white, whichever can be read on the cell's colour."""
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(
                    x, y, f"{value:{form}}", ha="center", va="center", fontsize=6.5,
                    color="white" if dark else "black",
                )  # fmt: skip


def short(rows: Sequence[str]) -> list[str]:
    """The last components of the rows, as many as tell them apart."""
    parts = [row.split(".") for row in rows]
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(rows):
        depth += 1
    return [".".join(p[-depth:]) for p in parts]
