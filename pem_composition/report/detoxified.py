"""Tables of detoxified modules, a part per set of instructions: of one run, or of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pem_composition.errors import DataError
from pem_composition.report import text
from pem_composition.report.records import (
    BASELINE,
    DETOXIFICATION,
    Results,
    averaged,
    content_of,
    judged_by,
    read,
)
from pem_composition.report.text import percent, share, with_error

Line = Mapping[str, Any]

PROXIES = (
    "ROUGE-L and the perplexity of the reference answers are proxies of helpfulness, which nobody "
    "was asked about; on toxic instructions with toxic reference answers they say how much of the "
    "toxic ability is left."
)
REMOVAL = "The toxic module exists to be subtracted: its rows show what is taken out."
GUARD, WAY = "guard", "projection"
UPDATE = (
    "Toxic update: how far the module's update goes the way from the instruction module (0) to the "
    "toxic one (1)."
)
CHANGES = ("change", "share_change", "rouge_l_change", "increase", GUARD, WAY)
NUMBERS = (
    "toxicity", "change", "toxic_share", "share_change", "rouge_l", "rouge_l_change", "perplexity",
    "increase", "refused", "empty", "looping", "words", "distinct_1", "distinct_2",
    WAY,
)  # fmt: skip


def lines_of(results: Results) -> list[Line]:
    """Every line of one table: module, set and judge.

    Raises:
        DataError: results of another kind.
    """
    s = results.summary
    if s["composition"] != DETOXIFICATION:
        raise DataError.build(
            results.path, "no table of detoxified modules", found=s["composition"],
            expected=DETOXIFICATION, do="report them apart",
        )  # fmt: skip
    return [line for row in s["rows"] for line in row["lines"]]


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv of one run into ``out``; returns the Markdown."""
    found = read(results)
    lines = lines_of(found)
    return text.write(out, markdown(found), text.frame_of(lines), tuple(lines[0]))


def markdown(results: Results) -> str:
    """One table per set of instructions, and what the numbers mean."""
    lines = lines_of(results)
    parts = [_part(name, own) for name, own in _by_set(lines)]
    told = " ".join(
        (
            "+- is one standard error over the instructions, (a to b) Wilson's 95 % interval of a "
            "share; change and increase are against the instruction module, paired. Toxicity is "
            "that of answers with words.",
            UPDATE,
            PROXIES,
            *_notes(results.summary),
        )
    )
    return "\n\n".join([*parts, told])


def _by_set(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    for name in dict.fromkeys(line["set"] for line in lines):
        yield name, [line for line in lines if line["set"] == name]


def _notes(summary: Mapping[str, Any]) -> Iterator[str]:
    judges = (
        f"{j['name']} {j['version']} ({j['sha256'][:12]})" for j in summary["judges"].values()
    )
    yield f"Judges: {'; '.join(judges)}. Toxic: share of scores above {summary['threshold']:g}."
    yield REMOVAL
    if summary["selected"] is None:
        return
    within = (
        f"within {percent(summary['max_increase'])} of the instruction module's perplexity on "
        f"{summary[GUARD]['name']}, at the upper end of its 95 % interval"
    )
    for form, strength in summary["selected"].items():
        yield (
            f"Form {form}: no strength is {within}."
            if strength is None
            else f"Form {form}: strength {strength:g} is the strongest {within}."
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
    if GUARD in cells[0]:
        columns.append((GUARD, [_cost(c) for c in cells]))
    for kind in ("refused", "empty", "looping"):
        columns.append((kind, [share(c, kind) for c in cells]))
    columns += [
        ("words", [f"{c['words']:.0f}" for c in cells]),
        ("toxic update", [_way(c) for c in cells]),
    ]
    part = f"; reference answers of {references}" if 0 < references < n else ""
    return "\n".join([f"**{name}** (n = {n}{part})", "", text.markdown(columns)])


def _estimate(cell: Line, name: str, form: str = ".3f") -> str:
    value, error = cell[name], cell[f"{name}_stderr"]
    if value is None or _against_itself(cell, name):
        return ""
    shown = format(value, form)
    return shown if error is None else f"{shown} +- {format(error, form.lstrip('+'))}"


def _way(cell: Line) -> str:
    return "" if _against_itself(cell, WAY) else with_error(cell[WAY], None, 2, sign=True)


def _cost(cell: Line) -> str:
    if _against_itself(cell, GUARD):
        return ""
    return f"{cell[GUARD]:+.1%}, up to {cell[f'{GUARD}_high']:+.1%}"


def _against_itself(line: Line, name: str) -> bool:
    """True for a change of the instruction module, which changes are against."""
    return name in CHANGES and line["module"] == BASELINE


# --- several runs ---


def aggregate(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Mean over several runs of one setting, with the sample standard deviation between them.

    Rows are matched by set, module (form and strength) and judge. Runs of other bases, kinds,
    judges, instructions or ways to answer make separate groups, and every line says what tells its
    group from the others. A run without a measure (no answer with words) is not in its mean.

    Raises:
        DataError: no paths, a file without a finished run, or results of another kind.
    """
    return text.frame_of(averaged(paths, setting_of, _mean_lines))


def setting_of(results: Results) -> dict[str, Any]:
    """What runs must have in common to be averaged, by name: all but modules and seed."""
    s = results.summary
    sets = dict.fromkeys(line["set"] for line in lines_of(results))
    asked = {
        name: {**part, **part["search"]}
        for name, part in sorted(zip(sets, s["asked"], strict=True))
    }
    fields = sorted({field for part in asked.values() for field in part} - {"search"})
    return {
        **{name: s[name] for name in ("kind", "base", "weights", "bf16", "rank")},
        **judged_by(s),
        "sets": list(asked),
        **{field: [part.get(field) for part in asked.values()] for field in fields},
        GUARD: content_of(s[GUARD]),
    }


def _mean_lines(runs: Sequence[Results]) -> Iterator[dict[str, Any]]:
    summary = runs[0].summary
    parts = _by_set([line for run in runs for line in lines_of(run)])
    every = text.frame_of(line for _, own in parts for line in own)
    names = [name for name in (*NUMBERS, GUARD) if name in every]
    for (part, module, judge), same in every.groupby(["set", "module", "judge"], sort=False):
        yield {
            "kind": summary["kind"],
            "base": summary["base_name"],
            "set": part,
            "module": module,
            "judge": judge,
            "runs": len(same),
            "threshold": summary["threshold"],
            **text.spread(same, names),
            "n": same["n"].iloc[0],
        }


def aggregate_columns(frame: pd.DataFrame) -> tuple[str, ...]:
    """Columns of the aggregated CSV."""
    return tuple(frame)


def aggregate_markdown(frame: pd.DataFrame) -> str:
    """Aggregated rows as Markdown; +- is the standard deviation between runs."""
    lines = frame.to_dict("records")
    named = ("kind", "base", "set", "module", "judge", "runs")

    def estimates(name: str, digits: int | None = 3, *, sign: bool = False) -> list[str]:
        return cells(name, lambda *estimate: with_error(*estimate, digits, sign=sign))

    def cells(name: str, form: Callable[[Any, Any], str]) -> list[str]:
        return [
            "" if _against_itself(x, name) else form(x[name], x[f"{name}_spread"]) for x in lines
        ]

    columns: list[text.Column] = [
        *((name, [x[name] for x in lines]) for name in named),
        ("toxicity", estimates("toxicity")),
        ("change", estimates("change", sign=True)),
        ("toxic", estimates("toxic_share", 2)),
        ("ROUGE-L", estimates("rouge_l")),
        ("change", estimates("rouge_l_change", sign=True)),
        ("perplexity", estimates("perplexity", None)),
        ("increase", cells("increase", percent)),
        *((name, estimates(name, 2)) for name in ("refused", "empty", "looping")),
        ("words", estimates("words", 0)),
        ("toxic update", estimates(WAY, 2, sign=True)),
    ]
    if GUARD in frame:
        columns.append((GUARD, cells(GUARD, percent)))
    columns += text.settings(lines)
    thresholds = " or ".join(dict.fromkeys(f"{x['threshold']:g}" for x in lines))
    explained = (
        "+- is the standard deviation between runs; changes are against the instruction module of "
        f"the same run. Toxic: share of scores above {thresholds}. {UPDATE} {REMOVAL}"
    )
    return "\n".join([text.markdown(columns), "", explained])
