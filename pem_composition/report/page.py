"""``report.html``: a sweep or a search as one file that needs no server, no network, no program.

Charts are drawn here, as SVG; a few lines of script show what a point is when it is pointed at.
The document is built from elements and serialised once, so a text, a task or a path that a file
holds is always text. A policy in the page forbids everything that is not in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

from pem_composition import json_lines
from pem_composition._version import __version__
from pem_composition.errors import DataError
from pem_composition.report import heatmap, svg, table, text, unlearning_tables
from pem_composition.report.frames import (
    APPLIED,
    BASE,
    COEFFICIENT,
    CURVE,
    ERROR,
    JOINT,
    SINGLE,
    STRENGTH,
    Line,
    Points,
    points,
)
from pem_composition.report.records import NEGATION, Results
from pem_composition.report.svg import Chart, Child, element
from pem_composition.safe_files import write_text

FILE = "report.html"
COMPARISON = "comparison.json"  # what pem compare writes
MOST_TEXTS = 200  # pairs of texts in a page
STYLES = 5  # colours of curves; a further one takes the next marker
KINDS = svg.MARKS
LEVELS = ("dash", "dot", "dashdot")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
VERSIONS = ("torch", "transformers", "device", "weights", "bf16")

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#59636e;--rule:#d8dee4;--c0:#0072b2;
--c1:#c84e00;--c2:#007a5a;--c3:#a8487a;--c4:#8a6d00;--box:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--soft:#a2abb5;
--rule:#363c44;--c0:#56b4e9;--c1:#f5893d;--c2:#2fc29a;--c3:#e79ac2;--c4:#e6c84b;--box:#1e2329}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .4rem}
h3{font-size:1rem;margin:.6rem 0 .2rem}p{margin:.4rem 0;max-width:50rem}.soft{color:var(--soft)}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
figure{margin:0;max-width:36rem}figcaption{font-size:.88rem}.chart{width:100%;height:auto;display:block}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{font-weight:600;overflow-wrap:normal}td.num{white-space:nowrap;overflow-wrap:normal}
.heat td{padding:.2rem .35rem;text-align:center;border:1px solid var(--paper);overflow-wrap:normal}
.heats{display:flex;flex-wrap:wrap;gap:.8rem 2rem}.heats h4{font-size:.88rem;margin:.2rem 0}
.heat th{white-space:nowrap;border:0;font-weight:400}.lit{color:#fff}.unlit{color:#111}
text{fill:var(--ink);font:12px system-ui,sans-serif}.tick{fill:var(--soft)}
.middle{text-anchor:middle}
.end{text-anchor:end}.start{text-anchor:start}.note{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke:var(--s);stroke-width:2}.under{stroke-width:4.5;opacity:.55}
.over{stroke-width:1.8;stroke-dasharray:6 4}.band{fill:var(--s);opacity:.15}
.error{stroke-width:1;opacity:.55}.ring{fill:none;stroke:var(--s);stroke-width:2}
circle,polygon{fill:var(--s)}.hollow{fill:var(--paper);stroke:var(--s);stroke-width:1.8}
.reach{fill:transparent}.dash{stroke-dasharray:7 4}.dot{stroke-dasharray:2 3}
.dashdot{stroke-dasharray:8 3 2 3}.thin{stroke-width:1.3}.outline{fill:none;stroke:var(--rule)}
.disc{stroke:var(--paper);stroke-width:1.5}
.c0{--s:var(--c0)}.c1{--s:var(--c1)}.c2{--s:var(--c2)}.c3{--s:var(--c3)}.c4{--s:var(--c4)}
.ink{--s:var(--ink)}.grey{--s:var(--soft)}
.point{cursor:pointer;outline:none}.point:hover .reach,.point:focus .reach{stroke:var(--ink)}
.legend{list-style:none;margin:.3rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;
font-size:.88rem}.legend svg{width:34px;height:14px;vertical-align:-2px;margin-right:.35rem}
#said{position:fixed;z-index:2;display:none;max-width:min(34rem,92vw);padding:.5rem .7rem;
background:var(--box);border:1px solid var(--rule);border-radius:6px;font-size:.84rem;
white-space:pre-wrap;box-shadow:0 2px 10px #0004}
code,pre{font:.84rem/1.45 ui-monospace,monospace;background:var(--box);border-radius:4px}
code{padding:.1rem .3rem}pre{padding:.6rem;white-space:pre-wrap;margin:.3rem 0}
details{margin:.5rem 0}summary{cursor:pointer}blockquote{margin:.2rem 0 .8rem;padding:.2rem .8rem;
border-left:3px solid var(--rule);white-space:pre-wrap}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--rule:#ccc;--c0:#0072b2;--c1:#c84e00;
--c2:#007a5a;--c3:#a8487a;--c4:#8a6d00;--box:#f6f8fa}body{padding:0;max-width:none;font-size:11pt}
figure,tr{break-inside:avoid}h2,h3{break-after:avoid}#said{display:none!important}
.wide{overflow:visible}table{font-size:7pt;overflow-wrap:anywhere}
th,td{padding:1pt 3pt}td.num{white-space:normal}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
SCRIPT = """
const said = document.getElementById("said");
const middle = point => {
  const box = point.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
};
for (const point of document.querySelectorAll(".point")) {
  const title = point.querySelector("title");
  point.setAttribute("aria-label", title.textContent);
  point.setAttribute("role", "button");
  title.remove();
  const show = () => {
    // Points that lie on one another are all said.
    const [x, y] = middle(point);
    const near = [...point.parentNode.querySelectorAll(".point")].filter(other => {
      const [a, b] = middle(other);
      return Math.hypot(a - x, b - y) < 4;
    });
    said.textContent = near.map(other => other.getAttribute("aria-label")).join("\\n\\n");
    said.style.display = "block";
    const at = point.getBoundingClientRect(), own = said.getBoundingClientRect();
    said.style.left = Math.max(4, Math.min(at.right + 8, innerWidth - own.width - 4)) + "px";
    said.style.top = Math.max(4, Math.min(at.bottom + 8, innerHeight - own.height - 4)) + "px";
  };
  point.addEventListener("pointerenter", show);
  point.addEventListener("focus", show);
  const hide = () => { if (document.activeElement !== point) said.style.display = "none"; };
  point.addEventListener("pointerleave", hide);
}
// A point that was clicked keeps its words, to be copied, until something else is clicked.
addEventListener("pointerdown", e => {
  if (!said.contains(e.target) && !e.target.closest(".point")) said.style.display = "none";
});
addEventListener("keydown", e => {
  if (e.key === "Escape") { said.style.display = "none"; document.activeElement.blur(); }
});
"""


def document(found: Results, axes: Sequence[str] = (), comparison: Path | None = None) -> str:
    """The page of one sweep or search.

    Args:
        axes: the two measures of the frontier; default: the two tasks or goals, else a measure
            and what it costs.
        comparison: a comparison.json of ``pem compare``, or its folder; default: the one beside
            the results.

    Raises:
        DataError: no comparison where one is named.
        UsageError: no such measure.
    """
    facts = _comparison(comparison, found.path.parent)
    body = page(found, points(found), axes, facts)
    return "<!DOCTYPE html>\n" + tostring(body, encoding="unicode", method="html") + "\n"


def write(whole: str, file: Path) -> list[Path]:
    """Write a document; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, whole)
    return [file]


def page(
    results: Results, found: Points, axes: Sequence[str] = (), comparison: Any = None
) -> Element:
    """The document."""
    s = results.summary
    negation = s["composition"] == NEGATION
    tasks = ", ".join(s["tasks"]) if not negation else s["asked"]["name"]
    subject = f"{s['module']}, negated" if negation else table.subject(results)
    sections = [
        *_table(results),
        *_curves(s, found),
        *_simplex(s, found),
        *_frontier(s, found, axes),
        *_texts(results),
        *_layers(results, comparison),
        *_making(results, found),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{tasks}: {subject}"),
        element("style", STYLE),
    )
    top = [
        element("h1", f"{tasks}: {subject}"),
        element("p", f"Base model {s['base_name'] or 'unnamed'}.", class_="soft"),
    ]
    said = element("div", id="said", role="status")
    body = element("body", element("main", *top, *sections), said, element("script", SCRIPT))
    return element("html", head, body, lang="en")


def _section(title: str, *children: Child) -> Element:
    return element("section", element("h2", title), *children)


# --- table ---


def _table(results: Results) -> Iterator[Element]:
    room = unlearning_tables if results.summary["composition"] == NEGATION else table
    columns, notes = room.shown(results)
    yield _section(
        "Table",
        element("div", _cells(columns), class_="wide"),
        *(element("p", _bare(note), class_="soft") for note in notes if note),
    )


def _cells(columns: Iterable[text.Column]) -> Element:
    header, *lines = zip(*([title, *cells] for title, cells in columns), strict=True)
    rows = [
        element("tr", *(element("td", _bare(cell), class_=_kind(cell)) for cell in line))
        for line in lines
    ]
    head = element("thead", element("tr", *(element("th", str(h), scope="col") for h in header)))
    return element("table", head, element("tbody", *rows))


def _bare(cell: object) -> str:
    """A cell's text without the stars of Markdown, and with the sign of its error."""
    return str(cell).replace("**", "").replace("+-", "\N{PLUS-MINUS SIGN}")


def _kind(cell: object) -> str:
    return "num" if str(cell)[:1].lstrip("+-").isdigit() or "+-" in str(cell) else "word"


# --- charts ---


def _numbers(frame: Any, name: str) -> list[float]:
    return [float("nan") if text.absent(v) else float(v) for v in frame[name]]


def _error(line: Line, name: str) -> float:
    """The standard error of a measure, 0 where it has none."""
    error = line.get(name + ERROR)
    return 0.0 if text.absent(error) else float(error)


def _said(line: Line, found: Points, names: Iterable[str]) -> str:
    """What a point is: its name, its measures, and the command that makes it again."""
    first = str(line["name"]) + (", selected" if line.get("chosen") is True else "")
    lines = [f"{line['series']}: {first}" if line["series"] != line["name"] else first]
    if not text.absent(line.get("at")) and found.across not in ("", COEFFICIENT):
        lines.append(f"{found.across} {line['at']:g}")
    for name in names:
        if not text.absent(line.get(name)):
            shown = text.with_error(line[name], line.get(name + ERROR), 4)
            lines.append(f"{name}: {shown.replace('+-', chr(177))}")
    if isinstance(command := line.get("command"), str) and command:
        lines.append(command)
    return "\n".join(lines)


def _style(place: int) -> tuple[str, str]:
    """Colour and marker of a series."""
    return f"c{place % STYLES}", KINDS[place % len(KINDS)]


def _swatch(line: str | None, marker: tuple[str, str] | None = None) -> Element:
    """A line of a style, a marker of a kind and style, or both, for a legend."""
    parts = []
    if line is not None:
        parts.append(element("line", x1="1", x2="33", y1="7", y2="7", class_=f"line {line}"))
    if marker is not None:
        parts.append(svg.mark(marker[0], 17, 7, 4, marker[1]))
    return element("svg", *parts, viewBox="0 0 34 14", aria_hidden="true")


def _legend(entries: Iterable[tuple[Element, str]]) -> Element:
    return element("ul", *(element("li", mark, name) for mark, name in entries), class_="legend")


def _measures(found: Points) -> list[str]:
    """The measures that a reader meets first: those with a standard error, else all."""
    return [name for name in found.signs if name + ERROR in found.frame] or list(found.signs)


def _curves(s: Mapping[str, Any], found: Points) -> Iterator[Element]:
    """Every measure over the coefficient, the strength or the trials."""
    curves = found.series()
    if not found.across or not curves:
        return
    names = list(found.signs)[:1] if "search" in s else _measures(found)
    charts = [_curve(found, name, "search" in s) for name in names]
    legend: list[tuple[Element, str]] = []
    for place, series in enumerate(curves):
        style, kind = _style(place)
        line = f"{style} {_stroke(place, len(curves))}"
        legend.append((_swatch(line, (kind, f"{style} {'hollow' if place else ''}")), series))
    if "search" not in s:
        for style, line in _levels(found):
            legend.append((_swatch(style), line["name"]))
        if len(found.lines[SINGLE]) > 1:
            legend.append((_swatch("ink thin"), table.AVERAGE))
        if any(line["chosen"] for line in found.lines[CURVE]):
            ring = element("svg", svg.mark("circle", 17, 7, 5.5, "ring ink"), viewBox="0 0 34 14")
            legend.append((ring, "selected"))
    title = {COEFFICIENT: "Curves over the coefficient"}.get(
        found.across, "Best so far" if "search" in s else f"Curves over the {found.across}"
    )
    note = (
        "Bands: one standard error." if "search" not in s
        else "Trials that miss a condition are left out."
    )  # fmt: skip
    yield _section(title, element("p", note, class_="soft"), _legend(legend),
                   element("div", *charts, class_="charts"))  # fmt: skip


def _stroke(place: int, count: int) -> str:
    """Thick below thin: curves that are equal are both seen."""
    return "under" if place == 0 and count > 1 else "over" if place else ""


def _levels(found: Points) -> Iterator[tuple[str, Line]]:
    """The modules alone, the joint module and the base, each with its style."""
    for place, line in enumerate(found.lines[SINGLE]):
        yield f"grey thin {LEVELS[place % len(LEVELS)]}", line
    for line in found.lines[JOINT]:
        yield "c2 thin dash", line
    for line in found.lines[BASE]:
        yield "ink thin", line
    for line in found.lines[APPLIED]:
        yield "grey thin dash", line


def _curve(found: Points, name: str, best: bool) -> Element:
    """One measure; ``best``: as the best value so far."""
    own = [[x for x in lines if not text.absent(x[name])] for lines in found.series().values()]
    levels = [] if best else [x for x in _levels(found) if not text.absent(x[1].get(name))]
    everything = [line for lines in own for line in lines]
    spread = [float(x[name]) + way * _error(x, name) for x in everything for way in (-1, 1)]
    spread += [float(line[name]) for _, line in levels]
    at = [float(line["at"]) for line in everything]
    label = found.labels[name]
    chart = Chart(f"{name} over the {found.across}", found.across, at, spread)
    for style, line in levels:
        chart.level(float(line[name]), style)
    singles = found.of(SINGLE)
    if len(singles) > 1 and not best:
        chart.level(float(singles[name].mean()), "ink thin")
    for place, lines in enumerate(own):
        style, kind = _style(place)
        xs, ys = ([float(line[key]) for line in lines] for key in ("at", name))
        order = sorted(range(len(xs)), key=xs.__getitem__)
        shown = list(ys)
        if best:
            way = max if found.signs[name] >= 0 else min
            shown = [way(ys[i] for i in order[: n + 1]) for n in range(len(order))]
            chart.line(((xs[i], y) for i, y in zip(order, shown, strict=True)),
                       f"{style} {_stroke(place, len(own))}", step=True)  # fmt: skip
        else:
            _draw(chart, lines, name, place, len(own))
        for line, x, y in zip(lines, xs, ys, strict=True):
            hollow = "hollow" if place else ""
            chart.point(x, y, _said(line, found, [name]), kind, f"{style} {hollow}", 3.2)
            if line["chosen"] is True:
                chart.ring(x, y, style)
    return _figure(name, label, chart)


def _figure(name: str, label: str, chart: Chart) -> Element:
    """A chart below its vertical measure."""
    rest = "" if label.replace("-", "_") == name else label.removeprefix(name)
    title = element("figcaption", element("strong", name), f" {rest}")
    return element("figure", title, chart.drawn())


def _draw(chart: Chart, curve: Sequence[Line], name: str, place: int, count: int) -> None:
    """A line with its band, in the order of the horizontal axis."""
    style, _ = _style(place)
    lines = sorted(curve, key=lambda line: line["at"])
    xs, ys = ([float(line[key]) for line in lines] for key in ("at", name))
    errors = [_error(line, name) for line in lines]
    low, high = ([y + way * e for y, e in zip(ys, errors, strict=True)] for way in (-1, 1))
    if any(errors):
        chart.band(xs, low, high, style)
    chart.line(zip(xs, ys, strict=True), f"{style} {_stroke(place, count)}")


def _simplex(s: Mapping[str, Any], found: Points) -> Iterator[Element]:
    """Three modules: every measure over their shares."""
    if "curve" not in s or s["composition"] == "analogy" or len(s["modules"]) != 3:
        return
    figures = []
    for series, lines in found.series().items():
        within = [
            c for c in lines
            if min(c["coefficients"]) >= 0 and abs(sum(c["coefficients"]) - 1) < 1e-9
        ]  # fmt: skip
        for name in _measures(found):
            title = f"{name}, {series}"
            spots = [
                (c["coefficients"], float(c[name]), _said(c, found, [name]), c["chosen"] is True)
                for c in within
            ]
            if spots:
                drawn = svg.simplex(title, s["modules"], spots)
                figures.append(
                    element("figure", element("figcaption", element("strong", title)), drawn)
                )
    if figures:
        note = "Each corner is one module alone; the ring is the selected point."
        yield _section("Shares of three modules", element("p", note, class_="soft"),
                       element("div", *figures, class_="charts"))  # fmt: skip


def pair_of(found: Points) -> tuple[str, ...]:
    """The measures of the frontier where none are named; fewer than two where there are none."""
    first = list(found.signs)
    if "perplexity" in found.signs:  # what unlearning costs, and what it brings
        return "perplexity", first[0]
    return tuple(first[:2])


def _frontier(s: Mapping[str, Any], found: Points, axes: Sequence[str]) -> Iterator[Element]:
    """One measure against another; what lies on the front is joined."""
    found.check(axes)
    names = tuple(axes) or pair_of(found)
    if len(names) < 2:
        return
    x, y = names
    everything = found.frame.dropna(subset=[x, y])
    if everything.empty:
        return
    errors = [[0.0 if text.absent(e) else float(e) for e in everything[n + ERROR]]
              if n + ERROR in everything else [0.0] * len(everything) for n in names]  # fmt: skip
    label = {
        n: found.labels[n] if n in found.labels[n] else f"{n}: {found.labels[n]}" for n in names
    }
    ends = [
        [v + way * e for v, e in zip(_numbers(everything, n), own, strict=True) for way in (-1, 1)]
        for n, own in zip(names, errors, strict=True)
    ]
    chart = Chart(f"{y} against {x}", label[x], *ends, log=x == "perplexity")
    front = found.front(x, y)
    if all(found.signs[n] for n in names):
        chart.line(zip(_numbers(front, x), _numbers(front, y), strict=True), "ink thin")
    named = dict.fromkeys(zip(everything["role"], everything["series"], strict=True))
    look: dict[tuple[str, str], tuple[str, str]] = {}
    others = 0
    for role, series in named:
        if role == CURVE:
            look[role, series] = _style(sum(r == CURVE for r, _ in look))
        else:
            look[role, series] = ("ink" if role == BASE else "c2" if role == JOINT else "grey",
                                  KINDS[(2 + others) % len(KINDS)])  # fmt: skip
            others += 1
    for line, dx, dy in zip(everything.to_dict("records"), *errors, strict=True):
        style, kind = look[line["role"], line["series"]]
        chart.cross(float(line[x]), float(line[y]), dx, dy, style)
        size = 4 if line["role"] == CURVE else 6
        chart.point(float(line[x]), float(line[y]), _said(line, found, names), kind, style, size)
        if line.get("chosen") is True:
            chart.ring(float(line[x]), float(line[y]), style)
        if found.across == STRENGTH and line["role"] == CURVE:
            chart.note(float(line[x]), float(line[y]), f"{line['at']:g}")
    entries = [
        (_swatch(None, (kind, style)), series) for (_, series), (style, kind) in look.items()
    ]
    entries.append((_swatch("ink thin"), "front"))
    base = found.of(BASE)
    if x == "perplexity" and len(base):
        chart.upright(float(base[x].iloc[0]) * (1 + s["max_increase"]), "grey thin dash")
        entries.append((_swatch("grey thin dash"), f"perplexity {text.percent(s['max_increase'])}"))
    further = ", ".join(name for name in found.signs if name not in names)
    note = "Point at a place to see what it is and the command that makes it."
    note += f" Other measures for --axes: {further}." if further else ""
    yield _section("Frontier", element("p", note, class_="soft"), _legend(entries),
                   element("div", _figure(y, found.labels[y], chart), class_="charts"))  # fmt: skip


# --- texts, layers, how it was made ---


def _texts(results: Results) -> Iterator[Element]:
    """What the base and the chosen strength wrote to the same prompts, hidden until asked for."""
    s = results.summary
    if s["composition"] != NEGATION:
        return
    of = {row["strength"]: row for row in s["rows"]}
    strength = s["selected"] if s["selected"] is not None else max(of)
    files = [results.path.parent / of[key]["file"] for key in (0.0, strength) if key in of]
    if len(files) < 2 or not all(map(Path.is_file, files)):
        return
    pairs = list(zip(*map(json_lines.read, files), strict=False))
    items: list[Element] = []
    for before, after in pairs[:MOST_TEXTS]:
        items.append(element("h3", str(before.get("prompt", ""))))
        for name, one in (("base model", before), (f"strength {strength:g}", after)):
            scores = ", ".join(f"{k} {v:.2f}" for k, v in (one.get("scores") or {}).items())
            items.append(element("p", f"{name}: {scores}", class_="soft"))
            items.append(element("blockquote", str(one.get("text", ""))))
    cut = f" The first {MOST_TEXTS} of {len(pairs)}." if len(pairs) > MOST_TEXTS else ""
    which = "the chosen strength" if s["selected"] is not None else "the largest strength"
    yield _section(
        "Texts",
        element("p", f"The base model and {which} to the same prompts. Texts of a base model and "
                f"of a toxic module can offend; they are shown to judge the removal.{cut}",
                class_="soft"),
        element("details", element("summary", f"Show {2 * len(pairs[:MOST_TEXTS])} texts"), *items),
    )  # fmt: skip


def _layers(results: Results, comparison: Any) -> Iterator[Element]:
    """How the modules relate layer by layer, and how exact the written sums are."""
    parts: list[Element] = []
    for pair in comparison["pairs"] if comparison else ():
        if not pair["layers"]:
            continue
        maps = []
        for measure, (title, colours, low, high) in heatmap.PANELS.items():
            if any(row[measure] is not None for row in pair["layers"].values()):
                scale = svg.TWO_SIDED if colours.startswith("RdBu") else svg.SCALE
                title = title.replace("$^2$", "\N{SUPERSCRIPT TWO}")
                maps.append(_heat(title, heatmap.grid_of(pair, measure), scale, low, high))
        parts.append(element("h3", f"a = {pair['a']}, b = {pair['b']}"))
        parts.append(element("div", *maps, class_="heats"))
    certificates = []
    for folder in sorted(p.parent for p in results.path.parent.glob("*/pem.json")):
        certificate = (_json(folder / "pem.json") or {}).get("certificate") or {}
        errors = certificate.get("layers", {}).items()
        layers = {name: {"error": e} for name, e in errors if e is not None}
        if layers:
            grid = heatmap.grid_of({"layers": layers}, "error")
            total = certificate["total"]
            title = f"{folder.name}: {'unknown' if total is None else f'{total:.3g}'} in total"
            certificates.append(_heat(title, grid, svg.SCALE, 0.0, None))
            against = certificate["against"]
    if certificates:
        parts.append(element("h3", f"Certificates: relative error against {against}"))
        parts.append(element("div", *certificates, class_="heats"))
    if parts:
        yield _section("Layers", element("p", "Depth from left to right.", class_="soft"), *parts)


def _heat(
    title: str, grid: tuple[list[str], list[int], list[list[float]]], scale: Sequence[str],
    low: float | None, high: float | None,
) -> Element:  # fmt: skip
    """A measure of every layer as a table of coloured cells."""
    names, depths, values = grid
    finite = [v for row in values for v in row if v == v]
    ends = (min(finite) if low is None else low, max(finite) if high is None else high)
    form = heatmap.form_of(ends[1])
    head = element("tr", element("th"), *(element("th", str(d), scope="col") for d in depths))
    rows = []
    for name, row in zip(heatmap.short(names), values, strict=True):
        cells = [element("th", name, scope="row")]
        for value in row:
            if value != value:
                cells.append(element("td"))
                continue
            shade = svg.colour(float(f"{value:{form}}"), *ends, scale)  # of what is printed
            style = "lit" if svg.is_dark(shade) else "unlit"
            said = f"{name}, {value:.6g}"
            cells.append(element("td", f"{value:{form}}", bgcolor=shade, title=said, class_=style))
        rows.append(element("tr", *cells))
    whole = element("table", element("thead", head), element("tbody", *rows), class_="heat")
    return element("div", element("h4", title), element("div", whole, class_="wide"))


def _making(results: Results, found: Points) -> Iterator[Element]:
    """The commands, the versions and the checksums."""
    s = results.summary
    chosen = found.of(CURVE)
    chosen = chosen[chosen["chosen"].astype(bool)]
    commands = dict.fromkeys(filter(None, [s.get("command"), *chosen["command"]]))
    record = next(iter(results.points.values()))
    facts: list[tuple[str, object]] = [("pem_composition (this page)", __version__)]
    facts += [(name, record[name]) for name in VERSIONS if record.get(name)]
    facts += [("rules of the results", record["results"])] if record.get("results") else []
    facts += [("seed", v) for v in (s.get("seed"), s.get("asked", {}).get("seed")) if v is not None]
    sums: list[tuple[str, object]] = [("base model", s["base"])]
    sums += _digests(results)
    parts: list[Element] = []
    if commands:
        parts.append(element("p", "The command, and those that make the selected modules again:"))
        parts += [element("pre", line) for line in commands]
    parts.append(_facts("Versions", facts))
    parts.append(_facts("Checksums (sha256)", sums))
    yield _section("How it was made", *parts)


def _digests(results: Results) -> Iterator[tuple[str, object]]:
    s = results.summary
    if s["composition"] == NEGATION:
        modules = [r["module"] for r in results.points.values() if isinstance(r.get("module"), str)]
        yield from ((s["module"], digest) for digest in dict.fromkeys(modules))
        for name, judge in s["judges"].items():
            yield f"judge {name} {judge['version']}", judge["sha256"]
        return
    names = s["modules"]
    whole = (
        r["modules"] for r in results.points.values() if len(r.get("modules", ())) == len(names)
    )
    for name, digest in zip(names, next(whole, ()), strict=False):
        yield name, digest
    seen = {(r.get("task"), r.get("split"), r.get("rows")): None for r in results.points.values()}
    for task, split, digest in seen:
        if digest:
            yield f"rows of {task}, {split}", digest


def _facts(title: str, facts: Iterable[tuple[str, object]]) -> Element:
    rows = [
        element("tr", element("th", name, scope="row"), element("td", element("code", str(value))))
        for name, value in facts
    ]
    return element("div", element("h3", title), element("table", element("tbody", *rows)),
                   class_="wide")  # fmt: skip


def _comparison(named: Path | None, folder: Path) -> Any:
    """The comparison that was named, as a file or its folder, or that lies beside the results.

    Raises:
        DataError: what was named is none.
    """
    path = folder if named is None else named
    facts = _json(path / COMPARISON if path.is_dir() else path)
    if isinstance(facts, dict) and str(facts.get("schema", "")).startswith("pem.compare/"):
        return facts
    if named is not None:
        raise DataError.build(
            named, "no comparison", expected=f"{COMPARISON}, or its folder",
            do="pem compare MODULE MODULE -p OUT writes one",
        )  # fmt: skip
    return None


def _json(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
