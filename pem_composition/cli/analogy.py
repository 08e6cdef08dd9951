"""``analogy.py`` and ``pem analogy``: lam * classifier + (1 - lam) * (target_lm - source_lm)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pem_composition.arithmetic.algebra import analogy_weights
from pem_composition.arithmetic.compatible import check_coefficients_of
from pem_composition.checkpoint.adapter_transformers_write import as_reference
from pem_composition.checkpoint.content import REFERENCE
from pem_composition.cli import common, sweep, whole_models
from pem_composition.cli import flags as shared
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag
from pem_composition.sweep.engine import ANALOGY
from pem_composition.sweep.grids import analogies

if TYPE_CHECKING:
    from pem_composition.module import PEM

NAME = "analogy"
HELP = "move a classifier to another domain: lam * CLS + (1 - lam) * (TARGET_LM - SOURCE_LM)"
EXAMPLES = """
  python analogy.py -a yelp_cls amazon_lm yelp_lm -p runs/amazon_cls --coefficient 0.9
  python analogy.py -a yelp_cls amazon_lm yelp_lm -p runs/amazon_cls --search_step 90 10
  python analogy.py -a yelp_cls amazon_lm yelp_lm -p runs/sweep --grid 0 0.1 1 0.8 0.02 1 \\
      --evaluate --model_name_or_path t5-base --objective seq2seq --task_name amazon_polarity \\
      --validation_file dev.jsonl --test_file test.jsonl --reference_module amazon_cls
"""
MODULES = "three: CLS TARGET_LM SOURCE_LM"


@dataclass(frozen=True, kw_only=True)
class Config(shared.MergeFlags, shared.GridFlags, shared.ControlFlags):
    """Flags of analogy.py; --adapters are CLS TARGET_LM SOURCE_LM, in this order."""

    NEEDS: ClassVar = {"evaluate": (*shared.GridFlags.NEEDS["evaluate"], "controls")}

    coefficient: float | None = flag(
        None, "weight of the classifier, as given (default: 0.5)", metavar="LAM"
    )
    search_step: tuple[float, ...] = flag(
        (), "C0 C1, divided by their sum: lam = C0 / (C0 + C1)", metavar="C"
    )


def run(config: Config) -> int:
    """Compose three modules and write the result."""
    if config.evaluate:
        return _run_sweep(config)
    points = _points(config)
    shared.check_adapters(config.adapters, MODULES, 3, 3)
    shared.check_dropout(config.dropout_list, 3)
    out = common.output_directory(config, 3)
    head = config.head_policy(kept="first")
    for point in points:
        check_coefficients_of(config.choice(), point)
    models = whole_models.models_of(config, config.full_merge)
    if models is not None:
        whole_models.refuse_grid(config.grid)
        return whole_models.compose(models, points[0], out, config, head)
    headers = common.checked_headers(config, out)
    modules = common.load_to_combine(headers, once=config.grid is None)
    series = None if config.grid is None else [f"{point[0]:.12g}" for point in points]
    common.write(points, series, lambda p: _combine(modules, p, config), out, config)
    return 0


def _combine(modules: Sequence[PEM], point: Sequence[float], config: Config) -> PEM:
    module = common.combined(modules, point, config, config.head_policy(kept="first"))
    return as_reference(module) if config.format == REFERENCE.name else module


def _points(config: Config) -> tuple[tuple[float, ...], ...]:
    """Coefficients of every module to be written."""
    if config.grid is None:
        return (analogy_weights(coefficient(config)),)
    if config.coefficient is not None or config.search_step:
        other = "--search_step" if config.coefficient is None else "--coefficient"
        raise UsageError.build("--grid", f"given together with {other}", do="give one of the two")
    return analogies(config.grid)


def _run_sweep(config: Config) -> int:
    grid = config.scored_grid(
        coefficient=config.coefficient is not None,
        search_step=config.search_step,
        full_merge=config.full_merge,
    )
    shared.check_adapters(config.adapters, MODULES, 3, 3)
    return sweep.start(config, grid, config.head_policy(kept="first"), ANALOGY)


def coefficient(config: Config) -> float:
    """lam from --coefficient (as given) or --search_step (over their sum); 0.5 by default."""
    if config.coefficient is not None and config.search_step:
        raise UsageError.build(
            "--coefficient", "given together with --search_step", do="give one of the two"
        )
    if config.search_step:
        if len(config.search_step) != 2:
            raise UsageError.build(
                "--search_step",
                "wrong number of entries",
                found=len(config.search_step),
                expected="two: C0 C1",
            )
        return shared.normalised(config.search_step, "--coefficient")[0]
    return 0.5 if config.coefficient is None else config.coefficient
