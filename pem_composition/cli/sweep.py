"""``pem sweep`` and ``--grid ... --evaluate`` of merge.py and analogy.py: score, tabulate, plot."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import sweep as library
from pem_composition.arithmetic.compatible import SPACES, check_coefficients_of, space_of
from pem_composition.arithmetic.heads import own_head
from pem_composition.arithmetic.methods.registry import SIMPLE
from pem_composition.cli import common, scored
from pem_composition.cli.flags import HEADS, EvaluationFlags, ModuleFlags, check_dropout
from pem_composition.cli.parser import COMMAND
from pem_composition.cli.report import show
from pem_composition.errors import CheckpointError, IncompatibleModules, UsageError
from pem_composition.evaluation import keys
from pem_composition.report.records import RESULTS
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.module import PEM

NAME = "sweep"
HELP = "score merges of modules over a grid, on one task or several, in one process; table and plot"
EXAMPLES = """
  pem sweep -a runs/rte-0 runs/rte-1 -p runs/sweep --model_name_or_path roberta-base \\
      --task_name rte --validation_file dev.jsonl --test_file test.jsonl --grid 0 0.05 1
  pem sweep -a runs/rte runs/mnli -p runs/both --model_name_or_path t5-base --objective seq2seq \\
      --task_name rte mnli --data_dir glue --grid 0 0.05 1
"""
MODULE_FILES = ("adapter_config.json", "config.json", "pem.json")
SCORED_HEADS = ("average", "first", "last", "error", library.PER_TASK)


@dataclass(frozen=True, kw_only=True)
class Config(ModuleFlags, EvaluationFlags):
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


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, checked as far as no tensor is needed."""

    flags: ModuleFlags
    evaluation: EvaluationFlags
    composition: str
    points: tuple[tuple[float, ...], ...]
    head: str
    model: str  # folder or hub name
    base_name: str  # the model as the user named it
    out: Path
    paths: tuple[str, ...]  # modules, then the reference if there is one
    names: tuple[str, ...]
    spaces: tuple[str, ...]
    kind: str
    tasks: tuple[scored.ScoredTask, ...]


def run(config: Config) -> int:
    """Score the grid."""
    return start(config, config, config.grid, config.head)


def start(
    flags: ModuleFlags,
    evaluation: EvaluationFlags,
    values: Sequence[float],
    head: str,
    composition: str = library.MERGE,
) -> int:
    """Check everything that needs no tensor, then score, tabulate and plot.

    Raises:
        PEMError: flags, modules or data that cannot be used; nothing was written.
    """
    request = check(flags, evaluation, values, head, composition)
    plan, runner = prepare(request)
    report = library.TEST if library.TEST in runner.splits else library.VALIDATION
    summary = library.run(plan, runner, library.VALIDATION, report)
    runner.close()
    print(f"{request.out}: {runner.told('points scored')}")
    with runner.store.claim("finish"):  # processes that share the output write in turn
        _finish(request, plan, summary)
    return 0


def check(
    flags: ModuleFlags,
    evaluation: EvaluationFlags,
    values: Sequence[float],
    head: str,
    composition: str,
) -> Request:
    count = len(flags.adapters)
    merge = composition == library.MERGE
    points = library.merges(values, count) if merge else library.analogies(values)
    for point in points:
        check_coefficients_of(flags.choice(), point)
    model = evaluation.model_name_or_path or next(iter(flags.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to evaluate on", expected="a directory or a name"
        )
    check_dropout(flags.dropout_list, count)
    out = common.output_directory(flags, count)
    check_results_directory(out)
    reference = evaluation.reference_module
    paths = (*flags.adapters, *([reference] if reference else []))
    names = common.labels(flags.adapters, flags.adatasks)
    names += [common.labels(paths)[-1]] if reference else []
    headers = _headers(flags, names[:count])
    own_heads = head == library.PER_TASK
    answering = headers if merge else headers[:1]  # language models of an analogy bring no head
    tasks = scored.read(evaluation, answering, own_heads=own_heads)
    scored.chosen_by(evaluation, tasks)
    if own_heads:
        scored.check_own_heads(evaluation, tasks, headers)
    source = resolve(model)
    extra = common.headers_of([reference], names[count:]) if reference else []
    common.check_model([source], [*headers, *extra], flags.allow_base_mismatch)
    if evaluation.objective != "seq2seq" and not own_heads:
        scored.check_labels([*answering, *extra], tasks)
    spaces = _spaces(flags, headers[0])
    return Request(
        flags, evaluation, composition, points, head, source, Path(model).name, out, paths,
        tuple(names), spaces, headers[0].kind, tasks,
    )  # fmt: skip


def resolve(model: str) -> str:
    from pem_composition.evaluation.models import resolve

    return resolve(model)


def check_results_directory(out: Path) -> None:
    """A sweep continues in its own directory; it never writes into a module or over a file."""
    if out.exists() and not out.is_dir():
        raise CheckpointError.build(
            out,
            "the output exists",
            found="a file",
            expected="a directory of results, or no such path",
        )
    inside = [name for name in MODULE_FILES if (out / name).exists()]
    if inside:
        raise CheckpointError.build(
            out, "the output is a module", found=inside[0], do="choose another --save_path"
        )


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
        return tuple(flags.space) or library.SWEPT_SPACES
    return (space_of(choice, flags.space[0] if flags.space else None),)


def _spaces(flags: ModuleFlags, header: ModuleHeader) -> tuple[str, ...]:
    """Both spaces unless one is named; where they are the same sum, one."""
    spaces = _asked(flags)
    if header.kind != "lora" and {"parameter", "delta"} <= set(spaces):
        print(f"kind {header.kind}: parameter and delta space are the same sum, scored once")
        return tuple(space for space in spaces if space != "delta")
    return spaces


def prepare(request: Request) -> tuple[library.Plan, library.Runner]:
    """Load the modules; the base model waits until a point needs it."""
    inputs = load_inputs(request)
    evaluation, tasks = request.evaluation, request.tasks
    settings = library.Settings(
        base=keys.base_digest(request.model),
        head=request.head,
        rank=request.flags.rank,
        bf16=bool(evaluation.bf16),
        method=str(request.flags.choice(request.kind)),
        device=device_key(evaluation.use_cpu),
    )
    own = request.head == library.PER_TASK
    heads = [own_head(i.pem) if own else None for i in inputs[: len(tasks)]]
    heads += [None] * (len(tasks) - len(heads))
    splits = {
        split: [_rows(t, split, evaluation, h) for t, h in zip(tasks, heads, strict=True)]
        for split in dict.fromkeys((library.VALIDATION, scored.report_split(tasks)))
    }
    store = library.ResultStore(request.out / RESULTS, fresh=request.flags.overwrite)
    count = len(request.flags.adapters)
    plan = library.Plan(
        inputs=tuple(inputs[:count]),
        points=request.points,
        tasks=tuple(task.name for task in tasks),
        spaces=request.spaces,
        composition=request.composition,
        reference=inputs[count] if len(inputs) > count else None,
        base_name=request.base_name,
        max_invalid=evaluation.max_invalid,
        metrics=scored.chosen_by(evaluation, tasks),
        command=COMMAND.get(),
    )
    return plan, library.Runner(lambda: load_base(request), splits, settings, store, say)


def _rows(
    task: scored.ScoredTask,
    split: str,
    flags: EvaluationFlags,
    head: Mapping[str, Tensor] | None,
) -> library.Rows:
    examples = task.rows(split)
    assert examples is not None, "required when the tasks were read"
    size = flags.per_device_eval_batch_size
    return library.Rows(task.data.task, examples, task.objective, size, task.name, head)


def load_inputs(request: Request) -> list[library.Input]:
    modules = common.load_modules(request.paths, request.names, base=request.model)
    named = zip(request.names, modules, request.paths, strict=True)
    inputs = [library.read_input(*one) for one in named]
    if request.evaluation.objective != "seq2seq":
        _check_heads(request, inputs)
    return inputs


def device_key(use_cpu: bool | None) -> str:
    """The kind of device as part of a result's identity: a CPU is not named."""
    return common.device_of(use_cpu).removeprefix("cpu")


def say(line: str) -> None:
    """At once, so that a log shows how far a sweep is."""
    print(line, flush=True)


def _check_heads(request: Request, inputs: Sequence[library.Input]) -> None:
    """A module without a head would be scored with a random one."""
    if request.head not in SCORED_HEADS:
        raise UsageError.build(
            "--head",
            "a merge without a head cannot be scored"
            if request.head == "none"
            else "a merge whose head is of several tasks cannot be scored",
            found=request.head,
            expected=", ".join(SCORED_HEADS),
        )
    alone = inputs
    if request.composition == library.ANALOGY:  # a language model brings no head, and needs none
        alone = [inputs[0], *inputs[3:]]
    for module in alone:
        if not module.pem.head_tensors():
            raise IncompatibleModules.build(
                module.name,
                "has no classification head to score",
                do="use modules trained on the task, or --objective seq2seq for text to text",
            )


def load_base(request: Request) -> tuple[Any, Any]:
    import torch

    from pem_composition.evaluation import models

    if request.evaluation.objective == "seq2seq":
        base, tokenizer, _ = models.load_text_to_text(request.model)
    else:
        torch.manual_seed(0)  # the new head is replaced by the modules'; drawn alike all the same
        base, tokenizer, _ = models.load_base(request.model, request.tasks[0].answered)
    flags = request.evaluation
    return common.on_device(base, use_cpu=flags.use_cpu, bf16=flags.bf16), tokenizer


def _finish(request: Request, plan: library.Plan, summary: dict[str, Any]) -> None:
    """Write the selected modules (whole models are left to merge.py), the table and the plot."""
    from pem_composition.checkpoint import provenance

    flags, out = request.flags, request.out
    kinds = ("selected", "selected_valid")
    earlier = {out / f"{which}_{space}" for which in kinds for space in SPACES}
    for which in kinds if request.kind != "full" else ():
        for space, coefficients in summary[which].items():
            target = out / f"{which}_{space}"
            earlier.discard(target)
            merged = _selected(request, plan, space, coefficients)
            merged.save(target, format=flags.format, dtype=flags.dtype, overwrite=True)
            common.report(target, merged)
    for old in earlier:  # of another grid
        if (old / provenance.FILE).exists():
            shutil.rmtree(old)
    show(out / RESULTS, out)


def _selected(
    request: Request, plan: library.Plan, space: str, coefficients: Sequence[float]
) -> PEM:
    from pem_composition.checkpoint.adapter_transformers_write import as_reference
    from pem_composition.module import combine

    choice = request.flags.choice(request.kind)
    module = combine(
        [i.pem for i in plan.inputs],
        coefficients,
        space=space,
        method=choice.method,
        settings=choice.as_dict(),
        head=library.kept_head(plan.inputs, request.head),
        rank=request.flags.rank if space == "delta" else None,
        dtype=request.flags.dtype,
        allow_base_mismatch=True,
    )
    analogy = request.composition == library.ANALOGY
    if analogy and request.flags.format == "adapter-transformers":
        return as_reference(module)
    return module
