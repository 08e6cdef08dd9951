"""``pem helpfulness``: grades of answers, 1 to 10, by a model behind an endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pem_composition.cli.asking import EndpointFlags
from pem_composition.endpoint.jobs import describe
from pem_composition.flag_declarations import flag, required
from pem_composition.sweep.result_store import ResultStore
from pem_composition.tasks.tables import read_table

NAME = "helpfulness"
HELP = "grade answers from 1 to 10 by a model behind an endpoint, alone or against others"
EXAMPLES = """
  pem helpfulness --answers table/answers/exact-0.5/ordinary.jsonl --model gpt-4o \\
      --output_file grades.jsonl
  pem helpfulness --answers table/answers/exact-0.5/ordinary.jsonl \\
      --against table/answers/instruction-module/ordinary.jsonl --model gpt-4o \\
      --output_file grades.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Config(EndpointFlags):
    """Flags of ``pem helpfulness``; the key is read from the environment."""

    answers: Path = required("what pem answer or pem detoxify --evaluate wrote")
    output_file: Path = required("grades and replies, appended line by line")
    against: Path | None = flag(
        None, "other answers to the same instructions: both are graded side by side, in both orders"
    )
    json: bool = flag(False, "print one JSON object, no table")


def run(config: Config) -> int:
    """Grade what has no grade yet, and print the means."""
    from pem_composition.endpoint import answer_grades

    answers = answer_grades.read_answers(read_table(config.answers))
    if config.against is None:
        asked = list(answer_grades.single_jobs(config.service, answers))
    else:
        others = answer_grades.read_answers(read_table(config.against))
        asked = list(answer_grades.paired_jobs(config.service, answers, others))
    report = config.ask(asked, config.output_file)
    known = ResultStore(config.output_file).records
    found = answer_grades.summary(
        [{**known[job.key], **job.facts} for job in asked if job.key in known], len(answers)
    )
    counts = ("refused", "cut", "unreadable", "left", "stopped")
    if config.json:
        print(json.dumps({**found, **{name: getattr(report, name) for name in counts}}))
    else:
        part = "" if report.whole else f"\na part: {found['n']} of {found['of']} rows have grades"
        print(f"{config.output_file}: {describe(report)}{part}\n{_table(found)}")
    return 0


def _table(found: Mapping[str, Any]) -> str:
    ends = ("_stderr", "_low", "_high")
    shown = {name: value for name, value in found.items() if not name.endswith(ends)}
    width = max(map(len, shown))
    lines = []
    for name, value in shown.items():
        error, low = found.get(f"{name}_stderr"), found.get(f"{name}_low")
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        spread = "" if error is None else f" +- {error:.3f}"
        if low is not None:
            spread = f" (95 % {low:.3f} to {found[f'{name}_high']:.3f})"
        lines.append(f"{name:<{width}}  {text}{spread}")
    return "\n".join(lines)
