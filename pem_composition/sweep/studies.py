"""Studies of a search in a store that several processes share, and how their trials are drawn.

A store is a SQLite file (processes of one machine), a journal (machines that share a folder) or a
database (any machines). What a process is at is locked until it ends; to a database it also sends
heartbeats, so that another machine learns of its end where no lock tells.

Every proposal depends on the study's finished trials, the seed and the trial's place alone, so a
search that was stopped goes on as if it had not been, and nothing but numbers is stored: Optuna's
own CMA-ES keeps a pickle in the store, here it is rebuilt from the trials.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from cmaes import CMA as Evolution
from sqlalchemy.exc import SQLAlchemyError

from pem_composition import progress
from pem_composition.errors import RunFailed, install
from pem_composition.sweep.result_store import locked
from pem_composition.sweep.runner import Runner
from pem_composition.sweep.samplers import (
    CMA,
    JOURNAL,
    JOURNAL_FILE,
    PLACE,
    RANDOM,
    SQLITE,
    STORE,
    TPE,
)
from pem_composition.sweep.space import Dimension, Study

HOST = "host"  # of a trial: the machine that it is on
BEAT, GRACE = 10, 60  # seconds between heartbeats of a process, and until one is taken for dead
# Packages of the drivers that have another name.
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
PATIENCE = 120.0  # seconds that a process waits for another one that writes to the store
STARTUP = 10  # trials of TPE at random, before it has something to learn from
SIGMA = 0.3  # first step size of CMA-ES, as a share of each range

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_store(folder: Path, storage: str = SQLITE) -> Any:
    """The store, made if it is not there; of processes of one folder one at a time opens it.

    Raises:
        RunFailed: no driver, or no database that answers.
    """
    kind, _, place = storage.partition(":")
    with locked(folder / STORE, "open"):
        if storage == SQLITE:
            patient = {"connect_args": {"timeout": PATIENCE}}
            url = f"sqlite:///{folder.absolute() / STORE}"
            return optuna.storages.RDBStorage(url, engine_kwargs=patient)
        if kind == JOURNAL:
            Path(place).mkdir(parents=True, exist_ok=True)
            file = optuna.storages.journal.JournalFileBackend(str(Path(place) / JOURNAL_FILE))
            return optuna.storages.JournalStorage(file)
        try:
            return optuna.storages.RDBStorage(
                storage, engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=BEAT, grace_period=GRACE,
            )  # fmt: skip
        except ImportError as error:
            driver = str(getattr(error.__cause__, "name", None) or kind)
            raise RunFailed.build(
                "--storage", "no driver for the database", found=f"no package {driver}",
                do=install(DRIVERS.get(driver, driver)),
            ) from error  # fmt: skip
        except Exception as error:  # of SQLAlchemy's many kinds
            raise RunFailed.build(
                f"--storage {storage}", "the database cannot be used",
                found=str(error).strip().partition("\n")[0], do="check address, name and rights",
            ) from error  # fmt: skip


@contextmanager
def said_of(folder: Path, storage: str) -> Iterator[None]:
    """An error of the store is said of it, in one line.

    Raises:
        RunFailed: the disk is full, or a database answers no more.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        raise RunFailed.build(
            folder / STORE if storage == SQLITE else f"--storage {storage}",
            "the study cannot be kept there", found=str(cause).strip().partition("\n")[0],
            do="free some space, or see that the database answers, and run the same command again: "
            "it goes on",
        ) from error  # fmt: skip


@contextmanager
def _beating(store: Any, trial: Any) -> Iterator[None]:
    """Heartbeats of a trial to a database while it is computed; nothing to another store."""
    if not _beats(store):
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            store.record_heartbeat(trial._trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _beats(store: Any) -> bool:
    return getattr(store, "heartbeat_interval", None) is not None


def _is_here(trial: Any, store: Any) -> bool:
    """True for a trial whose lock tells whether its process lives.

    One without a machine is being drawn, or its process died while it drew.
    """
    return not _beats(store) or trial.user_attrs.get(HOST, platform.node()) == platform.node()


def open_study(
    store: Any, name: str, study: Study, sampler: str, seed: int, goals: int
) -> optuna.Study:
    """The stored study of that name, or a new one; maximises every goal."""
    return optuna.create_study(
        storage=store,
        sampler=_reseeded(sampler, study.dimensions, seed, goals),
        study_name=name,
        directions=["maximize"] * goals,
        load_if_exists=True,
    )


def ask(
    store: Any, study: optuna.Study, dimensions: Sequence[Dimension], budget: int
) -> Any | None:
    """The trial of the first free place, None where ``budget`` of them are done or under way.

    One process at a time may ask. Its death at any moment leaves a trial that others give back:
    Optuna takes none for dead that has never sent a heartbeat, so that comes before the machine.
    """
    if place_of(study) >= budget:
        return None
    trial = study.ask()
    if _beats(store):
        store.record_heartbeat(trial._trial_id)
    trial.set_user_attr(HOST, platform.node())
    trial.set_user_attr(PLACE, place_of(study, trial.number))
    for d in dimensions:
        if d.choices:
            trial.suggest_categorical(d.name, d.choices)
        else:
            trial.suggest_float(d.name, d.low, d.high)
    return trial


def place_of(study: optuna.Study, number: int | None = None) -> int:
    """The first place that no other trial has; those that were given up have none."""
    failed = optuna.trial.TrialState.FAIL
    others = (t for t in study.get_trials(deepcopy=False) if t.state != failed)
    taken = {t.user_attrs.get(PLACE) for t in others if t.number != number}
    return next(place for place in itertools.count() if place not in taken)


def under_way(study: optuna.Study) -> list[Any]:
    """Trials that some process is at, or was at when it died; without those that fell silent."""
    optuna.storages.fail_stale_trials(study)
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))


def finished(study: optuna.Study) -> list[Any]:
    """Trials with values, in the order of their places."""
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(done, key=lambda t: t.user_attrs[PLACE])


def give_back(study: optuna.Study, trial: Any, values: Sequence[float] | None) -> None:
    """Settle a trial whose process died: with its values where they are known, else it is free."""
    failed = optuna.trial.TrialState.FAIL
    state = failed if values is None else optuna.trial.TrialState.COMPLETE
    study.tell(trial.number, values, state=state, skip_if_finished=True)


class Tried(Protocol):
    """Scores candidates and keeps what is known of them."""

    runner: Runner

    def __call__(self, place: int, candidate: Mapping[str, Any]) -> Any:
        """The record of a candidate, scored unless it is known."""

    def known(self, place: int) -> Any | None:
        """The record at a place."""

    def told(self, found: Any) -> list[float]:
        """What the sampler learns of a record."""


def sample(
    store: Any,
    opened: Callable[..., optuna.Study],
    name: str,
    study: Study,
    tried: Tried,
    budget: int,
) -> None:
    """Draw and score until every trial of the study has its values, whoever found them."""
    claim = tried.runner.store.claim
    with claim(name):
        stored = opened(name=name)
    for trial in finished(stored):  # whose line was lost, or is not looked at
        tried(trial.user_attrs[PLACE], trial.params)
    with progress.bar(budget, study.name, "trials") as done:
        _draw(stored, store, name, study, tried, budget, done)


def _draw(
    stored: optuna.Study, store: Any, name: str, study: Study, tried: Tried, budget: int,
    done: Callable[[int], object],
) -> None:  # fmt: skip
    """Trials one by one, beside other processes, until no place is free and none is under way."""
    claim = tried.runner.store.claim
    while True:
        with ExitStack() as held:
            with claim(name):
                _settle(stored, store, name, tried)
                trial = ask(store, stored, study.dimensions, budget)
                if trial is not None:
                    held.enter_context(claim(f"{name} {trial.user_attrs[PLACE]}"))
            if trial is not None:
                with _beating(store, trial):
                    found = tried(trial.user_attrs[PLACE], trial.params)
                stored.tell(trial, tried.told(found), skip_if_finished=True)
                done(1)
                continue
        running = under_way(stored)
        if not running:
            return
        if not _is_here(running[0], store):
            time.sleep(1.0)
            continue
        with claim(f"{name} {running[0].user_attrs.get(PLACE)}"):
            pass  # another process is at it, or has died


def _settle(stored: optuna.Study, store: Any, name: str, tried: Tried) -> None:
    """Give back the trials of processes that died: nobody holds their claim."""
    for trial in under_way(stored):
        if not _is_here(trial, store):
            continue
        place = trial.user_attrs.get(PLACE)
        with tried.runner.store.claim(f"{name} {place}", wait=False) as mine:
            if mine:
                known = None if place is None else tried.known(place)
                give_back(stored, trial, None if known is None else tried.told(known))


def seed_of(seed: int, place: int) -> int:
    """A seed for one trial."""
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:4])


def _reseeded(sampler: str, dimensions: Sequence[Dimension], seed: int, goals: int) -> Any:
    """A sampler that is made anew for every trial, from the trial's place."""
    make: Mapping[str, Callable[[int], Any]] = {
        RANDOM: lambda s: optuna.samplers.RandomSampler(seed=s),
        TPE: lambda s: optuna.samplers.TPESampler(
            seed=s, n_startup_trials=STARTUP, multivariate=True, constant_liar=goals == 1
        ),
        CMA: lambda s: _replayed_cma(dimensions, s),
    }

    class Reseeded(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self._current: tuple[int, Any] = (-1, None)

        def _inner(self, study: Any, trial: Any) -> Any:
            if self._current[0] != trial.number:
                own = seed_of(seed, place_of(study, trial.number))
                self._current = (trial.number, make[sampler](own))
            return self._current[1]

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._inner(study, trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._inner(study, trial).sample_relative(study, trial, search_space)

        def sample_independent(
            self, study: Any, trial: Any, param_name: str, param_distribution: Any
        ) -> Any:
            inner = self._inner(study, trial)
            return inner.sample_independent(study, trial, param_name, param_distribution)

    return Reseeded()


def _replayed_cma(dimensions: Sequence[Dimension], seed: int) -> Any:
    """CMA-ES over the numeric dimensions, told the finished trials generation by generation."""
    numeric = [d for d in dimensions if d.numeric]
    low = np.array([d.low for d in numeric])
    width = np.array([d.high - d.low for d in numeric])

    class Replayed(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return {d.name: optuna.distributions.FloatDistribution(d.low, d.high) for d in numeric}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            start = np.clip(-low / width, 0.0, 1.0)  # coefficients of 0, where the range has it
            centre = np.where((low < 0) & (low + width > 0), start, 0.5)
            bounds = np.array([[0.0, 1.0]] * len(numeric))
            evolution = Evolution(mean=centre, sigma=SIGMA, bounds=bounds, seed=seed)
            done = finished(study)
            size = evolution.population_size
            for start_at in range(0, len(done) - size + 1, size):
                evolution.tell([self._told(t) for t in done[start_at : start_at + size]])
            drawn = low + width * evolution.ask()
            return {d.name: float(x) for d, x in zip(numeric, drawn, strict=True)}

        def _told(self, trial: Any) -> tuple[Any, float]:
            x = np.array([trial.params[d.name] for d in numeric])
            return (x - low) / width, -float(trial.values[0])

        def sample_independent(
            self, study: Any, trial: Any, param_name: str, param_distribution: Any
        ) -> Any:
            inner = optuna.samplers.RandomSampler(seed=seed)
            return inner.sample_independent(study, trial, param_name, param_distribution)

    return Replayed()
