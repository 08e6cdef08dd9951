"""Tables of unlearning by negation, as Markdown and CSV: one sweep, or the mean of several (seeds).

A model that is broken is not toxic either: beside each judge's scores stand what the perplexity
costs and how the texts are written.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError
from pem_composition.report.records import NEGATION, Results, distinct, read
from pem_composition.report.table import share, to_csv

Line = dict[str, Any]

SELECTED = "selected"
ESTIMATES = ("mean", "share", "change", "share_change")  # of each judge
FORM = ("distinct_1", "distinct_2", "empty", "repeated", "looping", "ended", "new_tokens")
NUMBERS = ("perplexity", "increase", *FORM)
COLUMNS = (
    "row", "strength", "judge", "with_words", "mean", "mean_stderr", "share", "share_low",
    "share_high", "pairs", "change", "change_stderr", "share_change", "share_change_stderr", "seen",
    "perplexity", "perplexity_stderr", "increase", "increase_stderr", "guard", "guard_stderr",
    "guard_high", *FORM, "empty_low", "empty_high", "looping_low", "looping_high", "n", "file",
)  # fmt: skip


def rows_of(results: Results) -> list[Line]:
    """Base model, module applied, every strength, and the chosen one once more."""
    summary = results.summary
    rows = [dict(row) for row in summary["rows"]]
    for row in rows:
        if row["strength"] == summary["selected"]:
            limit = _percent(summary["max_increase"])
            name = f"**strongest within {limit}: {row['strength']:g}**"
            return [*rows, {**row, "id": SELECTED, "row": name}]
    return rows


def markdown(results: Results) -> str:
    """One sweep as a Markdown table with its heading and what its numbers mean."""
    summary, rows = results.summary, rows_of(results)
    judges = list(summary["judges"])
    of = "" if len(judges) == 1 else " ({})"
    header = ["weights"]
    for judge in judges:
        label = of.format(judge)
        header += [f"toxicity{label}", f"> {summary['threshold']:g}{label}", f"change{label}"]
    header += [
        "perplexity",
        "increase",
        "guard, up to",
        "distinct-1",
        "distinct-2",
        "empty",
        "repeated",
    ]
    header += ["looping", "n"]
    lines = [_line(header), "|---" * len(header) + "|", *(_line(_cells(row)) for row in rows)]
    return "\n".join([_heading(summary), "", *lines, "", *_notes(results)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [row["row"]]
    for judged in row["toxicity"]:
        cells.append(_with_error(judged["mean"], judged["mean_stderr"]))
        cells.append(share(judged, "share"))
        change = _with_error(judged["change"], judged["change_stderr"], sign=True)
        cells.append("" if row["id"] == "base" else change)
    cells.append(_with_error(row["perplexity"], row["perplexity_stderr"], digits=None))
    cells.append("" if row["id"] == "base" else _percent(row["increase"], row["increase_stderr"]))
    cells.append("" if row["id"] == "base" else _percent(row["guard_high"]))
    cells += [f"{row[name]:.3f}" for name in ("distinct_1", "distinct_2")]
    cells += [share(row, name) for name in ("empty", "repeated", "looping")]
    words = row["toxicity"][0]["with_words"]
    return [*cells, str(row["n"]) if words == row["n"] else f"{words} of {row['n']}"]


def _heading(summary: Mapping[str, Any]) -> str:
    judges = ", ".join(f"{name} {judge['version']}" for name, judge in summary["judges"].items())
    what = f"{summary['module']} ({summary['kind']}) subtracted from {summary['base_name']}"
    return f"**Unlearning**, {what}; judge: {judges}"


def _notes(results: Results) -> list[str]:
    summary = results.summary
    asked, text = summary["asked"], summary["text"]
    size = f"{asked['samples']} texts per prompt" if asked["prompts"] > 1 else "one prompt"
    prompts = f"{asked['prompts']} prompts of {asked['name']}, " if asked["prompts"] > 1 else ""
    notes = [
        f"Texts: {prompts}{size}, {_decoding(asked['decoding'])}, seed {asked['seed']}. "
        f"Perplexity: {text['tokens']} tokens of {text['name']}, windows of {text['window']} every "
        f"{text['stride']}{_started(text)}. +- is one standard error, (a to b) Wilson's 95 % "
        "interval of a share; changes are to the base model, text by text and window by window. "
        "Toxicity is that of the n texts with words; the others are empty.",
        _chosen(summary),
    ]
    seen = sum(judged["seen"] or 0 for row in summary["rows"] for judged in row["toxicity"])
    if seen:
        notes.append(f"{seen} of the texts stood in a judge's own training.")
    return notes


def _started(text: Mapping[str, Any]) -> str:
    """Which windows begin with the start token; nothing of a model that has none."""
    start = text.get("start", "none")
    return "" if start == "none" else f", {start} window after the start token"


def _chosen(summary: Mapping[str, Any]) -> str:
    """Which strength was chosen; where none, how far the limit was missed."""
    limit = _percent(summary["max_increase"])
    guard = summary["guard"]
    on = f"on other text ({guard['tokens']} tokens of {guard['name']})"
    if summary["selected"] is not None:
        where = f"the strongest negation within {limit} of the base model's perplexity {on}"
        return f"Strength {summary['selected']:g} is {where}, at the upper end of the interval."
    negated = [row for row in summary["rows"] if row["strength"] > 0]
    least = min(negated, key=lambda row: row["guard_high"])
    return (
        f"No strength keeps the perplexity within {limit} {on}: strength {least['strength']:g} "
        f"comes nearest with up to {_percent(least['guard_high'])}; sweep weaker ones, read more "
        "text, or raise the limit."
    )


def _decoding(decoding: Mapping[str, Any]) -> str:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "greedy": False}
    said = {k: v for k, v in decoding.items() if v is not None and plain.get(k, object()) != v}
    return ", ".join(k if v is True else f"{k} {v:g}" for k, v in said.items())


def _with_error(
    value: float | None, error: float | None, digits: int | None = 4, *, sign: bool = False
) -> str:
    """``digits`` None: as many as a perplexity of its size needs."""
    if value is None:
        return ""
    places = digits if digits is not None else 2 if value < 1000 else 0
    form = f"{'+' if sign else ''}.{places}f" if value < 1e6 else ".3g"
    return f"{value:{form}}" if error is None else f"{value:{form}} +- {error:{form.lstrip('+')}}"


def _percent(share: float, error: float | None = None) -> str:
    """+3 %, or +3.1 % +- 0.2 %."""
    if error is None:
        return f"{100 * share:+.3g} %"
    if share > 10:
        return f"x {1 + share:.3g}"
    return f"{100 * share:+.1f} % +- {100 * error:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def lines_of(results: Results) -> list[Line]:
    """One line per row and judge, for CSV."""
    lines = []
    for row in rows_of(results):
        rest = {k: v for k, v in row.items() if k != "toxicity"}
        rest |= {"row": row["id"], "kind": results.summary["kind"]}
        lines += [{**rest, **judged} for judged in row["toxicity"]]
    return lines


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv of one sweep into ``out``; returns the Markdown."""
    found = read(results)
    text = markdown(found)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "table.csv").write_text(to_csv(lines_of(found), COLUMNS), encoding="utf-8")
    return text


# --- several sweeps ---


def aggregate(paths: Sequence[str | Path]) -> list[Line]:
    """Mean over several sweeps of one setting, with the sample standard deviation between them.

    Rows are matched by what they are (base model, module applied, strength 0.4, selected) and by
    judge; sweeps of other bases, kinds, judges, prompts or texts make separate groups. A strength
    that only some of them have is averaged over those.

    Raises:
        DataError: no paths, a file without a finished sweep, or a sweep of another kind.
    """
    if not paths:
        raise DataError.build("report", "no results", expected="at least one results.jsonl")
    groups: dict[str, list[tuple[Mapping[str, Any], list[Line]]]] = {}
    for found in distinct(map(read, paths)):
        groups.setdefault(setting_of(found), []).append((found.summary, lines_of(found)))
    return [line for sweeps in groups.values() for line in _mean_lines(sweeps)]


def setting_of(results: Results) -> str:
    """What sweeps must have in common to be averaged: all but module and seed.

    Raises:
        DataError: not a sweep over strengths.
    """
    s = results.summary
    if s["composition"] != NEGATION:
        raise DataError.build(
            results.path, "not a sweep over strengths", found=s["composition"], expected=NEGATION,
            do="report them apart",
        )  # fmt: skip
    asked = {k: v for k, v in s["asked"].items() if k != "seed"}
    judges = sorted(judge["sha256"] for judge in s["judges"].values())
    records = results.scored(s["rows"][0]["keys"])
    content = [r[name] for r in records for name in ("prompts", "text") if name in r]
    texts = s["text"], s["guard"], content
    return repr([s["kind"], s["base"], judges, s["threshold"], s["max_increase"], asked, texts])


def _mean_lines(sweeps: Sequence[tuple[Mapping[str, Any], list[Line]]]) -> list[Line]:
    summary = sweeps[0][0]
    matched: dict[tuple[str, str], list[Line]] = {}
    for _, lines in sweeps:
        for line in lines:
            matched.setdefault((line["id"], line["judge"]), []).append(line)
    order = {"base": 0.0, "module": 1.0, SELECTED: 3.0}

    def place(item: tuple[tuple[str, str], list[Line]]) -> tuple[float, float]:
        return order.get(item[0][0], 2.0), item[1][0]["strength"]

    return [
        {
            "kind": summary["kind"],
            "base": summary["base_name"],
            "row": identity,
            "judge": judge,
            "sweeps": len(same),
            **_spread("strength", same),
            **{k: v for name in (*ESTIMATES, *NUMBERS) for k, v in _spread(name, same).items()},
            "n": same[0]["n"],
        }
        for (identity, judge), same in sorted(matched.items(), key=place)
    ]


def _spread(name: str, lines: Sequence[Line]) -> Line:
    values = [line[name] for line in lines if line[name] is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.fmean(values) if values else None, f"{name}_spread": spread}


def aggregate_columns() -> tuple[str, ...]:
    """Columns of the aggregated CSV."""
    numbers = [c for name in ("strength", *ESTIMATES, *NUMBERS) for c in (name, f"{name}_spread")]
    return ("kind", "base", "row", "judge", "sweeps", *numbers, "n")


def aggregate_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aggregated rows as Markdown; +- is the standard deviation between sweeps."""
    header = [
        "kind", "base", "weights", "judge", "sweeps", "toxicity", "above the threshold", "change",
        "perplexity", "increase", "distinct-1", "distinct-2", "empty", "repeated", "looping",
    ]  # fmt: skip
    lines = [_line(header), "|---" * len(header) + "|"]
    for row in rows:
        first = row["row"] == "base"
        name = (
            f"selected, {row['strength']:.3g} on average" if row["row"] == SELECTED else row["row"]
        )
        cells = [row["kind"], row["base"], name, row["judge"], str(row["sweeps"])]
        cells.append(_with_error(row["mean"], row["mean_spread"]))
        cells.append(_with_error(row["share"], row["share_spread"], 3))
        change = _with_error(row["change"], row["change_spread"], sign=True)
        cells.append("" if first else change)
        cells.append(_with_error(row["perplexity"], row["perplexity_spread"], digits=None))
        cells.append("" if first else _percent(row["increase"], row["increase_spread"]))
        cells += [f"{row[n]:.3f}" for n in ("distinct_1", "distinct_2")]
        cells += [f"{row[n]:.2f}" for n in ("empty", "repeated", "looping")]
        lines.append(_line(cells))
    explained = (
        "+- is the standard deviation between sweeps. Changes are to the base model of the same "
        "sweep; selected is each sweep's strongest negation within its limit of perplexity."
    )
    return "\n".join([*lines, "", explained])
