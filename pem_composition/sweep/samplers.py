"""The samplers of a search by name; ``studies`` draws with them. Without Optuna."""

from __future__ import annotations

from pem_composition.errors import RunFailed, install, installed

RANDOM, TPE, CMA, GRID = "random", "tpe", "cma", "grid"
SAMPLERS = (GRID, RANDOM, TPE, CMA)
STORE = "search.db"
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
