"""Numbers and tables as text: what every table writes alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pem_composition.safe_files import files_added, write_text

Column = tuple[str, Iterable[object]]  # its title and its cells


def absent(value: Any) -> bool:
    """True for what a data frame holds where there is no number."""
    return value is None or value is pd.NaT or (isinstance(value, float) and value != value)


def with_error(
    value: float | None, error: float | None = None, digits: int | None = 4, *, sign: bool = False
) -> str:
    """``0.7000 +- 0.0100``; ``digits`` None: as many as a perplexity of its size needs."""
    if absent(value):
        return ""
    assert value is not None
    places = digits if digits is not None else 2 if value < 1000 else 0
    form = f"{'+' if sign else ''}.{places}f" if value < 1e6 else ".3g"
    shown = f"{value:{form}}"
    return shown if absent(error) else f"{shown} +- {error:{form.lstrip('+')}}"


def percent(share: float | None, error: float | None = None) -> str:
    """+3 %, or +3.1 % +- 0.2 %."""
    if absent(share):
        return ""
    assert share is not None
    if absent(error):
        return f"{100 * share:+.3g} %"
    if share > 10:
        return f"x {1 + share:.3g}"
    return f"{100 * share:+.1f} % +- {100 * error:.1f} %"  # type: ignore[operator]


def share(cell: Mapping[str, Any], name: str) -> str:
    """A share with the ends of its interval, ``name_low`` and ``name_high``, where they are."""
    if absent(cell[name]):
        return ""
    low, high = cell.get(f"{name}_low"), cell.get(f"{name}_high")
    return f"{cell[name]:.2f}" + ("" if absent(low) else f" ({low:.2f} to {high:.2f})")


def markdown(columns: Iterable[Column]) -> str:
    """A Markdown table, column by column."""
    header, *lines = zip(*([title, *cells] for title, cells in columns), strict=True)
    return "\n".join([_line(header), "|---" * len(header) + "|", *map(_line, lines)])


def settings(lines: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The column of what tells groups of results apart, where there are several."""
    told = [line["setting"] for line in lines]
    return [("setting", told)] if any(told) else []


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def csv(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """These columns as CSV with full precision; empty where there is no value."""
    whole = frame.reindex(columns=columns).astype(object).map(_flat)
    return str(whole.to_csv(index=False, lineterminator="\n"))


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v:.6g}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(repr(v).removesuffix(".0") for v in value)  # every digit
    return "" if absent(value) else value


def frame_of(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per mapping, values as they are: a count stays an integer, None stays None."""
    return pd.DataFrame(list(lines), dtype=object)


def spread(lines: pd.DataFrame, names: Iterable[str]) -> dict[str, float | None]:
    """Mean, and sample standard deviation as ``name_spread``, of each column; None without."""
    found: dict[str, float | None] = {}
    for name in names:
        values = pd.to_numeric(lines[name]).dropna()
        found[name] = float(values.mean()) if len(values) else None
        found[f"{name}_spread"] = float(values.std()) if len(values) > 1 else None
    return found


def write(out: Path, text: str, frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """Write table.md and table.csv into ``out``, which is made; returns the Markdown."""
    with files_added(out) as added:
        write_text(added / "table.md", text + "\n")
        write_text(added / "table.csv", csv(frame, columns))
    return text
