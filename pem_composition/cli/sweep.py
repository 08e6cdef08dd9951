"""``pem sweep`` and ``--grid ... --evaluate`` of merge.py and analogy.py: score, tabulate, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import launch
from pem_composition.arithmetic.compatible import check_coefficients_of, space_of
from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE
from pem_composition.arithmetic.methods.registry import SIMPLE
from pem_composition.cli import common
from pem_composition.cli.flags import (
    HEADS,
    ControlFlags,
    MergeControlFlags,
    ModuleFlags,
    RuleFlags,
    ScoringFlags,
    check_dropout,
)
from pem_composition.cli.parser import COMMAND
from pem_composition.cli.report import show
from pem_composition.errors import UsageError
from pem_composition.evaluation.model_names import resolve
from pem_composition.flag_declarations import flag
from pem_composition.report.records import RESULTS
from pem_composition.sweep import engine, setup, tasks
from pem_composition.sweep.grids import analogies, merges
from pem_composition.sweep.points import PER_TASK
from pem_composition.tasks.data import VALIDATION

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader

NAME = "sweep"
HELP = "score merges of modules over a grid, on one task or several, in one process; table and plot"
EXAMPLES = """
  pem sweep -a runs/rte-0 runs/rte-1 -p runs/sweep --model_name_or_path roberta-base \\
      --task_name rte --validation_file dev.jsonl --test_file test.jsonl --grid 0 0.05 1
  pem sweep -a runs/rte runs/mnli -p runs/both --model_name_or_path t5-base --objective seq2seq \\
      --task_name rte mnli --data_dir glue --grid 0 0.05 1
"""
SCORED_HEADS = ("average", "first", "last", "error", PER_TASK)


@dataclass(frozen=True, kw_only=True)
class Config(ModuleFlags, ScoringFlags, RuleFlags, MergeControlFlags):
    """Flags of pem sweep."""

    grid: tuple[float, ...] = flag(
        (0.0, 0.05, 1.0),
        "START STEP STOP, or several such ranges: two modules (t, 1 - t); more: 0 STEP "
        "1, all multiples of STEP that sum to 1",
        metavar="T",
    )
    head: str = flag(
        "average",
        "which head a merge has; per-task: task i is scored with the head of module i",
        choices=HEADS,
    )


def run(config: Config) -> int:
    """Score the grid."""
    return start(config, config.grid, config.head)


def start(config: Any, values: Sequence[float], head: str, composition: str = engine.MERGE) -> int:
    """Check everything that needs no tensor, then score, tabulate and plot.

    Args:
        config: ``ModuleFlags`` and ``ScoringFlags``; where there are some, ``ControlFlags`` and
            ``RuleFlags``.

    Raises:
        PEMError: flags, modules or data that cannot be used; nothing was written.
    """
    config.check_tracker()
    checked = check(config, values, head, composition)
    plan, runner = checked.prepare(common.say)
    summary = engine.run(plan, runner, VALIDATION, setup.report_split(runner))
    runner.close()
    print(f"{checked.out}: {runner.told('points scored')}")
    if not launch.is_main():
        return 0
    with runner.store.finish(summary):  # processes that share the output write in turn
        for path, module in checked.write_selected(plan, summary):
            common.report(path, module)
        show(checked.out / RESULTS, checked.out, config.report_to)
    return 0


def check(
    config: Any, values: Sequence[float], head: str, composition: str = engine.MERGE
) -> setup.MergeSetup:
    """Everything that can be refused without a tensor, as values of the library.

    Args:
        config: as of ``start``, where ``EvaluationFlags`` are enough.
    """
    scoring, count = config.scoring(), len(config.adapters)
    controlled = isinstance(config, ControlFlags) and config.controls
    merged = config if isinstance(config, MergeControlFlags) else None
    if merged is not None:
        fresh = {name: getattr(merged, name) for name in ("refit", "refit_select", "train_file")}
        scoring = replace(scoring, **fresh)
    merge = composition == engine.MERGE
    points = merges(values, count) if merge else analogies(values)
    for point in points:
        check_coefficients_of(config.choice(), point)
    model = base_of(config)
    check_dropout(config.dropout_list, count)
    out = common.output_directory(config, count)
    setup.check_results_directory(out)
    reference = config.reference_module
    paths = (*config.adapters, *([reference] if reference else []))
    names = common.labels(config.adapters, config.adatasks)
    names += [common.labels(paths)[-1]] if reference else []
    headers = _headers(config, names[:count])
    own_heads = head == PER_TASK
    if scoring.by_head:
        _check_head(head, composition)
    answering = headers if merge else headers[:1]  # language models of an analogy bring no head
    scored = tasks.read(scoring, answering, own_heads=own_heads, out=out)
    tasks.chosen_by(scoring, scored)
    if own_heads:
        tasks.check_own_heads(scoring, scored, headers)
    base = resolve(model)
    extra = common.headers_of([reference], names[count:]) if reference else []
    common.check_model([base], [*headers, *extra], config.allow_base_mismatch)
    if scoring.by_head and not own_heads:
        tasks.check_labels([*answering, *extra], scored)
    joint = merged.joint_module if merged is not None else ()
    joint_names = common.labels(joint)
    joint_headers = common.headers_of(joint, joint_names)
    common.check_model([base], joint_headers, config.allow_base_mismatch)
    if scoring.by_head:
        tasks.check_joint(joint_headers, scored)
    return setup.MergeSetup(
        base=base, base_name=Path(model).name, out=out, paths=paths, names=tuple(names),
        count=count, kind=headers[0].kind, tasks=scored, scoring=scoring, points=points,
        spaces=_spaces(config, headers[0]), choice=config.choice(headers[0].kind),
        composition=composition, head=head, rank=config.rank, dtype=config.dtype,
        format=config.format, bf16=config.bf16, use_cpu=config.use_cpu,
        overwrite=config.overwrite,
        command=COMMAND.get(), controls=controlled, joint=joint,
        joint_names=tuple(joint_names), training=tasks.training_rows(scoring, scored),
        rule=config.coefficient_rule if isinstance(config, RuleFlags) else DEFAULT_RULE,
    )  # fmt: skip


def base_of(config: Any) -> str:
    """The base model as the user named it.

    Raises:
        UsageError: none.
    """
    model = config.model_name_or_path or next(iter(config.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to evaluate on", expected="a directory or a name"
        )
    return model


def _check_head(head: str, composition: str) -> None:
    """Refuse a policy by which no head is left to score, or one of several tasks; of an analogy a
    head per task, too, since its modules have no task each."""
    scored = [h for h in SCORED_HEADS if composition == engine.MERGE or h != PER_TASK]
    if head not in scored:
        what = "a merge" if composition == engine.MERGE else "an analogy"
        several = f"{what} whose head is of several tasks cannot be scored"
        raise UsageError.build(
            "--head", f"{what} without a head cannot be scored" if head == "none" else several,
            found=head, expected=", ".join(scored),
        )  # fmt: skip


def _headers(flags: ModuleFlags, names: Sequence[str]) -> list[ModuleHeader]:
    """Headers, checked against each other in every space asked for."""
    spaces = _asked(flags)
    if flags.rank is not None and "delta" not in spaces:
        raise UsageError.build(
            "--rank",
            "applies to delta space only",
            found=f"--space {' '.join(spaces)}",
            do="add delta",
        )
    return common.read_headers(flags.adapters, names, flags, flags.adaconfig, spaces)


def _asked(flags: ModuleFlags) -> tuple[str, ...]:
    """The spaces named, or both; of a method its own."""
    choice = flags.choice()
    if choice.method == SIMPLE:
        return tuple(flags.space) or engine.SWEPT_SPACES
    return (space_of(choice, flags.space[0] if flags.space else None),)


def _spaces(flags: ModuleFlags, header: ModuleHeader) -> tuple[str, ...]:
    """Both spaces unless one is named; where they are the same sum, one."""
    spaces = _asked(flags)
    if header.kind != "lora" and {"parameter", "delta"} <= set(spaces):
        print(f"kind {header.kind}: parameter and delta space are the same sum, scored once")
        return tuple(space for space in spaces if space != "delta")
    return spaces
