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
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from scipy.stats import rankdata, wilcoxon

from pem_composition.errors import DataError, UsageError, listing
from pem_composition.report import text
from pem_composition.safe_files import read_small, write_text

if TYPE_CHECKING:
    from pem_composition.report.records import Results

OWN = "own modules"  # no merge: what merges are measured by
EXACT = ("sum in delta space", "sum in parameter space")  # the latter where vectors are added
FLAG = "--leaderboard"


class Score(NamedTuple):
    """A line of the file: what one method has on one task of one run.

    Attributes:
        run: base model, kind of modules, and a digest of them; free text in lines of other tools.
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
    digests = [results.points[key]["modules"][0] for key in own]
    run = f"{Path(s['base_name']).name} {s['kind']} {_digest(digests)}"
    methods = [(OWN, "", own)]
    for study in (e for e in s["studies"] if f"best {e['study']}" in rows and not e["violation"]):
        setting = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                           for k, v in study["candidate"].items())  # fmt: skip
        methods.append((study["study"], setting, rows[f"best {study['study']}"]["keys"]))
    methods += [(r["row"], "", r["keys"]) for i, r in rows.items() if i.startswith("compared ")]
    return [
        Score(run, method, setting, task, record["metric"], record["score"],
              record["standard_error"], record["n"])
        for method, setting, keys in methods
        for task, record in zip(s["tasks"], results.scored(keys), strict=True)
    ]  # fmt: skip


def _digest(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:8]


def extended(known: Iterable[Score], new: Sequence[Score]) -> list[Score]:
    """The known scores and the new ones, which take the place of the same method's in their run.

    Raises:
        DataError: a task of one run on another number of rows, whose scores are not comparable.
    """
    replaced = {(score.run, score.method) for score in new}
    kept = [score for score in known if (score.run, score.method) not in replaced]
    rows = {score.block: score.n for score in kept}
    for score in new:
        if rows.get(score.block, score.n) != score.n:
            raise DataError.build(
                FLAG, f"other rows of {score.task} than the methods of this run have in the file",
                found=f"{score.n} for {score.method}", expected=str(rows[score.block]),
                do="search with the --test_file and --max_eval_samples of the others",
            )  # fmt: skip
    return [*kept, *new]


def read(file: Path) -> list[Score]:
    """The scores of a file; none of one that is not there.

    Raises:
        DataError: another CSV, or a value that is no number, by its line.
    """
    if not file.exists():
        return []
    lines = csv.DictReader(io.StringIO(read_small(file).decode("utf-8", "replace")))
    if tuple(lines.fieldnames or ()) != Score._fields:
        raise DataError.build(
            file, "no leaderboard", found=listing(lines.fieldnames or (), 4),
            expected=f"the columns {', '.join(Score._fields)}", do="name another file",
        )  # fmt: skip
    found = []
    for line in lines:
        error = line["standard_error"]
        try:
            numbers = finite(line["score"]), finite(error) if error else None, int(line["n"])
        except (TypeError, ValueError) as wrong:
            raise DataError.build(
                f"{file}, line {lines.line_num}", "no number", found=str(wrong),
                expected="finite scores and errors, and a number of rows",
            ) from wrong  # fmt: skip
        found.append(Score(*(line[name] for name in Score._fields[:5]), *numbers))
    return found


def finite(value: str) -> float:
    """A number of the file.

    Raises:
        ValueError: a word, NaN or an infinity.
    """
    if not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def write(file: Path, scores: Iterable[Score]) -> None:
    """Put the scores into the file, whole or not at all."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(Score._fields)
    for s in scores:
        error = "" if s.standard_error is None else round(s.standard_error, 6)
        writer.writerow((*s[:5], round(s.score, 6), error, s.n))
    write_text(file, written.getvalue())


# --- standings ------------------------------------------------------------------------------------


def standings(scores: Sequence[Score]) -> list[Standing]:
    """Every method beside the exact sum of the same run, the best mean difference first.

    Raises:
        DataError: no run with an exact sum.
    """
    blocks: dict[tuple[str, str], dict[str, float]] = {}
    for score in scores:
        blocks.setdefault(score.block, {})[score.method] = round(
            score.score, 12
        )  # no rounding wins
    pairs = {block: _exact(own) for block, own in blocks.items() if _exact(own) is not None}
    if not pairs:
        raise DataError.build(
            FLAG, "no run with an exact sum",
            found=listing(dict.fromkeys(s.method for s in scores)),
            do="search with --methods sum --space delta as well",
        )  # fmt: skip
    methods = dict.fromkeys(s.method for s in scores if s.block in pairs)
    ranks = _ranks([blocks[b] for b in pairs], [m for m in methods if m != OWN])
    found = []
    for method in methods:
        own = [(blocks[b][method], exact) for b, exact in pairs.items() if method in blocks[b]]
        ways = [round(x - exact, 12) for x, exact in own]
        found.append(Standing(
            method, len(own), fmean(x for x, _ in own), ranks.get(method), fmean(ways),
            stdev(ways) / len(ways) ** 0.5 if len(ways) > 1 else None,
            sum(w > 0 for w in ways), sum(w < 0 for w in ways), _p(ways),
        ))  # fmt: skip
    return sorted(_corrected(found), key=lambda standing: -standing.difference)


def _exact(block: dict[str, float]) -> float | None:
    return next((block[name] for name in EXACT if name in block), None)


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
    tested = sorted((s for s in found if s.method not in (OWN, *EXACT[:1])), key=lambda s: s.p or 0)
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
    runs = len({s.run for s in scores})
    counted = f"{runs} run" if runs == 1 else f"{runs} runs"
    notes = (
        f"A block is a task of a run; {counted}. Differences are means over the blocks with their",
        "standard error. p: Wilcoxon's signed-rank test over the blocks, by Holm's rule for all",
        "merges, as if blocks of one run were independent. Mean rank: over the blocks in which",
        "every merge stands.",
    )
    return "\n".join([text.markdown(list(columns.items())), "", " ".join(notes)])
