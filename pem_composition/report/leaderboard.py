"""A leaderboard of merging methods in one CSV file, over the tasks of several runs.

A run is one set of modules, merged by several methods and scored on the same rows with the heads of
its own modules: a search with a task for each module. A block is one task of one run. Methods are
compared block by block, so that hard tasks and good modules weigh on all of them alike.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from scipy.stats import rankdata, wilcoxon

from pem_composition.errors import DataError, UsageError, listing
from pem_composition.report import text
from pem_composition.report.records import asked_of
from pem_composition.safe_files import json_bytes, read_small, write_text

if TYPE_CHECKING:
    from pem_composition.report.records import Results

OWN = "own modules"  # no merge: what merges are measured by
EXACT = "exact sum"  # of all updates, at the coefficients of its own study
FLAG = "--leaderboard"
LARGEST = 1e6  # what lies beyond is no score


class Score(NamedTuple):
    """A line of the file: what one method has on one task of one run.

    Attributes:
        run: base model, kind of modules, and a digest of base, modules, rows and how they were
            asked; free text in lines of other tools.
        setting: coefficients and settings that the selection rows chose.
        score: greater is better, as everywhere in the file.
        standard_error: over the rows; None where nobody says it.
    """

    run: str
    method: str
    setting: str
    task: str
    metric: str
    score: float
    standard_error: float | None
    n: int

    @property
    def block(self) -> tuple[str, str]:
        """The task of the run."""
        return self.run, self.task


class Standing(NamedTuple):
    """A method over the blocks that it has in common with the exact sum.

    Attributes:
        rank: the mean one, over the blocks in which every merge stands; None where there is none.
        difference: of the method and the exact sum, the mean over the blocks.
        difference_standard_error: over the blocks; None of a single one.
        p: of Wilcoxon's signed-rank test, two-sided, by Holm's rule for all merges; None of OWN.
    """

    method: str
    blocks: int
    mean: float
    rank: float | None
    difference: float
    difference_standard_error: float | None
    better: int
    worse: int
    p: float | None


# --- lines ----------------------------------------------------------------------------------------


def scores_of(results: Results) -> list[Score]:
    """What a search says of each method, at the setting that its selection rows chose.

    Raises:
        UsageError: a sweep, another head than each module's own, or measures that are better when
            smaller.
    """
    s = results.summary
    if not (results.is_search and s["baseline"] == "own module" and min(s["signs"]) > 0):
        raise UsageError.build(
            FLAG, "compares methods by scores with each module's own head", found=results.path,
            expected="a pem search with --head per-task and a task for each module",
        )  # fmt: skip
    rows = {row["id"]: row for row in s["rows"]}
    own = [rows[f"module {i}"]["keys"][i] for i in range(len(s["tasks"]))]
    methods = [(OWN, "", own)]
    for study in (e for e in s["studies"] if f"best {e['study']}" in rows and not e["violation"]):
        chosen = study["candidate"] | ({"rank": s["rank"]} if s.get("rank") else {})
        setting = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in chosen.items()
        )
        exact = _is_exact(s["kind"], study, chosen)
        name = EXACT if exact else study["study"]
        methods.append((name, setting, rows[f"best {study['study']}"]["keys"]))
    methods += [(r["row"], "", r["keys"]) for i, r in rows.items() if i.startswith("compared ")]
    twice = [name for name, count in Counter(name for name, *_ in methods).items() if count > 1]
    if twice:
        raise DataError.build(
            results.path, "two methods of one name", found=repr(twice[0]),
            do="name the folder of a module of --compare otherwise, and search again",
        )  # fmt: skip
    run = f"{Path(s['base_name']).name} {s['kind']} {_digest(results, own)}"
    return [
        Score(run, " ".join(method.split()), setting, task, record["metric"], record["score"],
              record["standard_error"], record["n"])
        for method, setting, keys in methods
        for task, record in zip(s["tasks"], results.scored(keys), strict=True)
    ]  # fmt: skip


def _is_exact(kind: str, study: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """True for the sum of all that the modules change, cut to no rank."""
    space = "delta" if kind == "lora" else "parameter"
    return study["method"] == "simple" and study["space"] == space and "rank" not in chosen


def _digest(results: Results, own: Sequence[str]) -> str:
    """Of every module with its task, in any order, and all that its score depends on."""
    parts = [
        [record["task"], record["modules"], asked_of(record)] for record in results.scored(own)
    ]
    return hashlib.sha256(b"".join(sorted(json_bytes({"of": p}) for p in parts))).hexdigest()[:8]


def extended(known: Iterable[Score], new: Sequence[Score]) -> list[Score]:
    """The known scores and the new ones, which take the place of the same method's in their run.

    A run keeps the name that it has in the file, whatever its base model is called now.
    """
    known = list(known)
    names = {score.run.rpartition(" ")[2]: score.run for score in known}
    new = [s._replace(run=names.get(s.run.rpartition(" ")[2], s.run)) for s in new]
    replaced = {(score.run, score.method) for score in new}
    return [*(s for s in known if (s.run, s.method) not in replaced), *new]


def read(file: Path) -> list[Score]:
    """The scores of a file; none of one that is not there, or empty.

    Raises:
        DataError: another CSV, a value that is no score, or two scores in one place, by its line.
    """
    data = read_small(file) if file.exists() else b""
    if not data.strip():
        return []
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=None), strict=True)
        first, found = next(lines), [(lines.line_num, line) for line in lines if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError.build(
            file, "no CSV file in UTF-8", found=str(error), do="save it as such"
        ) from error
    if tuple(first) != Score._fields:
        raise DataError.build(
            file, "no leaderboard", found=listing(first, 4),
            expected=f"the columns {', '.join(Score._fields)}", do="name another file",
        )  # fmt: skip
    places = [f"{file}, line {number}" for number, _ in found]
    scores = [_score(line, where) for (_, line), where in zip(found, places, strict=True)]
    _check_one_each(scores, places)
    return scores


def _check_one_each(scores: Sequence[Score], places: Sequence[str]) -> None:
    """Refuse a second score of a method on a task of a run, and a second metric there."""
    metrics: dict[tuple[str, str], tuple[str, str]] = {}
    seen: dict[tuple[str, str, str], str] = {}
    for score, where in zip(scores, places, strict=True):
        metric, first = metrics.setdefault(score.block, (score.metric, where))
        if metric != score.metric:
            raise DataError.build(
                where, "another metric than its block has", found=score.metric,
                expected=f"{metric}, as in {first}", do="give the task another name",
            )  # fmt: skip
        first = seen.setdefault((*score.block, score.method), where)
        if first != where:
            raise DataError.build(
                where, "a second score of a method on a task of a run", found=score.method,
                expected=f"one, as in {first}", do="delete one of the two lines",
            )  # fmt: skip


def _score(line: Sequence[str], where: str) -> Score:
    if len(line) != len(Score._fields):
        raise DataError.build(
            where, "another number of values", found=len(line), expected=len(Score._fields)
        )
    *words, score, error, n = line
    try:
        numbers = float(score), float(error) if error else None, int(n)
    except ValueError:
        numbers = math.nan, None, 0
    if not (abs(numbers[0]) <= LARGEST and 0 <= (numbers[1] or 0) <= LARGEST and numbers[2] > 0):
        raise DataError.build(
            where, "no score", found=f"{score!r}, {error!r}, {n!r}",
            expected="a finite score, its standard error or nothing, and a number of rows",
        )  # fmt: skip
    return Score(words[0], words[1], words[2], words[3], words[4], *numbers)


def write(file: Path, scores: Iterable[Score]) -> None:
    """Put the scores into the file with all their digits, whole or not at all."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerows([Score._fields, *scores])  # None is written as nothing
    write_text(file, written.getvalue())


# --- standings ------------------------------------------------------------------------------------


def standings(scores: Sequence[Score]) -> list[Standing]:
    """Every method beside the exact sum of the same run, the best mean difference first.

    Raises:
        DataError: no run with an exact sum.
    """
    blocks: dict[tuple[str, str], dict[str, float]] = {}
    for score in scores:  # without the last digits: rounding neither wins nor breaks a tie
        blocks.setdefault(score.block, {})[score.method] = round(score.score, 12)
    compared = [block for block in blocks.values() if EXACT in block]
    if not compared:
        raise DataError.build(
            FLAG, "no run with an exact sum",
            found=listing(dict.fromkeys(s.method for s in scores)),
            do="search with --methods sum --space delta as well, without --rank",
        )  # fmt: skip
    methods = dict.fromkeys(method for block in compared for method in block)
    ranks = _ranks(compared, [m for m in methods if m != OWN])
    found = []
    for method in methods:
        own = [(block[method], block[EXACT]) for block in compared if method in block]
        ways = [round(x - exact, 12) for x, exact in own]
        found.append(Standing(
            method, len(own), fmean(x for x, _ in own), ranks.get(method), fmean(ways),
            stdev(ways) / len(ways) ** 0.5 if len(ways) > 1 else None,
            sum(w > 0 for w in ways), sum(w < 0 for w in ways), _p(ways),
        ))  # fmt: skip
    return sorted(_corrected(found), key=lambda standing: -standing.difference)


def _ranks(blocks: Sequence[dict[str, float]], methods: Sequence[str]) -> dict[str, float]:
    """Mean ranks over the blocks in which all methods stand; equal scores share theirs."""
    whole = [[-b[m] for m in methods] for b in blocks if all(m in b for m in methods)]
    if not whole:
        return {}
    return dict(zip(methods, rankdata(whole, axis=1).mean(axis=0).tolist(), strict=True))


def _p(differences: Sequence[float]) -> float:
    moved = [d for d in differences if d]
    return float(wilcoxon(moved).pvalue) if moved else 1.0


def _corrected(found: Sequence[Standing]) -> list[Standing]:
    """p by Holm's rule: the k-th smallest of m times m - k + 1, and no smaller than one before."""
    tested = sorted((s for s in found if s.method not in (OWN, EXACT)), key=lambda s: s.p or 0)
    largest, corrected = 0.0, {}
    for k, standing in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - k) * (standing.p or 0.0)))
        corrected[standing.method] = largest
    return [s._replace(p=corrected.get(s.method)) for s in found]


def markdown(scores: Sequence[Score]) -> str:
    """The standings as a table, and how to read them."""
    found = standings(scores)
    columns = {
        "method": [s.method for s in found],
        "blocks": [str(s.blocks) for s in found],
        "mean": [f"{s.mean:.4f}" for s in found],
        "mean rank": ["" if s.rank is None else f"{s.rank:.1f}" for s in found],
        "minus the exact sum": [
            text.with_error(s.difference, s.difference_standard_error, sign=True) for s in found
        ],
        "better, worse": [f"{s.better}, {s.worse}" for s in found],
        "p": ["" if s.p is None else f"{s.p:.2g}" for s in found],
    }
    runs = len({s.run for s in scores if s.method == EXACT})
    counted = f"{runs} run" if runs == 1 else f"{runs} runs"
    notes = (
        f"A block is a task of a run; {counted}. Differences are means over the blocks with their",
        "standard error. p: Wilcoxon's signed-rank test over the blocks, by Holm's rule for all",
        "merges, as if blocks of one run were independent. Mean rank: over the blocks in which",
        "every merge stands.",
    )
    return "\n".join([text.markdown(list(columns.items())), "", " ".join(notes)])
