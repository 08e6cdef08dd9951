"""The measured tables of the docs, written from rows of data.

    python scripts/results.py write             # every table and figure in docs/results
    python scripts/results.py list [TABLE]      # tables, or the rows of one
    python scripts/results.py show ROW          # its values
    python scripts/results.py command ROW       # what measures it again, and where that goes
    python scripts/results.py put TABLE FILE    # rows of a JSON lines file into it, by their names
    python scripts/results.py take ROW FOLDER   # the row's values from the table.csv of a run
    python scripts/results.py compare ROW FOLDER    # these beside the stored; 1 if they differ

A row is a line of ``results/PAGE.jsonl``: its table, its name, and values as plain numbers; errors
are in fields that end in ``_se``. ``results/tables.json`` says of a table which columns it has. A
column is a template: ``{x:.3}`` is a number of three digits without the zero before the point,
``{x:+.3}`` one with its sign, ``{x}`` anything; ``[...]`` is left out where a value in it is
missing. ``command`` of a table is a template, too. ``like`` names a table with the same columns,
``scores`` a leaderboard (``pem report --leaderboard``) that its rows are computed from.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "results"
PAGES = ROOT / "docs" / "results"
FIGURES = ROOT / "docs" / "figures"
SHARED = ("page", "columns", "fields")
FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
OPTIONAL = re.compile(r"\[([^][]*)\]")  # the innermost
BLOCK = re.compile(
    r"(?m)^(?P<indent> *)<!-- table (?P<name>[\w-]+) -->\n(?P<body>(?:(?P=indent)\|.*\n)*)"
)
MISSING = "-"
MARKS = "osD^vP*X"
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999",
)  # fmt: skip

Row = Mapping[str, Any]


def read_tables() -> dict[str, dict[str, Any]]:
    """The tables by name; one that is ``like`` another has its page, columns and fields."""
    told = json.loads((DATA / "tables.json").read_text(encoding="utf-8"))
    shared = {
        name: {key: value for key, value in table.items() if key in SHARED}
        for name, table in told.items()
    }
    return {name: shared.get(table.get("like"), {}) | table for name, table in told.items()}


TABLES = read_tables()


def rows_of(table: str) -> list[dict[str, Any]]:
    """Rows of a table, in the order of the file; of a leaderboard those that its scores make."""
    if scores := TABLES[table].get("scores"):
        return [
            {"table": table, "name": f"{table}/{row.method.replace(' ', '-')}", **row._asdict()}
            for row in standings(DATA / scores)
        ]
    file = DATA / f"{TABLES[table]['page']}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["table"] == table]


def computed(name: str) -> bool:
    """True for a table, or a row of one, that a leaderboard makes."""
    return "scores" in TABLES.get(name.partition("/")[0], {})


def standings(file: Path) -> list[Any]:
    """The methods of a leaderboard."""
    sys.path.insert(0, str(ROOT))
    from pem_composition.report import leaderboard

    return leaderboard.standings(leaderboard.read(file))


def number(value: object, spec: str) -> str:
    """A value by its spec.

    Examples:
        >>> number(0.8124, ".3"), number(0.8124, "0.3"), number(-0.02, "+.3"), number(0.0, "+.3")
        ('.812', '0.812', '-.020', '.000')
        >>> number(0.23, "%"), number(0.5, ""), number("MiniLM", "")
        ('23%', '.5', 'MiniLM')
    """
    if isinstance(value, str):
        return value
    assert isinstance(value, int | float)
    if spec == "%":
        return f"{value:.0%}"
    sign, zero, digits = re.fullmatch(r"(\+?)(0?)(?:\.(\d+))?", spec).groups()  # type: ignore[union-attr]
    text = str(value) if digits is None else f"{value:.{digits}f}"
    if not float(text):
        text, sign = text.removeprefix("-"), ""
    text = f"+{text}" if sign and value > 0 else text
    return text if zero else re.sub(r"^([+-]?)0\.", r"\1.", text)


def filled(template: str, row: Row) -> str:
    """A cell; ``-`` where a value that is not in brackets is missing."""

    def known(text: str) -> bool:
        return all(row.get(name) is not None for name, _ in FIELD.findall(text))

    while OPTIONAL.search(template):
        template = OPTIONAL.sub(lambda m: m[1] if known(m[1]) else "", template)
    if not known(template):
        return MISSING
    return FIELD.sub(lambda m: number(row[m[1]], m[2] or ""), template)


def table_lines(name: str) -> Iterator[str]:
    """A table in Markdown."""
    columns: dict[str, str] = TABLES[name]["columns"]
    yield "| " + " | ".join(c.strip() for c in columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows_of(name):
        as_text = row.get("cells", {})  # what no template says
        cells = [as_text.get(c) or filled(template, row) for c, template in columns.items()]
        yield "| " + " | ".join(cells) + " |"


def written(page: str) -> str:
    """A page with its tables as the rows say them."""

    def block(found: re.Match[str]) -> str:
        indent = found["indent"]
        lines = "".join(f"{indent}{line}\n" for line in table_lines(found["name"]))
        return f"{indent}<!-- table {found['name']} -->\n{lines}"

    return BLOCK.sub(block, page)


def pages() -> list[Path]:
    """The pages that hold tables."""
    return [*sorted(PAGES.glob("*.md")), ROOT / "docs" / "results.md"]


# --- runs -----------------------------------------------------------------------------------------


def row_of(name: str) -> dict[str, Any]:
    """A row by its name; 1 and one line where there is none."""
    rows = listed(name.partition("/")[0])
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        near = ", ".join(row["name"] for row in rows)
        raise SystemExit(f"results.py: {name}: no such row; expected one of {near}")
    return found


def listed(table: str) -> list[dict[str, Any]]:
    """Rows of a table that somebody named; 1 and one line where there is none."""
    if table not in TABLES:
        raise SystemExit(f"results.py: {table}: no such table; expected one of {', '.join(TABLES)}")
    return rows_of(table)


def command_of(row: Row) -> str:
    """What measures the row; results go below ``$OUT``."""
    template = TABLES[row["table"]].get("command", "")
    text = filled(template, row) if template else ""
    if not text or text == MISSING:
        raise SystemExit(
            f"results.py: {row['name']}: no command; docs/results says how it was measured"
        )
    return text


def folder_of(row: Row) -> str:
    """Where below ``$OUT`` the command leaves its table."""
    return filled(TABLES[row["table"]]["output"], row)


def taken(row: Row, results: Path, *, errors: bool = False) -> dict[str, float]:
    """The row's values from the ``table.csv`` of a run.

    ``fields`` of a table says from which line and column, and times what. A line is named by its
    row or its module, of several tasks or sets ``LINE @ TASK``, and in a table of a folder below
    ``FOLDER/LINE``. With ``errors`` also those of scores whose errors the table does not show.
    """
    files = sorted(results.rglob("table.csv")) if results.is_dir() else [results]
    found = {}
    for file in files:
        below = file.parent.relative_to(results).as_posix() if results.is_dir() else "."
        folder = "" if below == "." else f"{below}/"
        with file.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                label = folder + (line.get("row") or line.get("module") or "")
                part = line.get("task") or line.get("set")
                found |= {label: line, f"{label} @ {part}": line}
    values = {}
    for field, (label, column, *scale) in TABLES[row["table"]]["fields"].items():
        line = found.get(filled(label, row), {})
        factor = scale[0] if scale else 1
        if text := line.get(column):
            values[field] = float(text) * factor
        if errors and column == "score" and (text := line.get("standard_error")):
            values.setdefault(f"{field}_se", float(text) * factor)
    return values


def compared(row: Row, values: Row) -> tuple[list[str], bool]:
    """Lines of stored and measured values, and whether all agree.

    They agree within two standard errors of the difference where the row has one, or else the run;
    without any, within the digits that are stored.
    """
    lines, equal = [f"{'value':<24} {'stored':>10} {'measured':>10}"], True
    for field, value in values.items():
        stored = row.get(field)
        if stored is None or field.endswith("_se"):
            continue
        error = row.get(f"{field}_se") or values.get(f"{field}_se") or 0.0
        near = abs(value - stored) <= max(2 * 2**0.5 * error, 10.0 ** -_digits(stored))
        equal = equal and near
        lines.append(f"{field:<24} {stored:>10.4g} {value:>10.4g}{'' if near else '   differs'}")
    return lines, equal


def _digits(value: float) -> int:
    return len(repr(float(value)).partition(".")[2])


def put(table: str, new: Sequence[Row]) -> None:
    """Rows into their table: those of a name that is there take its place, others follow."""
    file = DATA / f"{TABLES[table]['page']}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in new:
        row = {"table": table, **row}
        places = [i for i, old in enumerate(rows) if old["name"] == row["name"]]
        last = max(
            (i for i, old in enumerate(rows) if old["table"] == table), default=len(rows) - 1
        )
        if places:
            rows[places[0]] = row
        else:
            rows.insert(last + 1, row)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")


# --- figures --------------------------------------------------------------------------------------


def digest(table: str) -> str:
    """What a figure of these rows carries, so that a stale one is found."""
    content = json.dumps([TABLES[table], rows_of(table)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def draw(table: str) -> Path:
    """The figure of a table as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": table, "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    spec = TABLES[table]["figure"]
    rows = [row for row in rows_of(table) if all(row.get(k) in v for k, v in spec["rows"].items())]
    height = 2.8 if "lines" in spec else 1.3 + 0.22 * len(rows) * max(1, len(spec["values"]) / 2)
    panels = dict.fromkeys(row[spec["panels"]] for row in rows) if "panels" in spec else [None]
    figure, places = pyplot.subplots(
        1, len(panels), figsize=(max(6, 2.2 * len(panels)), height), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, panel in zip(places[0], panels, strict=True):
        shown = [row for row in rows if panel is None or row[spec["panels"]] == panel]
        (frontier if "lines" in spec else forest)(axes, spec, shown)
        axes.set_xlabel(panel or spec["x"])
        axes.spines[["top", "right"]].set_visible(False)
    places[0, 0].set_ylabel(spec.get("y", ""))
    keys = {
        label: line
        for axes in places[0]
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        keys.values(), keys, loc="outside upper center", ncols=2 * max(1, len(panels) // 2),
        frameon=False, fontsize=8,
    )  # fmt: skip
    target = FIGURES / f"{table}.svg"
    notes = {"Date": None, "Creator": None, "Description": f"rows {digest(table)}"}
    figure.savefig(target, metadata=notes)
    pyplot.close(figure)
    return target


def forest(axes: Any, spec: Row, rows: Sequence[Row]) -> None:
    """A line per row, a mark with its error per value."""
    count = len(spec["values"])
    for place, (label, value) in enumerate(spec["values"].items()):
        found = [(i, row) for i, row in enumerate(rows) if row.get(value) is not None]
        heights = [i + (place - (count - 1) / 2) * 0.8 / count for i, _ in found]
        errors = [row.get(f"{value}_se") or 0 for _, row in found]
        axes.errorbar(
            [row[value] for _, row in found], heights, xerr=errors, fmt=MARKS[place],
            color=COLOURS[place], label=label, markersize=4, linewidth=1,
        )  # fmt: skip
    if "zero" in spec:
        axes.axvline(spec["zero"], color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [filled(spec["label"], row) for row in rows])
    axes.invert_yaxis()


def frontier(axes: Any, spec: Row, rows: Sequence[Row]) -> None:
    """A line per group, a point per row."""
    (x, y), groups = spec["lines"], {name: [] for name in spec.get("groups", ())}
    for row in rows:
        groups.setdefault(row[spec["group"]], []).append(row)
    for place, (label, points) in enumerate(groups.items()):
        if not points:
            continue
        axes.errorbar(
            [p.get(x, 0) for p in points], [p[y] for p in points], label=label,
            yerr=[p.get(f"{y}_se", 0) for p in points], fmt=f"{MARKS[place]}-",
            color=COLOURS[place], markersize=4, linewidth=1,
        )  # fmt: skip
    if "log" in spec:
        axes.set_xscale("log", base=spec["log"])
        axes.set_yscale("log")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where values differ, 2 on wrong usage."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "results.py", description=__doc__, allow_abbrev=False, formatter_class=shown
    )
    actions = ("write", "list", "show", "command", "put", "take", "compare")
    parser.add_argument("action", choices=actions)
    parser.add_argument("name", nargs="?", help="a table or a row")
    parser.add_argument("file", nargs="?", type=Path, help="rows, or the folder of a run")
    given = parser.parse_args(argv)
    match given.action, given.name, given.file:
        case "write", None, None:
            for page in pages():
                page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
            for table in TABLES:
                if "figure" in TABLES[table]:
                    print(draw(table))
        case "list", name, None:
            print("\n".join([row["name"] for row in listed(name)] if name else TABLES))
        case "show", str(name), None:
            print(json.dumps(row_of(name), indent=1, ensure_ascii=False))
        case "command", str(name), None:
            print(f"{command_of(row_of(name))}\n{folder_of(row_of(name))}")
        case "put" | "take" | "compare", str(name), Path() if computed(name):
            raise SystemExit(
                f"results.py: {name}: computed from scores; see pem report --leaderboard"
            )
        case "put", str(name), Path() as file:
            put(name, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
        case "take", str(name), Path() as file:
            row = row_of(name)
            put(row["table"], [row | {k: round(v, 4) for k, v in taken(row, file).items()}])
        case "compare", str(name), Path() as file:
            row = row_of(name)
            lines, equal = compared(row, taken(row, file, errors=True))
            print("\n".join(lines))
            return 0 if equal else 1
        case _:
            parser.error(f"{given.action}: takes other arguments; see --help")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may see enough
    sys.exit(main())
