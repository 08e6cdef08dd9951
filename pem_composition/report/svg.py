"""Charts as elements of a page: scales, curves with bands, levels, points that say what they are.

Elements are built, never written as text, so nothing that a file holds can become markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 42
MARKS = ("circle", "square", "triangle", "diamond", "down")
TICKS = 6
WIDE_RANGE = 4.0  # values further apart than this factor are drawn on a logarithmic axis
MARGIN = 0.05  # of the range, on each side
# Viridis in nine steps: lightness grows with the value, also for colour-blind readers.
SCALE = (
    "#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30",
    "#fde725",
)  # fmt: skip
# Blue to red through white, for values of both signs.
TWO_SIDED = (
    "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d",
    "#b2182b",
)  # fmt: skip

Spot = tuple[float, float]
Child = Element | str | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """An element; ``class_`` is its class, and ``_`` in a name stands for ``-``.

    Examples:
        >>> from xml.etree.ElementTree import tostring
        >>> tostring(element("b", "1 < 2", class_="x"), encoding="unicode")
        '<b class="x">1 &lt; 2</b>'
    """
    named = {k.rstrip("_").replace("_", "-"): str(v) for k, v in attributes.items()}
    made = Element(tag, named)
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + child
        elif child is not None:
            made.text = (made.text or "") + child
    return made


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten.

    Examples:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(n * step, digits) for n in range(first, last + 1)]


def colour(value: float, low: float, high: float, scale: Sequence[str] = SCALE) -> str:
    """The colour of a value between two bounds."""
    share = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    return scale[round(share * (len(scale) - 1))]


def is_dark(shade: str) -> bool:
    """True if white text can be read on a colour."""
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def mark(kind: str, x: float, y: float, size: float, style: str) -> Element:
    """A marker around a place."""
    if kind == "circle":
        return element("circle", cx=f"{x:.2f}", cy=f"{y:.2f}", r=f"{size:.2f}", class_=style)
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        "down": ((0, 1.2), (1.1, -0.9), (-1.1, -0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    }[kind]
    spots = " ".join(f"{x + size * a:.2f},{y + size * b:.2f}" for a, b in corners)
    return element("polygon", points=spots, class_=style)


@dataclass
class Chart:
    """A pair of axes over the given values; y grows upwards.

    Args:
        title: what a screen reader says of the chart.
        log: draw x on a logarithmic axis where its values are far apart.
    """

    title: str
    x_label: str
    xs: Sequence[float]
    ys: Sequence[float]
    log: bool = False
    parts: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = [x for x in self.xs if math.isfinite(x)]
        self.wide = self.log and min(found) > 0 and max(found) > WIDE_RANGE * min(found)
        self.x_low, self.x_high = _range([self._x(x) for x in found])
        self.y_low, self.y_high = _range(self.ys)

    def _x(self, x: float) -> float:
        return math.log10(max(x, 1e-300)) if self.wide else x

    def at(self, x: float, y: float) -> Spot:
        """Where a pair of values stands."""
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return (
            LEFT + wide * (self._x(x) - self.x_low) / (self.x_high - self.x_low),
            TOP + high * (self.y_high - y) / (self.y_high - self.y_low),
        )

    def band(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], style: str
    ) -> None:
        """The room between two curves."""
        edge = [*zip(xs, high, strict=True), *reversed([*zip(xs, low, strict=True)])]
        spots = " ".join("{:.2f},{:.2f}".format(*self.at(*spot)) for spot in edge)
        self.parts.append(element("polygon", points=spots, class_=f"band {style}"))

    def line(self, spots: Iterable[Spot], style: str, *, step: bool = False) -> None:
        """A curve through places, or in steps."""
        path = ""
        for x, y in (self.at(*spot) for spot in spots):
            path += (
                f"H{x:.2f}V{y:.2f}" if step and path else f"{'L' if path else 'M'}{x:.2f} {y:.2f}"
            )
        if path:
            self.parts.append(element("path", d=path, class_=f"line {style}"))

    def level(self, y: float, style: str) -> None:
        """A horizontal line from side to side."""
        top = f"{self.at(1.0, y)[1]:.2f}"
        self.parts.append(
            element(
                "line", x1=str(LEFT), x2=str(WIDTH - RIGHT), y1=top, y2=top, class_=f"line {style}"
            )
        )

    def upright(self, x: float, style: str) -> None:
        """A vertical line from bottom to top."""
        self.line([(x, self.y_low), (x, self.y_high)], style)

    def cross(self, x: float, y: float, dx: float, dy: float, style: str) -> None:
        """Standard errors of both values."""
        self.line([(x - dx, y), (x + dx, y)], f"error {style}")
        self.line([(x, y - dy), (x, y + dy)], f"error {style}")

    def point(self, x: float, y: float, said: str, kind: str, style: str, size: float = 4) -> None:
        """A marker that says what it is when it is pointed at or reached by key."""
        spot = self.at(x, y)
        self.parts.append(
            element(
                "g",
                element("title", said),
                mark(kind, *spot, size, style),
                mark("circle", *spot, 10, "reach"),
                class_="point",
                tabindex="0",
            )
        )

    def ring(self, x: float, y: float, style: str) -> None:
        """The point that was selected."""
        self.parts.append(mark("circle", *self.at(x, y), 9, f"ring {style}"))

    def note(self, x: float, y: float, words: str) -> None:
        """A few letters beside a place."""
        left, top = self.at(x, y)
        self.parts.append(
            element("text", words, x=f"{left + 7:.2f}", y=f"{top - 7:.2f}", class_="note")
        )

    def drawn(self) -> Element:
        """The chart as an element."""
        box = f"0 0 {WIDTH} {HEIGHT}"
        return element("svg", element("title", self.title), *self._axes(), *self.parts,
                       viewBox=box, role="img", class_="chart")  # fmt: skip

    def _axes(self) -> Iterator[Element]:
        bottom = HEIGHT - BOTTOM
        shown = ticks(self.x_low, self.x_high)
        if self.wide:
            powers = range(math.floor(self.x_low), math.ceil(self.x_high) + 1)
            found = [k * 10.0**p for p in powers for k in (1, 2, 5)]
            shown = [x for x in found if self.x_low <= math.log10(x) <= self.x_high]
        for x in shown:
            left = f"{self.at(x, self.y_low)[0]:.2f}"
            yield element("line", x1=left, x2=left, y1=str(TOP), y2=str(bottom), class_="grid")
            yield element("text", f"{x:g}", x=left, y=str(bottom + 15), class_="tick middle")
        for y in ticks(self.y_low, self.y_high):
            top = self.at(self.x_low, y)[1]
            yield element("line", x1=str(LEFT), x2=str(WIDTH - RIGHT), y1=f"{top:.2f}",
                          y2=f"{top:.2f}", class_="grid")  # fmt: skip
            yield element("text", f"{y:g}", x=str(LEFT - 6), y=f"{top + 4:.2f}", class_="tick end")
        middle = (LEFT + WIDTH - RIGHT) / 2
        yield element("text", self.x_label, x=f"{middle:.0f}", y=str(HEIGHT - 8),
                      class_="label middle")  # fmt: skip


def simplex(
    title: str, names: Sequence[str], spots: Sequence[tuple[Sequence[float], float, str, bool]]
) -> Element:
    """Three shares that sum to one as a triangle; each place a disc in the colour of its value.

    Args:
        names: of the corners.
        spots: shares, value, what the place says, and whether it was selected.
    """
    width, height, side = 480.0, 400.0, 340.0
    low, high = (f(value for _, value, *_ in spots) for f in (min, max))
    corners = ((width / 2, 40.0), (width / 2 - side / 2, 40 + side * 0.866),
               (width / 2 + side / 2, 40 + side * 0.866))  # fmt: skip
    outline = " ".join(f"{x:.2f},{y:.2f}" for x, y in corners)
    parts = [element("polygon", points=outline, class_="outline")]
    for shares, value, said, chosen in spots:
        x, y = (sum(s * c[i] for s, c in zip(shares, corners, strict=True)) for i in (0, 1))
        shade = colour(value, low, high)
        disc = element(
            "circle", cx=f"{x:.2f}", cy=f"{y:.2f}", r="12", style=f"fill:{shade}", class_="disc"
        )
        parts.append(element("g", element("title", said), disc, class_="point", tabindex="0"))
        if chosen:
            parts.append(mark("circle", x, y, 16, "ring ink"))
    for name, (x, y), down in zip(names, corners, (-18, 28, 28), strict=True):
        parts.append(
            element("text", name, x=f"{x:.2f}", y=f"{y + down:.2f}", class_="label middle")
        )
    for place, shade in enumerate(SCALE):
        parts.append(element("rect", x=f"{150 + 20 * place}", y=f"{height - 22:.0f}", width="20",
                             height="8", fill=shade))  # fmt: skip
    for value, x, side_ in ((low, 144, "end"), (high, 336, "start")):
        parts.append(element("text", f"{value:.3f}", x=str(x), y=f"{height - 14:.0f}",
                             class_=f"tick {side_}"))  # fmt: skip
    return element("svg", element("title", title), *parts, viewBox=f"0 0 {width:.0f} {height:.0f}",
                   role="img", class_="chart")  # fmt: skip


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest of the finite values, with a margin; one value has a range, too."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = MARGIN * (high - low) if high > low else max(0.5 * abs(low), 0.5) * 0.1
    return low - room, high + room
