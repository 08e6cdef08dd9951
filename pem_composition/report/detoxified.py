"""The table of detoxified modules: one part per set of instructions, one line per module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pem_composition.report import text
from pem_composition.report.text import percent, share

Line = Mapping[str, Any]

PROXIES = (
    "ROUGE-L and the perplexity of the reference answers are proxies of helpfulness, which nobody "
    "was asked about; on toxic instructions with toxic reference answers they say how much of the "
    "toxic ability is left."
)


def write(lines: Sequence[Line], out: Path, notes: Sequence[str] = ()) -> str:
    """Write table.md and table.csv into ``out``; returns the Markdown."""
    return text.write(out, markdown(lines, notes), text.frame_of(lines), tuple(lines[0]))


def markdown(lines: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """One table per set of instructions."""
    sets = dict.fromkeys(line["set"] for line in lines)
    parts = [_part(name, [line for line in lines if line["set"] == name]) for name in sets]
    told = " ".join(
        (
            "+- is one standard error over the instructions, (a to b) Wilson's 95 % interval of a "
            "share; change and increase are against the instruction module, paired. Toxicity is "
            "that of answers with words.",
            PROXIES,
            *notes,
        )
    )
    return "\n\n".join([*parts, told])


def chosen(
    strengths: Mapping[str, float | None], max_increase: float, guard: str
) -> tuple[str, ...]:
    """One sentence per form: the strongest strength that keeps the language."""
    limit = percent(max_increase)
    within = (
        f"within {limit} of the instruction module's perplexity on {guard}, at the upper end of "
        "its 95 % interval"
    )
    return tuple(
        f"Form {form}: no strength is {within}."
        if strength is None
        else f"Form {form}: strength {strength:g} is the strongest {within}."
        for form, strength in strengths.items()
    )


def _part(name: str, lines: Sequence[Line]) -> str:
    judges = list(dict.fromkeys(line["judge"] for line in lines))
    rows = [
        [line for line in lines if line["module"] == module]
        for module in dict.fromkeys(line["module"] for line in lines)
    ]
    columns: list[text.Column] = [("module", [row[0]["module"] for row in rows])]
    for place, judge in enumerate(judges):
        cells = [row[place] for row in rows]
        columns += [
            (f"toxicity ({judge})", [_estimate(c, "toxicity") for c in cells]),
            ("change", [_estimate(c, "change", "+.3f") for c in cells]),
            ("toxic", [share(c, "toxic_share") for c in cells]),
        ]
    cells = [row[0] for row in rows]
    references, n = cells[0]["references"], cells[0]["n"]
    if references:
        columns += [
            ("ROUGE-L", [_estimate(c, "rouge_l") for c in cells]),
            ("change", [_estimate(c, "rouge_l_change", "+.3f") for c in cells]),
            ("perplexity", [_estimate(c, "perplexity", ".2f") for c in cells]),
            ("increase", [_estimate(c, "increase", "+.1%") for c in cells]),
        ]
    if "guard" in cells[0]:
        costs = [c if c["guard"] or c["guard_stderr"] else None for c in cells]
        shown = [c and f"{c['guard']:+.1%}, up to {c['guard_high']:+.1%}" for c in costs]
        columns.append(("guard", [known or "" for known in shown]))
    for kind in ("refused", "empty", "looping"):
        columns.append((kind, [share(c, kind) for c in cells]))
    columns.append(("words", [f"{c['words']:.0f}" for c in cells]))
    part = f"; reference answers of {references}" if 0 < references < n else ""
    return "\n".join([f"**{name}** (n = {n}{part})", "", text.markdown(columns)])


def _estimate(cell: Line, name: str, form: str = ".3f") -> str:
    value, error = cell[name], cell[f"{name}_stderr"]
    if value is None:
        return ""
    if name.endswith(("change", "increase")) and not value and not error:
        return ""  # the baseline against itself
    shown = format(value, form)
    return shown if error is None else f"{shown} +- {format(error, form.lstrip('+'))}"
