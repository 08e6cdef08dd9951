"""Reading results.jsonl: finished points, and the summary lines that tie them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pem_composition import json_lines
from pem_composition.errors import DataError

RESULTS = "results.jsonl"
SUMMARY_VERSION = 2
SUBTRACTION = "subtraction"  # the same on any tasks, instead of texts that are judged
NEGATION = "negation"  # the composition of a sweep over strengths
CONTROL = "control "  # the id of a control row begins so
DETOXIFICATION = "detoxification"  # forms at several strengths, on sets of instructions
BASELINE = "instruction module"  # its row, which changes are against
WORST = ("expected_maximum", "toxicity_probability")  # of the texts of each prompt


def has_worst(summary: Mapping[str, Any]) -> bool:
    """True if a sweep over strengths had several texts of each of several prompts."""
    return WORST[0] in summary["rows"][0]["toxicity"][0]


class Summary(dict[str, Any]):
    """A summary of a file; what it lacks is a fault of that file.

    Raises:
        DataError: on asking for a field that is not there.
    """

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        super().__init__({name: self._within(file, value) for name, value in fields.items()})
        self.file = file

    @classmethod
    def _within(cls, file: Path, value: Any) -> Any:
        if isinstance(value, Mapping):
            return cls(file, value)
        return [cls._within(file, v) for v in value] if isinstance(value, list) else value

    def __missing__(self, name: str) -> Any:
        raise DataError.build(
            self.file, "its summary cannot be read", found=f"no {name} in it",
            do="run the same command again; it writes another one",
        )  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The last summary of a results.jsonl, the points it names by key, and the trials."""

    path: Path
    summary: Mapping[str, Any]
    points: Mapping[str, Mapping[str, Any]]
    trials: Sequence[Mapping[str, Any]] = ()

    @property
    def is_search(self) -> bool:
        """True for a search, False for a sweep."""
        return "search" in self.summary

    @property
    def common_mean(self) -> bool:
        """True where the tasks' measures have one unit, so that their mean says something."""
        metrics = [r["metric"] for r in self.scored(self.summary["rows"][0]["keys"])]
        return len(units_of(metrics, self.summary["signs"])) == 1

    def scored(self, keys: Iterable[str]) -> list[Mapping[str, Any]]:
        """The records of these keys, one per task."""
        return [self.points[key] for key in keys]


def units_of(metrics: Sequence[str], signs: Sequence[int]) -> set[str]:
    """The units of measures: scores have one, each measure that is better when smaller (sign -1: a
    perplexity, a rate of errors) has its own."""
    return {m if sign < 0 else "score" for m, sign in zip(metrics, signs, strict=True)}


def mean_of(estimates: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent (value, standard error) pairs: sum v / k, sqrt(sum e^2) / k.

    The tasks of a sweep have rows of their own, so their errors are independent.
    """
    values, errors = zip(*estimates, strict=True)
    return sum(values) / len(values), math.hypot(*errors) / len(errors)


def read(path: str | Path) -> Results:
    """The sweep or the search that a results.jsonl, or the directory that holds it, ends with.

    Raises:
        DataError: no such file, nothing finished in it, or a point that it names is missing.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError.build(
            file, "no such results file", do="give the output directory of a sweep"
        )
    lines = json_lines.read_all(file)
    summaries = [r for r in lines if "key" not in r and ("summary" in r or "search" in r)]
    if not summaries:
        raise DataError.build(
            file,
            "holds no finished sweep",
            found=f"{len(lines)} points",
            do="run the sweep to its end; it continues",
        )
    summary = Summary(file, _current(file, Summary(file, summaries[-1])))
    points = {r["key"]: r for r in lines if "key" in r}
    needed = _needed(summary)
    lost = [key for key in needed if key not in points]
    if lost:
        raise DataError.build(
            file,
            "a point of the sweep cannot be read",
            found=f"{len(lost)} missing",
            do="run the sweep again; it fills the gap",
        )
    trials = [r for r in lines if "trial" in r]
    return Results(file, summary, {key: points[key] for key in needed}, trials)


def _needed(summary: Mapping[str, Any]) -> list[str]:
    """Keys of every point that the summary names."""
    groups = list(map(_keys_of, summary["rows"]))
    groups += [keys for study in summary.get("studies", ()) for keys in study["keys_of_trials"]]
    groups += list(summary.get("singles", ()))
    groups += [p["keys"] for curve in summary.get("curve", {}).values() for p in curve]
    return [key for keys in (*groups, summary.get("reference") or ()) for key in keys]


def _keys_of(row: Mapping[str, Any]) -> list[str]:
    """The points of a row of the table, those with new last layers too."""
    return [*row["keys"], *row.get("refit_keys", ())]


def _current(file: Path, summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The summary in today's form.

    Files of earlier releases say the direction of one metric, or of none; version 1 knew one task
    and merges only.

    Raises:
        DataError: a version of a later release.
    """
    if "search" in summary:
        signs = [1] * len(summary["tasks"])
        goal_signs = [-1 if goal == "loss" else 1 for goal in summary["goals"]]
        return {"signs": signs, "goal_signs": goal_signs, **summary}
    if summary["summary"] == SUMMARY_VERSION:
        sign = 1 if summary.get("greater_is_better", True) else -1
        return {"signs": [sign] * len(summary.get("tasks", ())), **summary}
    if summary["summary"] != 1:
        raise DataError.build(
            file,
            "written by another release",
            found=f"summary version {summary['summary']}",
            expected=f"at most {SUMMARY_VERSION}",
        )
    gain = ("gain", "gain_standard_error")
    average = summary["average"]
    return {
        **summary,
        "summary": SUMMARY_VERSION,
        "composition": "merge",
        "tasks": [summary["task"]],
        "signs": [1],
        "baseline": "average",
        "singles": [[key] for key in summary["singles"]],
        "reference": None,
        "curve": {
            space: [{"coefficients": p["coefficients"], "keys": [p["key"]]} for p in curve]
            for space, curve in summary["curve"].items()
        },
        "rows": [
            {**row, "keys": [row["key"]], "gains": [{k: row[k] for k in gain}], "mean": None}
            for row in summary["rows"]
        ],
        "average": {"tasks": [average], "mean": None},
    }


# What decides a result beside modules, coefficients, seed and versions, as its record names it.
ASKED = (
    "rows", "n", "base", "labels", "max_seq_length", "prompt", "objective", "target", "answers",
    "block_size", "bf16", "weights", "generation",
)  # fmt: skip
BY_HARNESS = ("version", "task_version", "task_hash", "num_fewshot", "limit")


def asked_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a score depends on besides the module: base, rows, and how they were asked."""
    harness = record.get("harness") or {}
    return {name: record.get(name) for name in ASKED} | {n: harness.get(n) for n in BY_HARNESS}


def setting_of(results: Results) -> dict[str, Any]:
    """What sweeps or searches must have in common to be averaged, by name: how the reported rows
    were asked (the tasks in order), how coefficients were selected, and on which rows new last
    layers were fitted.
    """
    s = results.summary
    records = [asked_of(record) for record in results.scored(s["rows"][0]["keys"])]
    asked = {name: [r[name] for r in records] for name in (*ASKED, *BY_HARNESS)}
    fitted = [r["refit"]["rows"] for r in results.scored(s["rows"][0].get("refit_keys", ()))]
    chosen = {
        name: s.get(name) or None for name in ("report", "select", "selected_by", "refit_select")
    }
    chosen |= {"refit": fitted or None}
    curves = (s.get("curve") or {}).values()  # a search has none
    grid = sorted({tuple(point["coefficients"]) for curve in curves for point in curve})
    return {**asked, **chosen, "max_invalid": s.get("max_invalid"), "grid": grid}


def distinct(found: Iterable[Results]) -> list[Results]:
    """Each sweep once, however often it is named: its rows are the same results, chosen alike. Of
    one with and without controls the one with most rows."""

    def content(one: Results) -> str:
        rows = [r for r in one.summary["rows"] if not str(r.get("id")).startswith(CONTROL)]
        records = [r for row in rows for r in one.scored(_keys_of(row))]
        names = ("tasks", "kind", "modules", "selected_by", "max_invalid", "judges", "threshold")
        about = [*(one.summary.get(name) for name in names), content_of(one.summary.get("guard"))]
        return repr([about, *((r["key"], r.get("score"), r.get("perplexity")) for r in records)])

    kept: dict[str, Results] = {}
    for one in found:
        key = content(one)
        kept[key] = max(kept.get(key, one), one, key=lambda r: len(r.summary["rows"]))
    return list(kept.values())


def content_of(text: Mapping[str, Any] | None) -> list[Any] | None:
    """What a summary says of a text, but for what it is called."""
    return None if text is None else [value for name, value in text.items() if name != "name"]


def judged_by(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the judges, what they are, and above which score a text is toxic."""
    judges = dict(sorted(summary["judges"].items()))
    digests = [judge["sha256"] for judge in judges.values()]
    return {"judges": list(judges), "judge": digests, "threshold": summary["threshold"]}


def averaged(
    paths: Sequence[str | Path],
    setting: Callable[[Results], Mapping[str, Any]],
    mean_lines: Callable[[Sequence[Results]], Iterable[Mapping[str, Any]]],
) -> Iterator[dict[str, Any]]:
    """The mean lines of every group of the files' results, each with what tells its group apart.

    Args:
        setting: what results must have in common to be averaged, by name.
        mean_lines: of results of one setting, each of which is there once.

    Raises:
        DataError: no paths, or a file without a finished sweep.
    """
    if not paths:
        raise DataError.build("report", "no results", expected="at least one results.jsonl")
    groups: dict[str, tuple[Mapping[str, Any], list[Results]]] = {}
    for found in distinct(map(read, paths)):
        own = setting(found)
        groups.setdefault(repr(own), (own, []))[1].append(found)
    settings = [own for own, _ in groups.values()]
    differing = [
        name
        for name in dict.fromkeys(name for own in settings for name in own)
        if len({repr(own.get(name)) for own in settings}) > 1
    ]
    for own, same in groups.values():
        told = ", ".join(_shown(name, own.get(name)) for name in differing)
        yield from ({**line, "setting": told} for line in mean_lines(same))


def _shown(name: str, value: Any) -> str:
    """One setting in words: digests by their beginning, what all tasks share once."""
    if name == "grid":
        first = " ".join(f"{c:g}" for c in value[0]) if value else ""
        return f"grid of {len(value)} points" + (f" from {first}" if value else "")
    values = value if isinstance(value, list) else [value]
    words = ["none" if v in (None, "") else str(v) for v in values]
    words = [word if len(word) <= 24 else f"{word[:8]}..." for word in dict.fromkeys(words)]
    return f"{name} {' '.join(words)}"


def overlap_note(results: Results) -> str:
    """What to say where reported rows were chosen on, by their content; empty if none were."""
    s = results.summary
    sizes = [r["n"] for r in results.scored(s["rows"][0]["keys"])]
    shared = s.get("shared_rows") or [n if s["select"] == s["report"] else 0 for n in sizes]
    if shared == sizes and s["select"] == s["report"]:
        return "These are the same rows, so what was selected is optimistic (give --test_file)."
    if not any(shared):
        return ""
    return (
        f"{_named(results, shared)} of the table are among the rows that were selected on, so what "
        "was selected is optimistic (give --test_file with other rows)."
    )


def refit_note(results: Results) -> str:
    """What is said of new last layers, and where they were fitted on reported rows."""
    note = "New heads: the last layer fitted anew on training rows, for every row."
    shared = results.summary.get("refit_shared_rows") or []
    if not any(shared):
        return note
    return (
        f"{note} {_named(results, shared)} of the table are among those, so the scores with new "
        "heads are optimistic (give --train_file with other rows)."
    )


def _named(results: Results, shared: Sequence[int]) -> str:
    """Of each task that has some, how many of its reported rows."""
    s = results.summary
    sizes = [r["n"] for r in results.scored(s["rows"][0]["keys"])]
    return " and ".join(
        f"{count} of the {n} {task} rows"
        for task, count, n in zip(s["tasks"], shared, sizes, strict=True)
        if count
    )
