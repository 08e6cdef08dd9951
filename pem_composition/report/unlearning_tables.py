"""Tables of unlearning by negation, as Markdown and CSV: one sweep, or the mean of several (seeds).

A model that is broken is not toxic either: beside each judge's scores stand what the perplexity
costs and how the texts are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pem_composition.errors import DataError
from pem_composition.report import text
from pem_composition.report.records import (
    NEGATION,
    WORST,
    Results,
    averaged,
    content_of,
    has_worst,
    judged_by,
    read,
)
from pem_composition.report.text import percent, share, with_error

Line = dict[str, Any]

SELECTED = "selected"
OF_PROMPTS = (*WORST, "expected_maximum_change")  # where there are several
ESTIMATES = ("mean", "share", "change", "share_change", *OF_PROMPTS)  # of each judge
FORM = ("distinct_1", "distinct_2", "empty", "repeated", "looping", "ended", "new_tokens")
NUMBERS = ("perplexity", "increase", *FORM)
COLUMNS = (
    "row", "strength", "judge", "with_words", "mean", "mean_stderr", "share", "share_low",
    "share_high", "pairs", "change", "change_stderr", "share_change", "share_change_stderr",
    "expected_maximum", "expected_maximum_stderr", "toxicity_probability",
    "toxicity_probability_low", "toxicity_probability_high", "expected_maximum_change",
    "expected_maximum_change_stderr", "seen",
    "perplexity", "perplexity_stderr", "increase", "increase_stderr", "guard", "guard_stderr",
    "guard_high", *FORM, "empty_low", "empty_high", "looping_low", "looping_high", "n", "file",
)  # fmt: skip


def rows(results: Results) -> pd.DataFrame:
    """Base, module applied, every strength, and the chosen one once more; a line per judge."""
    s = results.summary
    entries = [{**row, "title": row["row"]} for row in s["rows"]]
    limit = percent(s["max_increase"])
    chosen = [
        {**e, "id": SELECTED, "title": f"**strongest within {limit}: {e['strength']:g}**"}
        for e in entries
        if e["strength"] == s["selected"]
    ]
    return text.frame_of(
        {**{k: v for k, v in e.items() if k != "toxicity"}, "row": e["id"], "kind": s["kind"]}
        | dict.fromkeys(OF_PROMPTS)
        | judged
        for e in [*entries, *chosen]
        for judged in e["toxicity"]
    )


def shown(results: Results) -> tuple[list[text.Column], list[str]]:
    """The columns of the table, and what is said below it."""
    return list(_columns(results.summary, rows(results))), _notes(results)


def markdown(results: Results) -> str:
    """One sweep as a Markdown table with its heading and what its numbers mean."""
    columns, notes = shown(results)
    return "\n".join([_heading(results.summary), "", text.markdown(columns), "", *notes])


def _columns(summary: Mapping[str, Any], frame: pd.DataFrame) -> Iterator[text.Column]:
    judges = list(summary["judges"])
    of_judge = {judge: frame[frame["judge"] == judge].to_dict("records") for judge in judges}
    cells = of_judge[judges[0]]

    def after_base(shown: Sequence[str]) -> list[str]:
        pairs = zip(cells, shown, strict=True)
        return ["" if cell["id"] == "base" else text for cell, text in pairs]

    yield "weights", [c["title"] for c in cells]
    for judge, own in of_judge.items():
        label = "" if len(judges) == 1 else f" ({judge})"
        yield f"toxicity{label}", [with_error(c["mean"], c["mean_stderr"]) for c in own]
        yield f"> {summary['threshold']:g}{label}", [share(c, "share") for c in own]
        changes = [with_error(c["change"], c["change_stderr"], sign=True) for c in own]
        yield f"change{label}", after_base(changes)
        if has_worst(summary):
            worst = [with_error(c["expected_maximum"], c["expected_maximum_stderr"]) for c in own]
            yield f"expected maximum{label}", worst
            yield f"toxicity probability{label}", [share(c, "toxicity_probability") for c in own]
    perplexities = [with_error(c["perplexity"], c["perplexity_stderr"], None) for c in cells]
    yield "perplexity", perplexities
    yield "increase", after_base([percent(c["increase"], c["increase_stderr"]) for c in cells])
    yield "guard, up to", after_base([percent(c["guard_high"]) for c in cells])
    for name in ("distinct_1", "distinct_2"):
        yield name.replace("_", "-"), [f"{c[name]:.3f}" for c in cells]
    for name in ("empty", "repeated", "looping"):
        yield name, [share(c, name) for c in cells]
    pairs = [(c["with_words"], c["n"]) for c in cells]
    yield "n", [n if words == n else f"{words} of {n}" for words, n in pairs]


def _heading(summary: Mapping[str, Any]) -> str:
    judges = ", ".join(f"{name} {judge['version']}" for name, judge in summary["judges"].items())
    what = f"{summary['module']} ({summary['kind']}) subtracted from {summary['base_name']}"
    return f"**Unlearning**, {what}; judge: {judges}"


def _notes(results: Results) -> list[str]:
    summary = results.summary
    asked, text = summary["asked"], summary["text"]
    size = f"{asked['samples']} texts per prompt" if asked["prompts"] > 1 else "one prompt"
    prompts = f"{asked['prompts']} prompts of {asked['name']}, " if asked["prompts"] > 1 else ""
    by = f", written by {asked['backend']} ({asked['served']})" if "backend" in asked else ""
    notes = [
        f"Texts: {prompts}{size}, {_decoding(asked['decoding'])}, seed {asked['seed']}{by}. "
        f"Perplexity: {text['tokens']} tokens of {text['name']}, windows of {text['window']} every "
        f"{text['stride']}{_started(text)}. +- is one standard error, (a to b) Wilson's 95 % "
        "interval of a share; changes are to the base model, text by text and window by window. "
        "Toxicity is that of the n texts with words; the others are empty.",
        _chosen(summary),
    ]
    if has_worst(summary):
        notes[0] += (
            f" The expected maximum is that of a prompt's {asked['samples']} texts, the "
            f"probability that one of them is above {summary['threshold']:g}."
        )
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
    limit = percent(summary["max_increase"])
    guard = summary["guard"]
    on = f"on other text ({guard['tokens']} tokens of {guard['name']})"
    if summary["selected"] is not None:
        where = f"the strongest negation within {limit} of the base model's perplexity {on}"
        return f"Strength {summary['selected']:g} is {where}, at the upper end of the interval."
    negated = [row for row in summary["rows"] if row["strength"] > 0]
    least = min(negated, key=lambda row: row["guard_high"])
    return (
        f"No strength keeps the perplexity within {limit} {on}: strength {least['strength']:g} "
        f"comes nearest with up to {percent(least['guard_high'])}; sweep weaker ones, read more "
        "text, or raise the limit."
    )


def _decoding(decoding: Mapping[str, Any]) -> str:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "greedy": False}
    said = {k: v for k, v in decoding.items() if v is not None and plain.get(k, object()) != v}
    return ", ".join(k if v is True else f"{k} {v:g}" for k, v in said.items())


def write(results: str | Path, out: Path) -> str:
    """Write table.md and table.csv of one sweep into ``out``; returns the Markdown."""
    found = read(results)
    return text.write(out, markdown(found), rows(found), COLUMNS)


# --- several sweeps ---


def aggregate(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Mean over several sweeps of one setting, with the sample standard deviation between them.

    Rows are matched by what they are (base model, module applied, strength 0.4, selected) and by
    judge; sweeps of other bases, kinds, judges, prompts or texts make separate groups. A strength
    that only some of them have is averaged over those.

    Raises:
        DataError: no paths, a file without a finished sweep, or a sweep of another kind.
    """
    return text.frame_of(averaged(paths, setting_of, _mean_lines))


def setting_of(results: Results) -> dict[str, Any]:
    """What sweeps must have in common to be averaged, by name: all but module and seed.

    Raises:
        DataError: not a sweep over strengths.
    """
    s = results.summary
    if s["composition"] != NEGATION:
        raise DataError.build(
            results.path, "not a sweep over strengths", found=s["composition"], expected=NEGATION,
            do="report them apart",
        )  # fmt: skip
    asked = {**s["asked"], **s["asked"].get("decoding", {})}
    records = results.scored(s["rows"][0]["keys"])
    return {
        **{name: s[name] for name in ("kind", "base", "max_increase")},
        **judged_by(s),
        **{name: value for name, value in asked.items() if name not in ("seed", "decoding")},
        **{name: content_of(s[name]) for name in ("text", "guard")},
        "content": [r[name] for r in records for name in ("prompts", "text") if name in r],
    }


def _mean_lines(sweeps: Sequence[Results]) -> list[Line]:
    summary = sweeps[0].summary
    every = pd.concat([rows(sweep) for sweep in sweeps], ignore_index=True)
    order = {"base": 0, "module": 1, SELECTED: 3}
    every["place"] = [order.get(identity, 2) for identity in every["id"]]
    every["amount"] = every.groupby("id")["strength"].transform("first")
    every = every.sort_values(["place", "amount"], kind="stable")
    return [
        {
            "kind": summary["kind"],
            "base": summary["base_name"],
            "row": identity,
            "judge": judge,
            "sweeps": len(same),
            **text.spread(same, ("strength", *ESTIMATES, *NUMBERS)),
            "n": same["n"].iloc[0],
        }
        for (identity, judge), same in every.groupby(["id", "judge"], sort=False)
    ]


def aggregate_columns(frame: pd.DataFrame) -> tuple[str, ...]:
    """Columns of the aggregated CSV, whatever the frame holds."""
    numbers = [c for name in ("strength", *ESTIMATES, *NUMBERS) for c in (name, f"{name}_spread")]
    return ("kind", "base", "row", "judge", "sweeps", *numbers, "n", "setting")


def aggregate_markdown(frame: pd.DataFrame) -> str:
    """Aggregated rows as Markdown; +- is the standard deviation between sweeps."""
    lines = frame.to_dict("records")

    def estimates(name: str, digits: int | None = 4, *, sign: bool = False) -> list[str]:
        return [with_error(x[name], x[f"{name}_spread"], digits, sign=sign) for x in lines]

    def after_base(shown: Sequence[str]) -> list[str]:
        return ["" if x["row"] == "base" else cell for x, cell in zip(lines, shown, strict=True)]

    chosen = "selected, {:.3g} on average"
    names = [chosen.format(x["strength"]) if x["row"] == SELECTED else x["row"] for x in lines]
    columns: list[text.Column] = [
        *((name, [x[name] for x in lines]) for name in ("kind", "base")),
        ("weights", names),
        *((name, [x[name] for x in lines]) for name in ("judge", "sweeps")),
        ("toxicity", estimates("mean")),
        ("above the threshold", estimates("share", 3)),
        ("change", after_base(estimates("change", sign=True))),
        ("perplexity", estimates("perplexity", None)),
        ("increase", after_base([percent(x["increase"], x["increase_spread"]) for x in lines])),
        *((n.replace("_", "-"), [f"{x[n]:.3f}" for x in lines]) for n in FORM[:2]),
        *((n, [f"{x[n]:.2f}" for x in lines]) for n in ("empty", "repeated", "looping")),
    ]
    if not frame["expected_maximum"].isna().all():
        worst = ("expected maximum", estimates("expected_maximum"))
        columns[7:7] = [worst, ("toxicity probability", estimates("toxicity_probability", 3))]
    columns += text.settings(lines)
    explained = (
        "+- is the standard deviation between sweeps. Changes are to the base model of the same "
        "sweep; selected is each sweep's strongest negation within its limit of perplexity."
    )
    return "\n".join([text.markdown(columns), "", explained])
