"""Plain tables for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import takewhile

WIDTH = 100


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """Columns two spaces apart; the first ``words`` columns are text, the others numbers.

    Text that would make the table wider than the terminal is cut at its start, which layer names
    share.
    """
    cells = [list(header), *([shown(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    for i in range(words):
        share = -(-excess // words)
        if excess > 0 and widths[i] - share >= 8:
            widths[i] -= share
    lines = []
    for row in cells:
        text = [_cut(v, w).ljust(w) for v, w in zip(row[:words], widths, strict=False)]
        numbers = [v.rjust(w) for v, w in zip(row[words:], widths[words:], strict=True)]
        lines.append("  ".join([*text, *numbers]).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def wrapped(line: str, *, indent: int = 0) -> str:
    """The line, broken at spaces where it is wider than the terminal."""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def shown(value: object) -> str:
    """Four digits of a number; ``-`` where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """The dotted beginning that all names share, and what is left of each."""
    if len(names) < 2:
        return "", list(names)
    parts = [name.split(".") for name in names]
    levels = zip(*(p[:-1] for p in parts), strict=False)
    shared = [level[0] for level in takewhile(lambda words: len(set(words)) == 1, levels)]
    prefix = ".".join(shared) + "." if shared else ""
    return prefix, [name[len(prefix) :] for name in names]
