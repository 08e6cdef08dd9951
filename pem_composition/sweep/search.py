"""Search for a good merge: coefficients, method, settings, rank and space, on the sweep's bench.

Every method (the sum once per space) is a study with the same number of trials. A trial is a point
of the sweep: scored on the selection rows, one line per task in results.jsonl under the key of its
content, and one line that says what was tried. Trials that were finished are never computed again.
The best of each study, the single modules and equal weights are scored on the report rows.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pem_composition.errors import PEMError, RunFailed
from pem_composition.report.records import read_lines
from pem_composition.sweep import MERGE, Row, compared, samplers
from pem_composition.sweep.bench import Bench, Record
from pem_composition.sweep.goals import Condition, Goal, Scored, check_normalised, front
from pem_composition.sweep.points import Input, Point, alone, code_version, point
from pem_composition.sweep.space import Candidate, Study

SUMMARY_VERSION = 1
REFUSED = -1e6  # told of a trial that misses a condition: below every score, less so if near
FRONT_ROWS = 10


@dataclass(frozen=True, eq=False)
class Search:
    """What is searched for.

    Attributes:
        goals: one, or two for a front between them; the first decides what is best.
        trials: of each study.
        own: module i is task i's own.
        compare: modules that are scored in the table beside the results.
    """

    inputs: tuple[Input, ...]
    studies: tuple[Study, ...]
    tasks: tuple[str, ...]
    goals: tuple[Goal, ...]
    conditions: tuple[Condition, ...] = ()
    trials: int = 30
    sampler: str = samplers.TPE
    seed: int = 42
    own: bool = False
    spaces: tuple[str, ...] = ()
    compare: tuple[Input, ...] = ()
    base_name: str = ""
    composition: str = MERGE

    @property
    def singles(self) -> tuple[Input, ...]:
        """The modules alone."""
        return self.inputs


@dataclass(frozen=True)
class Trial:
    """One line of results.jsonl: what was tried, and what came of it."""

    study: str
    number: int
    candidate: Candidate
    coefficients: tuple[float, ...]
    values: tuple[float, ...]
    violation: float
    keys: tuple[str, ...]

    @property
    def rank(self) -> tuple[float, float, int]:
        """Greater is better: conditions first, then the first goal, then the earlier trial."""
        return (-self.violation, self.values[0], -self.number)


def key_of(search: Search, study: Study, bench: Bench, select: str) -> str:
    """What decides the trials of a study: their lines and the store's study carry it."""
    content = {
        "study": asdict(study),
        "goals": [asdict(g) for g in search.goals],
        "conditions": [str(c) for c in search.conditions],
        "sampler": search.sampler,
        "seed": search.seed,
        "modules": [i.sha256 for i in search.inputs],
        "settings": asdict(bench.settings),
        "rows": [rows.identity for rows in bench.splits[select]],
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def work(
    search: Search, bench: Bench, select: str, folder: Path, *, place: int = 0, workers: int = 1
) -> None:
    """Run the trials that are left; with several processes each takes its share.

    Raises:
        RunFailed: optuna is needed and not installed.
    """
    own = _own_records(search, bench, select)
    asked = [g.name for g in search.goals] + [c.name for c in search.conditions]
    if note := check_normalised(asked, search.tasks, own):
        bench.say(note)
    store = None
    if search.sampler != samplers.GRID:
        samplers.need_optuna()
        store = samplers.open_store(folder)
    for study in search.studies:
        key = key_of(search, study, bench, select)
        tried = _Trying(search, study, bench, select, key, own)
        if store is None:
            for number, candidate in enumerate(study.candidates()):
                if number % workers == place:
                    tried(number, candidate)
        else:
            _sample(search, study, tried, store, key, first=place == 0)


def _sample(
    search: Search, study: Study, tried: _Trying, store: Any, key: str, *, first: bool
) -> None:
    name = f"{study.name} {key[:16]}"
    goals = len(search.goals)
    stored = samplers.open_study(store, name, study, search.sampler, search.seed, goals)
    if first:
        samplers.release_orphans(stored)
    budget = search.trials if study.dimensions else 1  # one candidate needs no second trial
    while (trial := samplers.ask(stored, study.dimensions, budget)) is not None:
        found = tried(trial.number, trial.params)
        missed = found.violation > 0
        told = [REFUSED * (1 + found.violation)] * goals if missed else list(found.values)
        stored.tell(trial, told)


def _own_records(search: Search, bench: Bench, select: str) -> list[Record]:
    """Module i alone on task i, where modules and tasks go together."""
    if not search.own:
        return []
    singles = [bench.score(alone(i), select) for i in search.inputs]
    return [records[task] for task, records in enumerate(singles)]


class _Trying:
    """Scores candidates of one study and writes a line for each."""

    def __init__(
        self, search: Search, study: Study, bench: Bench, select: str, key: str, own: list[Record]
    ) -> None:
        self.search, self.study, self.bench, self.select = search, study, bench, select
        self.key, self.own = key, own
        self.known = trials_of(bench.ledger.path, key)

    def __call__(self, number: int, candidate: Candidate) -> Trial:
        """Values and violation of a candidate; settings that do not go together violate most."""
        try:
            coefficients = self.study.coefficients(candidate)
            target = self.study.point(self.search.inputs, self.bench.settings, candidate)
        except PEMError:
            values = (REFUSED,) * len(self.search.goals)
            return self._keep(number, candidate, (), values, -REFUSED, ())
        records = self.bench.score(target, self.select)
        size = sum(map(abs, coefficients)) / len(coefficients)
        scored = Scored(self.search.tasks, records, self.own, size)
        values = tuple(goal.value(scored) for goal in self.search.goals)
        violation = sum(c.violation(scored) for c in self.search.conditions)
        keys = tuple(r["key"] for r in records)
        return self._keep(number, candidate, coefficients, values, violation, keys)

    def _keep(
        self,
        number: int,
        candidate: Candidate,
        coefficients: tuple[float, ...],
        values: tuple[float, ...],
        violation: float,
        keys: tuple[str, ...],
    ) -> Trial:
        found = Trial(
            self.study.name, number, dict(candidate), coefficients, values, violation, keys
        )
        if number not in self.known:
            self.bench.ledger.append({"trial": self.key, **asdict(found)})
        return found


def trials_of(path: Path, key: str) -> dict[int, Trial]:
    """The finished trials of a study, by number."""
    found = {}
    for line in read_lines(path):
        if line.get("trial") == key:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items()}
            del values["trial"]
            found[int(line["number"])] = Trial(**values)
    return found


# --- the end ---


def finish(search: Search, bench: Bench, select: str, report: str) -> dict[str, Any]:
    """Choose the best of each study and of all, and score the table's rows on ``report``.

    Returns the summary, which is also the last line of results.jsonl.

    Raises:
        RunFailed: no trial gave a result.
    """
    bench.ledger.read_again()
    trials = {
        study: list(trials_of(bench.ledger.path, key_of(search, study, bench, select)).values())
        for study in search.studies
    }
    best = {
        study: max((t for t in own if t.keys), key=lambda t: t.rank, default=None)
        for study, own in trials.items()
    }
    found = {study: trial for study, trial in best.items() if trial is not None}
    if not found:
        raise RunFailed.build("search", "no trial gave a result", do="see --search and --methods")
    winner = max(found, key=lambda s: (found[s].rank[:2], -search.studies.index(s)))
    leading = _front(search, trials)
    points = list(_points(search, bench, found, leading))
    rows = [Row(i, n, c, bench.score(target, report)) for i, n, c, target in points]
    summary = {
        "search": SUMMARY_VERSION,
        **_setting(search, bench, select, report),
        "studies": [
            {**asdict(trial), "method": s.method, "space": s.space, "tried": len(trials[s]),
             "keys_of_trials": [list(t.keys) for t in trials[s]],
             "values_of_trials": [list(t.values) for t in trials[s]],
             "violations": [t.violation for t in trials[s]]}
            for s, trial in found.items()
        ],
        "best": winner.name,
        "front": [[study.name, trial.number] for study, trial in leading],
        "costs": [_cost(target, bench) for *_, target in points],
        **compared(search, bench.settings, bench.splits[report], rows),
        "peak_memory": _peak_memory(),
    }  # fmt: skip
    bench.ledger.append(summary)
    return summary


def best_point(search: Search, bench: Bench, summary: Mapping[str, Any]) -> Point:
    """The point of the best study's best trial."""
    entry = next(s for s in summary["studies"] if s["study"] == summary["best"])
    study = next(s for s in search.studies if s.name == summary["best"])
    return study.point(search.inputs, bench.settings, entry["candidate"])


def _front(search: Search, trials: Mapping[Study, Sequence[Trial]]) -> list[tuple[Study, Trial]]:
    """Trials of all studies that no other beats in both goals; none with one goal."""
    if len(search.goals) < 2:
        return []
    flat = [(s, t) for s, own in trials.items() for t in own if t.keys and not t.violation]
    places = front([t.values for _, t in flat])
    return sorted((flat[i] for i in places), key=lambda pair: pair[1].values, reverse=True)


Line = tuple[str, str, Sequence[float], Point]


def _points(
    search: Search,
    bench: Bench,
    best: Mapping[Study, Trial],
    leading: Sequence[tuple[Study, Trial]],
) -> Iterator[Line]:
    """Rows of the table: modules, equal weights, modules to compare with, what was found."""
    for n, single in enumerate(search.inputs):
        yield f"module {n}", single.name, (), alone(single)
    count = len(search.inputs)
    equal = (1.0 / count,) * count
    for space in search.spaces:
        name = f"equal weights, {space} space"
        target = point(search.inputs, equal, space, bench.settings, method="simple")
        yield name, name, equal, target
    for module in search.compare:
        yield f"compared {module.name}", module.name, (), alone(module)
    named = [(f"best {study.name}", study, trial) for study, trial in best.items()]
    for n, (study, trial) in enumerate(leading[:FRONT_ROWS], start=1):
        named.append((f"front {n}, {study.name}", study, trial))
    for name, study, trial in named:
        target = study.point(search.inputs, bench.settings, trial.candidate)
        yield name, name, trial.coefficients, target


def _setting(search: Search, bench: Bench, select: str, report: str) -> dict[str, Any]:
    """What the search was about."""
    settings = bench.settings
    return {
        "composition": "search",
        "modules": [i.name for i in search.inputs],
        "kind": search.inputs[0].pem.kind,
        "base": settings.base,
        "base_name": search.base_name,
        "tasks": list(search.tasks),
        "head": settings.head if search.inputs[0].pem.head_tensors() else None,
        "select": select,
        "report": report,
        "goals": [g.name for g in search.goals],
        "constraints": [str(c) for c in search.conditions],
        "sampler": search.sampler,
        "seed": search.seed,
    }


def _cost(target: Point, bench: Bench) -> dict[str, float | int] | None:
    """What a merge costs and how large it is; None for a module as it is."""
    if target.space is None:
        return None
    began = time.perf_counter()
    module = target.module(bench.settings)
    seconds = time.perf_counter() - began
    ranks = [len(t) for n, t in module.tensors.items() if n.endswith(".lora_A")]
    return {"seconds": round(seconds, 4), "rank": max(ranks, default=0)}


def _peak_memory() -> int:
    """Bytes of memory that this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
