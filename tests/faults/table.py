"""docs/bad_input.md, made from the catalogue; the test compares, scripts/bad_input.py writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from faults import peers
from faults.case import Case
from faults.catalogue import AREAS, CASES
from faults.elsewhere import ELSEWHERE

PATH = Path(__file__).resolve().parents[2] / "docs" / "bad_input.md"
OUTCOMES = ("E1", "E2", "W", "S", "X", "P", "A", "OK")
# Results that are right although the input is bad: what cannot be known from the files.
UNKNOWABLE = frozenset({"S17b"})
HEAD = """# Bad input

What happens when a file, a module, a name or a request is not what it should be: here, and in the
stack that most people use (PEFT, transformers, safetensors, torch: "peers"). Every row is a test in
`tests/faults/`: the input is made from a tiny real module, every program that reads modules is run
on it, and the whole message is compared. A refusal is one line on stderr and exit code 2 (3 where
the run itself failed); nothing is written, nothing is run, and the output path is as it was.

`bad` is the module that is damaged, `good` another one, `out` the output; `...` stands for what
differs between files. `python scripts/bad_input.py` writes this page from the cases.

| | meaning | | meaning |
|---|---|---|---|
| E1 | an error that names the culprit and the cause | X | hangs, crashes or fills the memory |
| E2 | an error that names no file, adapter or flag, or misleads | P | runs the payload |
| W | a warning only, and a wrong result | A | accepted, harmless |
| S | silently wrong, or a silent choice | OK | right |

The peers were measured once by hand, on a 2-layer GPT-2 and a RoBERTa classifier (torch 2.13.0,
transformers 5.23.0, peft 0.21.2, safetensors 0.8.0, accelerate 1.15.0). *Again* is what
`python scripts/bad_input.py --peers` found with the modules of these tests and the same versions.
"""
LIMITS = """## What no reader can know

- One bit flipped in the values of a module without `pem.json` (S17b), or its `lora_alpha` set to
  another number: the layout holds no checksum. With `pem.json`, any changed bit of weights or
  config is refused. `pem.json` itself has none: a changed record can be wrong about provenance,
  base or labels, never about the numbers.
- The base of a module without `pem.json`, where another base has the same shape: PEFT records a
  name. Names are compared between modules and with `--model`, not when a module is attached to a
  live model, whose directory may be called anything.
- That the first layers of a module are lost (N31), if it is negated alone: its base is not at hand.
  Attaching it tells.
"""


def page() -> str:
    """The whole text."""
    parts = [HEAD, summary(), LIMITS]
    for area, cases in AREAS.items():
        parts.append(f"## {area[0].upper()}{area[1:]}\n\n{rows(cases)}")
    parts.append(f"## Tested elsewhere\n\n{elsewhere()}")
    return "\n".join(parts)


def summary() -> str:
    """How many of each outcome, here and for the peers."""
    lines = [
        "## Summary", "",
        "| area | cases | here: E1 | here: right | " + " | ".join(f"peers: {o}" for o in OUTCOMES)
        + " | not measured |",
        "|---|---|---|---|" + "---|" * (len(OUTCOMES) + 1),
    ]  # fmt: skip
    total: Counter[str] = Counter()
    for area, cases in AREAS.items():
        counts = count(cases)
        total += counts
        lines.append(_summary_row(area, counts))
    away = Counter(peers.PEERS[name].outcome for name in ELSEWHERE) + Counter(cases=len(ELSEWHERE))
    lines.append(_summary_row("tested elsewhere", away))
    lines.append(_summary_row("**all**", total + away))
    told = sum(case.id in UNKNOWABLE for case in CASES)
    lines += [
        "",
        f"Of the right results, {told} cannot be told from a wrong one (S17b, below). No case ends "
        "in silence, a warning",
        "only, a hang, a traceback or a payload.",
        "",
    ]
    return "\n".join(lines)


def count(cases: Iterable[Case]) -> Counter[str]:
    """Cases by outcome here and by outcome of the peers."""
    counts: Counter[str] = Counter()
    for case in cases:
        counts["cases"] += 1
        counts["here: E1" if case.code else "here: right"] += 1
        measured = peers.PEERS.get(case.id)
        counts[measured.outcome if measured else "none"] += 1
    return counts


def _summary_row(area: str, counts: Counter[str]) -> str:
    keys = ("cases", "here: E1", "here: right", *OUTCOMES, "none")
    return f"| {area} | " + " | ".join(str(counts[key] or "") for key in keys) + " |"


def rows(cases: Iterable[Case]) -> str:
    """One row per case."""
    again = peers.again()
    lines = ["| id | input | here | peers |", "|---|---|---|---|"]
    for case in cases:
        measured = peers.PEERS.get(case.id)
        text = f"{measured.outcome}: {measured.text}" if measured else ""
        if case.id in again:
            text += f" *(again: {again[case.id]})*"
        lines.append(f"| {case.id} | {case.input} | {_here(case)} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _here(case: Case) -> str:
    says = _cell(case.says)
    return f"refused: `{says}`" if case.code else f"result: `{says}`"


def _cell(text: str) -> str:
    """One line without the characters that mean something in a Markdown table."""
    plain = re.sub(r"x{40,}", "xxx...", " ".join(text.split()))
    return plain.replace("|", "/").replace("`", "'")


def elsewhere() -> str:
    """Cases that are not run here."""
    lines = ["| id | input | here | where | peers |", "|---|---|---|---|---|"]
    for name, (what, happens, where) in sorted(ELSEWHERE.items()):
        measured = peers.PEERS[name]
        text = _cell(f"{measured.outcome}: {measured.text}")
        lines.append(f"| {name} | {what} | {happens} | {where} | {text} |")
    return "\n".join(lines) + "\n"
