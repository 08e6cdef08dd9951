"""Search for a good merge: coefficients, method, settings, rank and space, on the sweep's runner.

Every method (the sum once per space) is a study with the same number of trials. A trial is a point
of the sweep: scored on the selection rows, one line per task in results.jsonl under the key of its
content, and one line that says what was tried. Trials that were finished are never computed again.
The best of each study, the single modules and equal weights are scored on the report rows.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE
from pem_composition.arithmetic.methods.registry import SIMPLE
from pem_composition.errors import PEMError, RunFailed
from pem_composition.evaluation import keys
from pem_composition.sweep import samplers
from pem_composition.sweep.controls import ALONE, Controls, Line
from pem_composition.sweep.engine import MERGE, compared, equal_weights, score_table, setting
from pem_composition.sweep.goals import (
    Condition,
    Goal,
    Scored,
    check_normalised,
    front,
)
from pem_composition.sweep.points import Input, Point, TooLarge, alone, point
from pem_composition.sweep.result_store import Record, ResultStore
from pem_composition.sweep.runner import Runner, Target
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
        metrics: for each task the metric that goals and conditions are about; none: its own.
        statistics: files that a method needs, by the method.
        rule: of the coefficients that equal weights are.
        controls: of the exact sum, where it is searched, else of the best merge.
        storage: where the trials of several processes are kept; see ``samplers``.
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
    metrics: tuple[str, ...] = ()
    command: str = ""
    statistics: Mapping[str, Sequence[str]] = field(default_factory=dict)
    controls: Controls | None = None
    rule: str = DEFAULT_RULE
    storage: str = samplers.SQLITE

    @property
    def singles(self) -> tuple[Input, ...]:
        """The modules alone."""
        return self.inputs

    def budget(self, study: Study) -> int | None:
        """Trials of a study; None: every point of its grid."""
        if self.sampler == samplers.GRID:
            return None
        return self.trials if study.dimensions else 1  # one candidate: no second trial


@dataclass(frozen=True)
class SearchTrial:
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


def key_of(search: Search, study: Study, runner: Runner, select: str) -> str:
    """What decides the trials of a study: their lines and the store's study carry it."""
    settings = asdict(runner.settings)
    content = {
        "study": asdict(study),
        "goals": [asdict(g) for g in search.goals],
        "conditions": [str(c) for c in search.conditions],
        "sampler": search.sampler,
        "seed": search.seed,
        "modules": [i.sha256 for i in search.inputs],
        "statistics": [{w: s.sha256 for w, s in i.statistics.items()} for i in search.inputs],
        "settings": {k: v for k, v in settings.items() if k != "dtype" or v},
        "tasks": list(search.tasks),
        "chosen by": list(search.metrics),
        "rows": [rows.identity for rows in runner.splits[select]],
    }
    if runner.refitting is not None and runner.refitting.chooses:
        places = range(len(search.tasks))
        content["refit"] = [runner.refitting.identity(place) for place in places]
    return keys.key_of(keys.complete(content))


def work(search: Search, runner: Runner, select: str, folder: Path) -> None:
    """Run the trials that are left, beside any number of other processes; all are done then.

    Raises:
        RunFailed: optuna is needed and not installed, or trials cannot be stored.
    """
    own = _own_records(search, runner, select)
    asked = [g.name for g in search.goals] + [c.name for c in search.conditions]
    if note := check_normalised(asked, search.tasks, own):
        runner.say(note)
    store = None
    if search.sampler != samplers.GRID:
        samplers.need_optuna()
        from pem_composition.sweep import studies

        with studies.said_of(folder, search.storage):
            store = studies.open_store(folder, search.storage)
    for study in search.studies:
        tried = _Trying(search, study, runner, select, own)
        if store is None:
            candidates = list(study.candidates())
            points = (tried.point(candidate) for candidate in candidates)
            runner.share(((p, select) for p in points if p is not None), choosing=True)
            for number, candidate in enumerate(candidates):
                tried(number, candidate)
        else:
            stored = partial(
                studies.open_study, store, study=study, sampler=search.sampler, seed=search.seed,
                goals=len(search.goals),
            )  # fmt: skip
            name = f"{study.name} {tried.key[:16]}"
            if search.storage != samplers.SQLITE:  # others may keep searches of the same in it
                name += f" {keys.key_of({'folder': str(folder.absolute())})[:8]}"
            with studies.said_of(folder, search.storage):
                studies.sample(store, stored, name, study, tried, search.budget(study))


def _own_records(search: Search, runner: Runner, select: str) -> list[Record]:
    """Module i alone on task i, where modules and tasks go together."""
    if not search.own:
        return []
    singles = [runner.choose(alone(i), select) for i in search.inputs]
    return [records[task] for task, records in enumerate(singles)]


class _Trying:
    """Scores candidates of one study and writes a line for each."""

    def __init__(
        self, search: Search, study: Study, runner: Runner, select: str, own: list[Record]
    ) -> None:
        self.search, self.study, self.runner, self.select = search, study, runner, select
        self.own = own
        self.key = key_of(search, study, runner, select)
        self._points: dict[tuple[Any, ...], Point | None] = {}

    def point(self, candidate: Candidate) -> Point | None:
        """What a candidate stands for, made once."""
        name = tuple(candidate.items())
        if name not in self._points:
            self._points[name] = self._point(candidate)
        return self._points[name]

    def _point(self, candidate: Candidate) -> Point | None:
        """What a candidate stands for; None for one that cannot be: settings that do not go
        together, or a sum that the dtype of the output does not hold."""
        try:
            found = self.study.point(self.search.inputs, self.runner.settings, candidate)
            found.check(self.runner.settings)
        except TooLarge as error:
            self.runner.say(f"left out: {error}")
            return None
        except PEMError:
            return None
        return found

    def __call__(self, number: int, candidate: Candidate) -> SearchTrial:
        """Values and violation of a candidate; settings that do not go together violate most."""
        target = self.point(candidate)
        if target is None:
            values = (REFUSED,) * len(self.search.goals)
            return self._keep(number, candidate, (), values, -REFUSED, ())
        coefficients = self.study.coefficients(candidate)
        records = self.runner.choose(target, self.select)
        size = sum(map(abs, coefficients)) / len(coefficients)
        scored = Scored(self.search.tasks, records, self.own, size, self.search.metrics)
        values = tuple(goal.value(scored) for goal in self.search.goals)
        violation = sum(c.violation(scored) for c in self.search.conditions)
        keys = tuple(r["key"] for r in records)
        return self._keep(number, candidate, coefficients, values, violation, keys)

    def known(self, number: int) -> SearchTrial | None:
        """The trial's line, if some process has written it."""
        self.runner.store.read_again()
        return trials_of(self.runner.store, self.key).get(number)

    def told(self, found: SearchTrial) -> list[float]:
        """What the sampler is told of a trial."""
        if found.violation > 0:
            return [REFUSED * (1 + found.violation)] * len(self.search.goals)
        return list(found.values)

    def _keep(
        self,
        number: int,
        candidate: Candidate,
        coefficients: tuple[float, ...],
        values: tuple[float, ...],
        violation: float,
        keys: tuple[str, ...],
    ) -> SearchTrial:
        found = SearchTrial(
            self.study.name, number, dict(candidate), coefficients, values, violation, keys
        )
        store = self.runner.store
        with store.claim(f"line {self.key} {number}"):
            if self.known(number) != found:
                store.append({"trial": self.key, **asdict(found)})
        return found


def trials_of(store: ResultStore, key: str) -> dict[int, SearchTrial]:
    """The finished trials of a study, by number."""
    found = {}
    for (trial, number), line in sorted(store.trials.items()):
        if trial == key:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items()}
            del values["trial"]
            found[number] = SearchTrial(**values)
    return found


# --- the end ---


def finish(search: Search, runner: Runner, select: str, report: str) -> dict[str, Any]:
    """Choose the best of each study and of all, and score the table's rows on ``report``.

    Returns the summary, which is also the last line of results.jsonl.

    Raises:
        RunFailed: no trial gave a result.
    """
    runner.store.read_again()
    trials = {
        study: list(trials_of(runner.store, key_of(search, study, runner, select)).values())[
            : search.budget(study)
        ]
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
    best_records = [runner.store.records[key] for key in found[winner].keys]
    scored = Scored(search.tasks, best_records, metrics=search.metrics)
    table = list(_table(search, runner, found, leading))
    merge = next(line for line in table if line.id == f"best {_controlled(found, winner).name}")
    rows = score_table(table, merge, search.controls, runner, report)
    costs = [_cost(line.target, runner) for line in table]
    summary = {
        "search": SUMMARY_VERSION,
        **setting(search, runner, best_records, select, report),
        "composition": "search",
        "goals": [g.name for g in search.goals],
        "penalty": search.goals[0].penalty,
        "constraints": [str(c) for c in search.conditions],
        "sampler": search.sampler,
        "seed": search.seed,
        "goal_signs": [goal.sign(scored) for goal in search.goals],
        "studies": [
            {**asdict(trial), "method": s.method, "space": s.space, "tried": len(trials[s]),
             "statistics": search.statistics.get(s.method, ()),
             "keys_of_trials": [list(t.keys) for t in trials[s]],
             "values_of_trials": [list(t.values) for t in trials[s]],
             "violations": [t.violation for t in trials[s]]}
            for s, trial in found.items()
        ],
        "best": winner.name,
        "front": [[study.name, trial.number] for study, trial in leading],
        "costs": costs + [None] * (len(rows) - len(costs)),
        **compared(search, runner.settings, runner.splits[report], rows, merge),
        "peak_memory": _peak_memory(),
    }  # fmt: skip
    runner.store.conclude(summary)
    return summary


def best_point(search: Search, runner: Runner, summary: Mapping[str, Any]) -> Point:
    """The point of the best study's best trial."""
    entry = next(s for s in summary["studies"] if s["study"] == summary["best"])
    study = next(s for s in search.studies if s.name == summary["best"])
    return study.point(search.inputs, runner.settings, entry["candidate"])


def _front(
    search: Search, trials: Mapping[Study, Sequence[SearchTrial]]
) -> list[tuple[Study, SearchTrial]]:
    """Trials of all studies that no other beats in both goals; none with one goal."""
    if len(search.goals) < 2:
        return []
    flat = [(s, t) for s, own in trials.items() for t in own if t.keys and not t.violation]
    places = front([t.values for _, t in flat])
    return sorted((flat[i] for i in places), key=lambda pair: pair[1].values, reverse=True)


def _controlled(found: Iterable[Study], winner: Study) -> Study:
    """The study whose best merge the controls are of."""
    exact = (s for s in found if s.method == SIMPLE and s.space == "delta")
    return next(exact, winner)


def _table(
    search: Search,
    runner: Runner,
    best: Mapping[Study, SearchTrial],
    leading: Sequence[tuple[Study, SearchTrial]],
) -> Iterator[Line]:
    """Rows of the table: modules, equal weights, modules to compare with, what was found."""
    control = ALONE if search.controls is not None else ""
    for n, single in enumerate(search.inputs):
        yield Line(f"module {n}", single.name, (), alone(single), control)
    equal, how = equal_weights(search.rule, len(search.inputs))
    for space in search.spaces:
        name = f"{how}, {space} space"
        target = point(search.inputs, equal, space, runner.settings, method="simple")
        yield Line(name, name, equal, target)
    for module in search.compare:
        yield Line(f"compared {module.name}", module.name, (), alone(module))
    named = [(f"best {study.name}", study, trial) for study, trial in best.items()]
    for n, (study, trial) in enumerate(leading[:FRONT_ROWS], start=1):
        named.append((f"front {n}, {study.name}", study, trial))
    for name, study, trial in named:
        target = study.point(search.inputs, runner.settings, trial.candidate)
        yield Line(name, name, trial.coefficients, target)


def _cost(target: Target, runner: Runner) -> dict[str, float | int] | None:
    """What a merge costs and how large it is; None for a module as it is."""
    if not isinstance(target, Point) or target.space is None:
        return None
    began = time.perf_counter()
    module = target.module(runner.settings)
    seconds = time.perf_counter() - began
    ranks = [len(t) for n, t in module.tensors.items() if n.endswith(".lora_A")]
    return {"seconds": round(seconds, 4), "rank": max(ranks, default=0)}


def _peak_memory() -> int:
    """Bytes of memory that this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
