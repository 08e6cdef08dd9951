"""Flags that several programs share, and the checks that need nothing but their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from pem_composition.arithmetic import ranks
from pem_composition.arithmetic.compatible import SPACES, check_rank, space_of
from pem_composition.arithmetic.head_policies import POLICIES as HEADS
from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE, RULES
from pem_composition.arithmetic.methods.registry import METHODS, PARITY, SIMPLE, Choice, resolve
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.statistics import COMMANDS
from pem_composition.checkpoint.content import LAYOUTS
from pem_composition.config import ADAPTER_CONFIGS, DTYPES, TOKEN_POLICIES
from pem_composition.errors import (
    MissingPackage,
    PEMError,
    UsageError,
    close_match,
    install,
    installed,
)
from pem_composition.flag_declarations import flag, refuse_idle, required
from pem_composition.sweep.tasks import Scoring
from pem_composition.training.training_flags import (
    DEFAULT_BLOCK,
    OBJECTIVES,
    TARGETS,
    RowFlags,
    TrackerFlags,
    check_objective,
)

MERGE_WAYS = tuple(name for name, m in METHODS.items() if m not in PARITY)


def names_of(flags: type[Any]) -> tuple[str, ...]:
    """The names of a group of flags."""
    return tuple(spec.name for spec in fields(flags))


def named(text: str) -> Any:
    """The flag --module NAME=DIR, given once per name."""
    return flag((), text, repeat=True, metavar="NAME=DIR")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where and how a composed module is written; a sweep may have two spaces."""

    save_path: Path = required("output directory", short="-p", metavar="OUT")
    overwrite: bool = flag(False, "replace an existing output", short="-o")
    space: tuple[str, ...] = flag(
        (),
        "add the modules' own tensors (parameter: the paper, the default) or the exact "
        "updates they make (delta), or multiply (IA)^3 vectors (log); with --evaluate the "
        "first two, unless one is named",
        choices=SPACES,
    )
    rank: Rank | None = flag(
        None,
        "delta space: best LoRA of rank R, or of the smallest rank by layer that keeps a share of "
        "the update's energy, such as 0.95",
        metavar=ranks.METAVAR,
    )
    format: str = flag("peft", "layout of the output", choices=tuple(LAYOUTS))
    dtype: str | None = flag(
        None,
        "of the written tensors; default: float32 (float64 where read), of a whole model as the "
        "first one stores it",
        choices=DTYPES,
    )
    allow_base_mismatch: bool = flag(
        False, "combine modules whose base models are recorded as different"
    )

    def __post_init__(self) -> None:
        if len(set(self.space)) < len(self.space):
            raise UsageError.build(
                "--space",
                "a space given twice",
                found=" ".join(self.space),
                do="give each space once",
            )

    def choice(self, kind: str | None = None) -> Choice:
        """The merging method with its settings; the sum where there is no choice.

        Args:
            kind: of the modules, once it is known.
        """
        return resolve(SIMPLE, kind=kind)

    @property
    def one_space(self) -> str:
        """The space of a single composition: parameter unless given, or the method's own.

        Raises:
            PEMError: two spaces, or a rank that the method or the space has not.
        """
        if len(self.space) > 1:
            raise UsageError.build(
                "--space",
                "two spaces make two modules",
                found=" ".join(self.space),
                do="give one, or add --evaluate",
            )
        space = space_of(self.choice(), self.space[0] if self.space else None)
        check_rank(self.rank, space, self.choice(), "lora", "--rank")
        return space


@dataclass(frozen=True, kw_only=True)
class ModuleFlags(OutputFlags):
    """Which modules are read, and what the caller believes about them."""

    adapters: tuple[str, ...] = flag((), "module directories", short="-a", metavar="DIR")
    model: tuple[str, ...] = flag(
        (), "base model, checked against the modules", short="-m", metavar="MODEL"
    )
    adatasks: tuple[str, ...] = flag(
        (), "one name per module; the output is OUT/<names joined by _>", short="-t", metavar="NAME"
    )
    adaconfig: str | None = flag(
        None, "kind of the modules, checked", short="-c", choices=tuple(ADAPTER_CONFIGS)
    )
    dropout_list: tuple[float, ...] = flag(
        (),
        "one dropout probability per module; accepted, without effect on the sum",
        short="-d",
        metavar="P",
        least=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class ModelFlags(ModuleFlags):
    """The same for programs that take whole models, too; ``merge``, ``analogy``, ``negation``."""

    tokens: str = flag(
        "error",
        "whole models whose embeddings have different numbers of rows: refuse them, or "
        "write the rows of the first or the largest; a row that some lack is averaged over "
        "those that have it",
        choices=TOKEN_POLICIES,
    )


@dataclass(frozen=True, kw_only=True)
class MergeFlags(ModelFlags):
    """How several modules become one; ``merge`` and ``analogy``."""

    merge_way: str = flag(
        SIMPLE,
        f"{SIMPLE}: the weighted sum; or a merging method (pem methods lists them): "
        + ", ".join(MERGE_WAYS[1:]),
        short="-w",
        metavar="WAY",
    )
    setting: tuple[str, ...] = flag(
        (),
        "a setting of the method, such as density=0.2; once per setting",
        repeat=True,
        metavar="NAME=VALUE",
    )
    merge_head: bool | None = flag(
        None,
        "true: average the heads with the coefficients (--head average); false: keep "
        "one (merge: --head last, analogy: --head first)",
    )
    head: str | None = flag(None, "which head the result has (default: average)", choices=HEADS)
    full_merge: bool = flag(False, "whole fine-tuned models instead of adapters")
    fisher_list: tuple[str, ...] = flag(
        (),
        "one file of pem fisher (-w fisher) or pem gram (-w regmean, ssr) per module",
        short="-f",
        nargs="*",
        metavar="FILE",
    )
    device: str = flag(
        "cpu",
        "where adapters are merged, such as cuda: for TIES, KnOTS and other methods that take "
        "SVDs (-w fisher, regmean and ssr: on the CPU)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice()
        check_merge_way(self.merge_way, self.fisher_list)
        if (
            self.head is not None
            and self.merge_head is not None
            and (self.head == "average") != self.merge_head
        ):
            raise UsageError.build(
                "--head",
                f"contradicts --merge_head {str(self.merge_head).lower()}",
                found=f"--head {self.head}",
                do="give one of the two",
            )

    def choice(self, kind: str | None = None) -> Choice:
        """The method of --merge_way with its settings."""
        return choice_of(self.merge_way, self.setting, kind)

    def head_policy(self, kept: str = "last") -> str:
        """--head if given; --merge_head false is the head that is ``kept``; else average."""
        return self.head or (kept if self.merge_head is False else "average")


def check_merge_way(way: str, fisher: Sequence[str]) -> None:
    """Refuse data files for a method that takes none, and another program's sum by this flag."""
    if way in METHODS and way not in MERGE_WAYS:
        raise UsageError.build(
            "--merge_way",
            "another program's sum has a flag of its own",
            found=way,
            do=f"use --as {way.replace('_', '-')}",
        )
    needs = METHODS[way].needs if way in METHODS else ""
    if fisher and not needs:
        raise UsageError.build(
            "--fisher_list",
            "applies to --merge_way fisher, regmean and ssr only",
            found=f"--merge_way {way}",
            do="leave it out",
        )
    if needs and not fisher:
        raise UsageError.build(
            "--fisher_list",
            f"{way} needs the {needs} file of every module",
            found="none",
            do=f"make them with {COMMANDS[needs]}",
        )


def choice_of(way: str, pairs: Sequence[str], kind: str | None = None) -> Choice:
    """A method with the settings that NAME=VALUE pairs give.

    Raises:
        UsageError: no such method or setting, a value out of range, or a pair given twice.
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise UsageError.build(
                "--setting", "not a setting", found=repr(pair), expected="NAME=VALUE"
            )
        if name in settings:
            raise UsageError.build("--setting", f"{name} given twice", do="give each name once")
        settings[name] = value
    if way not in METHODS:
        remedy = close_match(way, MERGE_WAYS)
        known = None if remedy else ", ".join(MERGE_WAYS)
        raise UsageError.build("--merge_way", f"unknown method {way!r}", expected=known, do=remedy)
    places = {name: f"--setting {name}" for name in settings}
    try:
        return resolve(way, settings, kind, places=places)
    except PEMError as error:
        raise UsageError(str(error)) from None


def check_count(flag: str, values: Sequence[Any], modules: int, what: str) -> None:
    """One value per module."""
    if len(values) != modules:
        raise UsageError.build(
            flag, f"one {what} per module is needed", found=len(values), expected=modules
        )


def check_adapters(
    adapters: Sequence[str], wanted: str, at_least: int, at_most: int | None = None
) -> None:
    """Refuse a wrong number of module directories."""
    if len(adapters) < at_least or (at_most is not None and len(adapters) > at_most):
        raise UsageError.build(
            "-a/--adapters", "wrong number of modules", found=len(adapters), expected=wanted
        )


def check_dropout(values: Sequence[float], modules: int) -> None:
    """--dropout_list has no effect, but a wrong one shows a mistake in the script."""
    if values:
        check_count("--dropout_list", values, modules, "probability")


def normalised(steps: Sequence[float], instead: str = "--coefficients") -> tuple[float, ...]:
    """Entries of --search_step divided by their sum, as the reference programs do.

    Args:
        instead: the flag whose numbers are taken as given.

    Raises:
        UsageError: a negative entry (it would change the scale of all others) or a sum of zero.
    """
    flag, do = "--search_step", f"use {instead}, taken as given"
    for step in steps:
        if step < 0:
            reason = f"{flag} is divided by its sum, so a negative entry would rescale the others"
            raise UsageError.build(flag, reason, found=f"{step:g}", expected="entries >= 0", do=do)
    total = sum(steps)
    if not total:
        raise UsageError.build(
            flag, f"{flag} is divided by its sum, which is 0", found=list(steps), do=do
        )
    if math.isinf(total):
        return normalised([step / max(steps) for step in steps], instead)
    return tuple(step / total for step in steps)


# Flags that say nothing about the tasks of the harness.
ROW_FLAGS = (
    "task_name", "validation_file", "test_file", "data_dir", "target", "prompt", "block_size",
    "max_eval_samples", "text_column_names", "label_column_name", "labels", "do_regression",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HarnessFlags:
    """Tasks of the lm-evaluation-harness instead of labelled rows."""

    harness_tasks: tuple[str, ...] | None = flag(
        None,
        "score on these tasks of the lm-evaluation-harness instead of rows of your own: names of "
        "tasks, groups or tags",
        metavar="NAME",
    )
    harness_include: str | None = flag(
        None, "harness: folder of further task files (.yaml)", metavar="DIR"
    )
    num_fewshot: int | None = flag(
        None, "harness: examples shown before each row (default: the task's own number)", least=0
    )
    limit: int | None = flag(None, "harness: only the first N rows of each task", least=2)

    @property
    def harness_options(self) -> dict[str, Any]:
        """How the tasks are asked."""
        include, shown = self.harness_include, self.num_fewshot
        return {"include": include, "num_fewshot": shown, "limit": self.limit}

    def check_harness(self, *others: str) -> None:
        """Refuse flags of the harness without tasks, and of other rows beside them.

        Args:
            others: flags that say nothing about the harness's tasks.

        Raises:
            UsageError: naming the flag.
            MissingPackage: the harness is not installed.
        """
        for name in ("harness_include", "num_fewshot", "limit"):
            refuse_idle(self, name, "--harness_tasks", has=bool(self.harness_tasks))
        if not self.harness_tasks:
            return
        for name in others:
            if getattr(self, name):
                raise UsageError.build(
                    f"--{name}", "says nothing about the harness's tasks", do="leave it out"
                )
        if not installed("lm_eval"):
            raise MissingPackage.build(
                "--harness_tasks", "the package lm-eval is not installed",
                do=f"{install('lm_eval')} (pip install pem_composition[harness])",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Where a model computes, and how."""

    bf16: bool = flag(False, "compute in bfloat16: faster where the processor has it")
    use_cpu: bool = flag(False, "do not use a GPU")


@dataclass(frozen=True, kw_only=True)
class AnswerKindFlags:
    """How a model answers rows, and how many are asked at a time."""

    objective: str = flag(
        OBJECTIVES[0],
        "how rows are answered: by a head, text to text, or by the perplexity of documents "
        "(causal_lm) or of answers to instructions (instruction)",
        choices=OBJECTIVES,
    )
    target: str | None = flag(
        None,
        "seq2seq: the answer of the row's label (default: label) or a domain's text",
        choices=TARGETS,
    )
    template: str | None = flag(
        None,
        "instruction: sections (the default), chat or a JSON file; seq2seq on a decoder: how the "
        "prompt is asked, as in pem train",
    )
    max_seq_length: int = flag(128, "tokens per example; longer ones are cut", least=1)
    block_size: int | None = flag(
        None, f"next_block: tokens per block of text (default: {DEFAULT_BLOCK})", least=1
    )
    max_eval_samples: int | None = flag(
        None, "at most N rows per split, stratified by label", least=1
    )
    per_device_eval_batch_size: int | None = flag(
        None, "rows per batch (default: 16 on a CPU, 64 on a GPU)", least=1
    )

    @property
    def next_block(self) -> bool:
        """True where the rows are a domain's text."""
        return self.objective == "seq2seq" and self.target == "next_block"


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(AnswerKindFlags, DeviceFlags, RowFlags, HarnessFlags):
    """What modules are scored on; named as in the Hugging Face example programs."""

    model_name_or_path: str | None = flag(None, "base model to evaluate on: a directory or a name")
    prompt: tuple[str, ...] | None = flag(
        None,
        "seq2seq: template and answers by name or JSON file, one for all tasks or one "
        "per task; default: each task's own",
        metavar="NAME",
    )
    task_name: tuple[str, ...] | None = flag(
        None, "task or tasks, e.g. rte mnli; gives columns, labels and metric", metavar="TASK"
    )
    validation_file: tuple[str, ...] | None = flag(
        None, "rows on which coefficients are selected, one file per task", metavar="FILE"
    )
    test_file: tuple[str, ...] | None = flag(
        None,
        "rows on which the table is made, one file per task; default: the validation rows",
        metavar="FILE",
    )
    data_dir: tuple[str, ...] | None = flag(
        None,
        "folder with dev and test files, or with one such folder per task; or one "
        "folder for each task",
        metavar="DIR",
    )
    reference_module: str | None = flag(
        None, "one more module to compare with, e.g. of the full set", metavar="DIR"
    )
    metric_for_best_model: tuple[str, ...] | None = flag(
        None,
        "what best means: one metric, or one per task; default: each task's own",
        metavar="METRIC",
    )
    max_invalid: float | None = flag(
        None,
        "seq2seq: also select among the points with at most this share of invalid "
        "answers on every task",
        metavar="SHARE",
        least=0,
        most=1,
    )

    def scoring(self) -> Scoring:
        """The same for the library.

        Raises:
            UsageError: a flag of another objective than the one that is evaluated.
            MissingPackage: tasks of the harness, which is not installed.
        """
        self.check_harness(*ROW_FLAGS)
        check_objective(self)
        answered = self.objective == "seq2seq" and not self.next_block
        refuse_idle(self, "max_invalid", "--objective seq2seq --target label", has=answered)
        return Scoring(
            objective=self.objective,
            next_block=self.next_block,
            task_name=self.task_name,
            validation_file=self.validation_file,
            test_file=self.test_file,
            data_dir=self.data_dir,
            prompt=self.prompt,
            template=self.template,
            reading=self.reading(),
            max_seq_length=self.max_seq_length,
            block_size=self.block_size or DEFAULT_BLOCK,
            max_eval_samples=self.max_eval_samples,
            batch_size=self.per_device_eval_batch_size,
            metrics=self.metric_for_best_model or (),
            max_invalid=self.max_invalid,
            harness_tasks=self.harness_tasks or (),
            harness_options=self.harness_options,
            bf16=self.bf16,
        )


@dataclass(frozen=True, kw_only=True)
class RuleFlags:
    """Coefficients where none are given; ``merge``, ``sweep`` and ``search``."""

    coefficient_rule: str = flag(
        DEFAULT_RULE,
        "coefficients of a sum of T modules where none are given: "
        + ", ".join(f"{name} {rule.name}" for name, rule in RULES.items())
        + " each",
        choices=tuple(RULES),
    )


@dataclass(frozen=True, kw_only=True)
class ControlFlags:
    """Rows of what a composition that is scored has to beat."""

    controls: bool = flag(
        False,
        "also score what the selected composition has to beat: base, random modules, modules "
        "alone, without its own module, cut to one module's rank, the average of the outputs; of "
        "an analogy base, classifier alone and with matched priors, language models alone and "
        "exchanged",
    )


@dataclass(frozen=True, kw_only=True)
class MergeControlFlags(ControlFlags):
    """What a merge that is scored is compared with; ``merge``, ``sweep`` and ``search``."""

    joint_module: tuple[str, ...] = flag(
        (),
        "with --controls: a module trained on the rows of all tasks; once per module, e.g. with as "
        "many steps as one module, and as all",
        repeat=True,
        metavar="DIR",
    )

    refit: int | None = flag(
        None,
        "also score every row of the table with last layers that are fitted anew on ROWS training "
        "rows per task, as pem refit fits them",
        metavar="ROWS",
        least=1,
    )
    refit_select: bool = flag(
        False,
        "with --refit: also choose by scores with new last layers, which each point then gets",
    )
    train_file: tuple[str, ...] | None = flag(
        None,
        "with --refit: training rows, one file per task; default: those of --data_dir or of the "
        "task's name",
        metavar="FILE",
    )

    NEEDS: ClassVar = {"controls": ("joint_module",), "refit": ("refit_select", "train_file")}


@dataclass(frozen=True, kw_only=True)
class ScoringFlags(EvaluationFlags, TrackerFlags):
    """A series of compositions that are scored, and where the scores go."""


@dataclass(frozen=True, kw_only=True)
class GridFlags(ScoringFlags):
    """A series of compositions, written or scored; ``merge`` and ``analogy``."""

    grid: tuple[float, ...] | None = flag(
        None,
        "START STEP STOP, or several such ranges: all points (t, 1 - t), for analogies "
        "(t, 1 - t, t - 1); three modules and more: 0 STEP 1, all multiples of STEP that sum "
        "to 1",
        metavar="T",
    )
    evaluate: bool = flag(False, "score the points of the grid instead of writing modules")

    NEEDS: ClassVar = {"evaluate": names_of(ScoringFlags)}

    def scored_grid(self, **others: object) -> tuple[float, ...]:
        """The grid of --evaluate.

        Args:
            others: values of flags that name single points; none may be set.

        Raises:
            UsageError: no grid, or a flag beside it.
        """
        for name, value in others.items():
            if value:
                raise UsageError.build(
                    "--evaluate",
                    "scores the points of a grid",
                    found=f"--{name}",
                    expected="--grid START STEP STOP and --adapters",
                )
        if self.grid is None:
            raise UsageError.build(
                "--evaluate",
                "no points to score",
                expected="--grid START STEP STOP",
                do="add --grid 0 0.05 1",
            )
        return self.grid
