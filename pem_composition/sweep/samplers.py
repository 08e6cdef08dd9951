"""Samplers and storages of a search by name; ``studies`` draws with them. Without Optuna."""

from __future__ import annotations

import re

from pem_composition.errors import RunFailed, UsageError, install, installed

RANDOM, TPE, CMA, GRID = "random", "tpe", "cma", "grid"
SAMPLERS = (GRID, RANDOM, TPE, CMA)
SQLITE, JOURNAL = "sqlite", "journal"
STORE, JOURNAL_FILE = "search.db", "search.journal"
DATABASES = ("postgresql", "mysql")
PLACE = "place"  # of a trial in its study; one that was given back has the place that it left


def need_optuna() -> None:
    """Refuse a sampler of Optuna where it is missing.

    Raises:
        RunFailed: it is not installed.
    """
    if not (installed("optuna") and installed("cmaes")):
        raise RunFailed.build(
            "--sampler", "optuna is not installed",
            do=f"{install('optuna')}, or use --sampler grid",
        )  # fmt: skip


def check_storage(storage: str) -> None:
    """Refuse what is no storage.

    Raises:
        UsageError: another kind, or a password, which would stand in the results.
    """
    kind = re.split("[:+]", storage, maxsplit=1)[0]
    place = storage.partition(":")[2]
    if storage != SQLITE and not (place and kind in (JOURNAL, *DATABASES)):
        raise UsageError.build(
            "--storage", "no such storage", found=storage,
            expected="sqlite, journal:DIR, postgresql://HOST/NAME or mysql+pymysql://HOST/NAME",
        )  # fmt: skip
    if re.match(r"//[^/@]*:[^/@]*@", place):
        raise UsageError.build(
            "--storage", "holds a password, which would stand in the results",
            do="put it where the driver looks (~/.pgpass or PGPASSWORD; ~/.my.cnf)",
        )  # fmt: skip
