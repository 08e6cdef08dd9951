"""The points of a sweep or a search as a data frame: what plots and pages are drawn from.

One line per point: a combination of the grid, a trial, a strength, a module alone, the joint
module, the base. Beside what it is stand its measures, each with its standard error in a column
``NAME +-``, and the command that makes the module again.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from pem_composition.errors import UsageError, close_match
from pem_composition.report import text
from pem_composition.report.records import (
    NEGATION,
    SUBTRACTION,
    WORST,
    Results,
    has_worst,
    mean_of,
)

ERROR = " +-"
MEAN = "mean"
ROLES = CURVE, SINGLE, JOINT, BASE, APPLIED = "curve", "single", "joint", "base", "applied"
STRENGTH, TRIAL, COEFFICIENT = "strength", "trial", "coefficient t"
ROW = ("distinct_1", "distinct_2", "empty", "repeated", "looping")  # of the texts of a strength

COLUMNS = ("role", "series", "space", "name", "at", "coefficients", "chosen", "command", "dead")

Line = dict[str, Any]


@dataclass(frozen=True)
class Points:
    """The points of a results.jsonl.

    Attributes:
        frame: ``role`` (CURVE, SINGLE, ...), ``series`` (a space, a study, a kind of module),
            ``name``, ``at`` (the coefficient, strength or number of the trial), ``coefficients``,
            ``chosen``, ``command``, and the measures.
        signs: the measures in order: 1 where a greater one is better, -1 where a smaller one is,
            0 where neither is.
        labels: what to write along an axis of each measure.
        across: what ``at`` is; empty where no single number tells a point.
    """

    frame: pd.DataFrame
    signs: Mapping[str, int]
    labels: Mapping[str, str]
    across: str

    def of(self, role: str) -> pd.DataFrame:
        """The points of one role."""
        return self.frame[self.frame["role"] == role]

    def curves(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Each series of the grid, the trials or the strengths, in order."""
        for name, own in self.of(CURVE).groupby("series", sort=False):
            yield str(name), own

    @cached_property
    def lines(self) -> Mapping[str, list[Line]]:
        """The points of each role, as mappings."""
        found: dict[str, list[Line]] = {role: [] for role in ROLES}
        for line in self.frame.to_dict("records"):
            found[line["role"]].append(line)
        return found

    def series(self) -> Mapping[str, list[Line]]:
        """As ``curves``, as mappings."""
        found: dict[str, list[Line]] = {}
        for line in self.lines[CURVE]:
            found.setdefault(line["series"], []).append(line)
        return found

    def front(self, first: str, second: str) -> pd.DataFrame:
        """The points of the curves that no other one beats in both measures, in order of the first.

        A measure without a direction counts as better when greater.
        """
        own = self.of(CURVE).dropna(subset=[first, second])
        ways = [self.signs[name] or 1 for name in (first, second)]
        a, b = (own[n].astype(float) * w for n, w in zip((first, second), ways, strict=True))
        ordered = own.assign(_a=-a, _b=-b).sort_values(["_a", "_b"], kind="stable")
        before = ordered["_b"].cummin().shift(fill_value=float("inf"))
        return ordered[ordered["_b"] < before].drop(columns=["_a", "_b"])

    def check(self, names: Sequence[str]) -> None:
        """Refuse a measure that is not there.

        Raises:
            UsageError: the measures are listed.
        """
        for name in names:
            if name not in self.signs:
                raise UsageError.build(
                    "--axes", "nothing of that name", found=repr(name),
                    expected=", ".join(self.signs), do=close_match(name, self.signs) or None,
                )  # fmt: skip


def points(results: Results) -> Points:
    """The points of a sweep over coefficients or strengths, or of a search."""
    s = results.summary
    if s["composition"] == NEGATION:
        return _strengths(results)
    lines = list(_trials(results) if results.is_search else _grid(results))
    signs: dict[str, int] = dict(zip(s["tasks"], s["signs"], strict=True))
    if len(s["tasks"]) > 1:
        # A mean of measures in different units is a number that nobody should maximise.
        signs |= {MEAN: s["signs"][0] if results.common_mean else 0}
    if results.is_search:
        own = zip(s["goals"], s["goal_signs"], strict=True)
        signs = {**{_goal(s, g): sign for g, sign in own}, **signs}
    smaller = tuple(f" {metric}" for metric in ("loss", *s.get("smaller_is_better", ())))
    for name in sorted({name for line in lines for name in line["further"]}):
        signs[name] = -1 if name.endswith(smaller) else 1
    one = s["composition"] == "analogy" or len(s["modules"]) <= 2
    across = TRIAL if results.is_search else COEFFICIENT if one else ""
    flat = ({**{k: v for k, v in x.items() if k != "further"}, **x["further"]} for x in lines)
    return Points(_frame(flat, signs), signs, _labels(results, signs), across)


def _labels(results: Results, names: Iterable[str]) -> dict[str, str]:
    """Metric, split and number of rows of each measure."""
    s = results.summary
    labels = {name: f"{name} ({s['select']} rows)" for name in names}
    keys = s["studies"][0]["keys"] if results.is_search else s["singles"][0]
    for task, record in zip(s["tasks"], results.scored(keys), strict=True):
        metric = record["metric"].replace("_", " ")
        labels[task] = f"{metric} ({s['select']}, n = {record['n']})"
    return labels | ({MEAN: f"mean score ({s['select']})"} if MEAN in labels else {})


def _goal(s: Mapping[str, Any], goal: str) -> str:
    """The column of a goal: a task by its own metric has one already."""
    return goal if goal in s["tasks"] and not s.get("selected_by") else f"goal {goal}"


def _measures(results: Results, keys: Sequence[str]) -> Line:
    """Of each task the score with its error, in the mean, and the further metrics of its record."""
    s, records = results.summary, results.scored(keys)
    dead = [t for t, r in zip(s["tasks"], records, strict=True) if r["degenerate"]]
    line: Line = {"further": {}, "dead": dead}
    for task, record in zip(s["tasks"], records, strict=True):
        line |= {task: record["score"], task + ERROR: record["standard_error"]}
        others = {k: v for k, v in (record.get("scores") or {}).items() if k != record["metric"]}
        others |= {"loss": record.get("loss")}
        line["further"] |= {f"{task} {k}": v for k, v in others.items() if v is not None}
    if len(records) > 1:
        pairs = ((r["score"], r["standard_error"]) for r in records)
        line[MEAN], line[MEAN + ERROR] = mean_of(pairs)
    return line


def _grid(results: Results) -> Iterator[Line]:
    """A sweep: its curves, the modules alone and the joint module, on the selection rows."""
    s = results.summary
    for space, curve in s["curve"].items():
        for point in curve:
            c = list(point["coefficients"])
            yield {
                "role": CURVE, "series": f"{s['composition']}, {space} space", "space": space,
                "name": expression(s["modules"], c), "at": c[0], "coefficients": c,
                "chosen": c == list(s["selected"][space]), "command": command(s, c, space),
                **_measures(results, point["keys"]),
            }  # fmt: skip
    for name, keys in zip(s["modules"], s["singles"], strict=False):
        yield {"role": SINGLE, "series": name, "name": name, **_measures(results, keys)}
    if s["reference"] is not None:
        name = next(row["row"] for row in s["rows"] if row["id"] == "reference")
        yield {"role": JOINT, "series": name, "name": name, **_measures(results, s["reference"])}


def _trials(results: Results) -> Iterator[Line]:
    """A search: the trials that have a result and meet the conditions."""
    s = results.summary
    lines = {(t["study"], *t["keys"]): t for t in results.trials}
    for study in s["studies"]:
        listed = zip(
            study["keys_of_trials"], study["values_of_trials"], study["violations"], strict=True
        )
        for number, (keys, values, violation) in enumerate(listed):
            if not keys or violation:
                continue
            trial = lines.get((study["study"], *keys), {})
            c = list(trial.get("coefficients", ()))
            goals = zip(s["goals"], s["goal_signs"], values, strict=True)
            yield {
                "role": CURVE, "series": study["study"], "name": expression(s["modules"], c),
                "at": number + 1, "coefficients": c, "chosen": number == study["number"],
                "command": command(s, c, study["space"], study, trial.get("candidate")),
                **{_goal(s, name): sign * value for name, sign, value in goals},
                **_measures(results, keys),
            }  # fmt: skip


def _strengths(results: Results) -> Points:
    """A sweep over strengths: base, module applied, negations."""
    s = results.summary
    kinds = {"mean": "", "share": " above threshold"}
    if has_worst(s):
        kinds |= {name: f" {name.replace('_', ' ')}" for name in WORST}
    signs = {f"{judge}{kind}": -1 for judge in s["judges"] for kind in kinds.values()}
    signs |= {"perplexity": -1, "increase": -1, "guard": -1}
    signs |= {name: 1 if name.startswith("distinct") else -1 for name in ROW}
    read, count = s["text"], s["asked"]["prompts"] * s["asked"]["samples"]
    labels = {name: name.replace("_", "-") for name in signs}
    labels |= {j: f"mean toxicity of texts with words ({j}, n = {count})" for j in s["judges"]}
    labels["perplexity"] = f"perplexity on {read['name']} ({read['tokens']} tokens)"
    lines = []
    for row in s["rows"]:
        strength = row["strength"]
        role = BASE if row["id"] == "base" else APPLIED if row["id"] == "module" else CURVE
        line = {
            "role": role, "name": row["row"], "at": strength,
            "series": f"{s['kind']}, negated" if role == CURVE else row["row"],
            "chosen": strength == s["selected"], "file": row["file"],
            "command": _negation(s, strength) if role == CURVE else "",
        }  # fmt: skip
        for judged in row["toxicity"]:
            line |= {judged["judge"] + kind: judged[name] for name, kind in kinds.items()}
            line[judged["judge"] + ERROR] = judged["mean_stderr"]
        for name in ("perplexity", "increase", "guard"):
            line |= {name: row[name], name + ERROR: row[f"{name}_stderr"]}
        lines.append(line | {name: row[name] for name in ROW})
    return Points(_frame(lines, signs), signs, labels, STRENGTH)


def _frame(lines: Iterable[Line], measures: Iterable[str]) -> pd.DataFrame:
    """The lines with every column, also where no line has it, or where there is no line."""
    frame = text.frame_of(lines)
    return frame.reindex(columns=list(dict.fromkeys([*COLUMNS, *measures, *frame.columns])))


def expression(names: Sequence[str], coefficients: Sequence[float]) -> str:
    """The sum as a reader writes it.

    Examples:
        >>> expression(["a", "b"], [0.3, -1.0])
        '0.3*a - 1*b'
    """
    parts = [(c, f"{abs(c):.4g}*{n}") for n, c in zip(names, coefficients, strict=False) if c]
    shown = " ".join(f"{'-' if c < 0 else '+'} {term}" for c, term in parts)
    return shown.removeprefix("+ ")


def command(
    s: Mapping[str, Any],
    coefficients: Sequence[float],
    space: str | None,
    study: Mapping[str, Any] | None = None,
    candidate: Mapping[str, Any] | None = None,
) -> str:
    """The command that writes a point of a sweep or search; empty where paths are not recorded."""
    about = {**s, **(study or {})}
    paths = s.get("paths")
    if not paths:
        return ""
    if s["composition"] == SUBTRACTION:
        return _negation(s, -coefficients[0]) if coefficients[0] else ""
    words = ["pem", "merge", "-a", *paths, "-p", "OUT", "--coefficients"]
    if s["composition"] == "analogy":
        words = ["pem", "analogy", "-a", *paths, "-p", "OUT", "--coefficient"]
        coefficients = coefficients[:1]
    words += [f"{c!r}" for c in coefficients]
    named, _, settings = (about.get("method") or "simple").partition("(")
    if named not in ("simple", "sum"):
        words += ["--merge_way", named]
    own = dict(pair.split("=", 1) for pair in settings.rstrip(")").split(", ") if "=" in pair)
    own |= {k: v for k, v in (candidate or {}).items() if k != "c" and not k[1:].isdecimal()}
    rank = own.pop("rank", s.get("rank"))
    if named in ("simple", "sum") and space:
        words += ["--space", space]
    if own:
        words += ["--setting", *(f"{k}={v}" for k, v in own.items())]
    if rank and space == "delta":
        words += ["--rank", str(rank)]
    if s["head"]:
        words += ["--head", s["head"]]
    if about.get("statistics"):
        words += ["--fisher_list", *about["statistics"]]
    if s.get("dtype"):
        words += ["--dtype", s["dtype"]]
    return shlex.join([*words, *_whole(s)])


def _negation(s: Mapping[str, Any], strength: float) -> str:
    if not s.get("paths"):
        return ""
    words = ["pem", "negation", "-a", *s["paths"], "-p", "OUT", "--strength", f"{strength!r}"]
    return shlex.join([*words, *_whole(s)])


def _whole(s: Mapping[str, Any]) -> list[str]:
    """What the command of whole models names besides: their base."""
    return ["--model", s["base_name"]] if s["kind"] == "full" else []
