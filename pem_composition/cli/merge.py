"""``merge.py`` and ``pem merge``: sum_i c_i m_i or another merging method, written or scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pem_composition.arithmetic.compatible import check_coefficients_of
from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE, RULES
from pem_composition.arithmetic.methods.registry import PARITY, SIMPLE, Choice
from pem_composition.cli import common, sweep, whole_models
from pem_composition.cli import flags as shared
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag
from pem_composition.sweep.grids import merges

NAME = "merge"
HELP = "merge modules: sum_i c_i m_i in parameter or delta space, or by another method (-w)"
EXAMPLES = """
  python merge.py -a runs/rte-0 runs/rte-1 -p runs/merged --coefficients 0.3 0.7
  python merge.py -a runs/rte-0 runs/rte-1 -p runs/exact --space delta --rank 8
  python merge.py -a runs/rte runs/mnli runs/cola -p runs/ties -w ties --head per-task
  python merge.py -a runs/rte-0 runs/rte-1 -p runs/fisher -w fisher -f runs/fisher-0 runs/fisher-1
  python merge.py -a runs/rte-0 runs/rte-1 -p runs/as-peft --coefficients 0.3 0.7 --as peft-linear
  python merge.py -a runs/rte-0 runs/rte-1 -p runs/points --grid 0 0.1 1
  python merge.py -a runs/rte-0 runs/rte-1 -p runs/sweep --grid 0 0.05 1 --evaluate \\
      --model_name_or_path roberta-base --task_name rte --validation_file dev.jsonl
  python merge.py -a runs/rte runs/mnli -p runs/both --grid 0 0.05 1 --evaluate \\
      --model_name_or_path t5-base --objective seq2seq --task_name rte mnli --data_dir glue
"""


@dataclass(frozen=True, kw_only=True)
class Config(shared.MergeFlags, shared.GridFlags, shared.RuleFlags, shared.MergeControlFlags):
    """Flags of merge.py."""

    NEEDS: ClassVar = {
        "evaluate": (
            *shared.GridFlags.NEEDS["evaluate"],
            *shared.names_of(shared.MergeControlFlags),
        ),
        **shared.MergeControlFlags.NEEDS,
    }

    coefficients: tuple[float, ...] = flag(
        (),
        "one weight per module, used as given (default: the method's own; of a sum those of "
        "--coefficient_rule)",
        metavar="C",
    )
    search_step: tuple[float, ...] = flag(
        (), "one weight per module, divided by their sum", metavar="C"
    )
    as_: str | None = flag(
        None,
        "compute what another program computes from the same modules, for comparison",
        flag="as",
        choices=tuple(m.name.replace("_", "-") for m in PARITY),
    )

    def __post_init__(self) -> None:
        if self.as_ is not None and self.merge_way != SIMPLE:
            raise UsageError.build(
                "--as",
                "another program's sum, given together with a method",
                found=f"--merge_way {self.merge_way}",
                do="give one of the two",
            )
        super().__post_init__()

    def choice(self, kind: str | None = None) -> Choice:
        """The method of --merge_way, or the sum of --as."""
        way = self.merge_way if self.as_ is None else self.as_.replace("-", "_")
        return shared.choice_of(way, self.setting, kind)


def run(config: Config) -> int:
    """Merge and write, or sweep and score."""
    if config.evaluate:
        return _run_sweep(config)
    models = whole_models.models_of(config, config.full_merge)
    if models is not None:
        return _run_full(config, models)
    shared.check_adapters(config.adapters, "at least one", 1)
    points = _points(config, len(config.adapters))
    for point in points:
        check_coefficients_of(config.choice(), point)
    shared.check_dropout(config.dropout_list, len(config.adapters))
    out = common.output_directory(config, len(config.adapters))
    headers = common.checked_headers(config, out)
    needs = config.choice().entry.needs
    common.find_statistics(config.fisher_list, needs, len(config.adapters))
    modules = common.load_to_combine(headers, once=config.grid is None)
    statistics = common.read_statistics(config.fisher_list, needs)

    names = None if config.grid is None else names_of(points)
    common.write(
        points, names,
        lambda point: common.combined(modules, point, config, config.head_policy(), statistics),
        out, config, told(config, len(modules)),
    )  # fmt: skip
    return 0


def coefficients(config: Config, modules: int) -> tuple[float, ...]:
    """--coefficients as given, --search_step divided by its sum, or the method's default.

    Raises:
        UsageError: both flags, or not one entry per module.
    """
    if config.coefficients and config.search_step:
        raise UsageError.build(
            "--coefficients", "given together with --search_step", do="give one of the two"
        )
    own = config.choice().default
    given = bool(config.coefficients or config.search_step)
    if config.coefficient_rule != DEFAULT_RULE and (given or own is not None):
        raise UsageError.build(
            "--coefficient_rule", "the coefficients are given",
            found="--coefficients or --search_step" if given else f"{own:g} each, the method's own",
            do="leave it out",
        )  # fmt: skip
    if config.coefficients:
        shared.check_count("--coefficients", config.coefficients, modules, "coefficient")
        return config.coefficients
    if config.search_step:
        shared.check_count("--search_step", config.search_step, modules, "entry")
        return shared.normalised(config.search_step)
    return config.choice().default_coefficients(modules, config.coefficient_rule)


def told(config: Config, modules: int) -> list[str]:
    """The rule of coefficients that nobody gave, for the line of the result."""
    free = config.grid is None and not (config.coefficients or config.search_step)
    ruled = free and modules > 1 and config.choice().default is None
    return [RULES[config.coefficient_rule].told(modules)] if ruled else []


def _points(config: Config, modules: int) -> list[tuple[float, ...]]:
    """Coefficients of every module to be written."""
    if config.grid is None:
        return [coefficients(config, modules)]
    if config.coefficients or config.search_step:
        other = "--coefficients" if config.coefficients else "--search_step"
        raise UsageError.build("--grid", f"given together with {other}", do="give one of the two")
    return list(merges(config.grid, modules))


def names_of(points: Sequence[tuple[float, ...]]) -> list[str]:
    """Directory names: t for two modules, all coefficients for more."""
    return ["_".join(f"{c:.12g}" for c in (p[:1] if len(p) == 2 else p)) for p in points]


def _run_full(config: Config, models: whole_models.Models) -> int:
    """Whole models, sum_i c_i theta_i around the base."""
    whole_models.refuse_grid(config.grid)
    count = len(models.paths)
    if count < 1:
        raise UsageError.build(
            "-m/--model", "no model directories", expected="--model DIR DIR ..., or --adapters"
        )
    out = common.output_directory(config, count)
    weights, head = coefficients(config, count), config.head_policy()
    return whole_models.compose(models, weights, out, config, head, told(config, count))


def _run_sweep(config: Config) -> int:
    if config.choice().entry.needs:
        raise UsageError.build(
            "--evaluate", "statistics of data are read by searches", found=config.merge_way,
            do=f"use pem search --methods {config.merge_way} --sampler grid",
        )  # fmt: skip
    grid = config.scored_grid(
        coefficients=config.coefficients,
        search_step=config.search_step,
        full_merge=config.full_merge,
    )
    return sweep.start(config, grid, config.head_policy())
