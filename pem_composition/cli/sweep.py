"""``pem sweep`` and ``merge.py --grid ... --evaluate``: score a grid, tabulate, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import sweep as library
from pem_composition.cli import common
from pem_composition.cli.flags import HEADS, EvaluationFlags, ModuleFlags, check_dropout
from pem_composition.errors import CheckpointError, IncompatibleModules, UsageError
from pem_composition.report.records import RESULTS
from pem_composition.training.signals import StopRequest

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.module import PEM
    from pem_composition.tasks.data import TaskData

NAME = "sweep"
HELP = "score the merges (t, 1 - t) of two modules over a grid of t, in one process; table and plot"
EXAMPLES = """
  pem sweep -a runs/rte-0 runs/rte-1 -p runs/sweep --model_name_or_path roberta-base \\
      --task_name rte --validation_file dev.jsonl --test_file test.jsonl --grid 0 0.05 1
"""
MODULE_FILES = ("adapter_config.json", "config.json", "pem.json")


@dataclass(frozen=True, kw_only=True)
class Config(ModuleFlags, EvaluationFlags):
    """Flags of pem sweep."""

    grid: tuple[float, float, float] = field(
        default=(0.0, 0.05, 1.0),
        metadata={"metavar": ("START", "STEP", "STOP"), "help": "values of t"},
    )
    head: str = field(
        default="average", metadata={"choices": HEADS, "help": "which head a merge has"}
    )


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, checked as far as no tensor is needed."""

    flags: ModuleFlags
    evaluation: EvaluationFlags
    points: tuple[tuple[float, ...], ...]
    head: str
    model: str  # folder or hub name
    base_name: str  # the model as the user named it
    out: Path
    paths: tuple[str, ...]  # modules, then the reference if there is one
    names: tuple[str, ...]
    spaces: tuple[str, ...]
    kind: str
    data: TaskData


def run(config: Config) -> int:
    """Score the grid."""
    return start(config, config, config.grid, config.head)


def pairs(values: Sequence[float], modules: int) -> tuple[tuple[float, float], ...]:
    """(t, 1 - t) for every t of a grid; rounded as the grid is, so that 1 - 0.9 is 0.1.

    Raises:
        UsageError: not two modules, or no such grid.
    """
    if modules != 2:
        raise UsageError.build(
            "--grid",
            "a grid of (t, 1 - t) is over two modules",
            found=modules,
            expected=2,
            do="use --coefficients",
        )
    first, step, last = values
    return tuple((t, round(1 - t, 12)) for t in library.grid(first, step, last))


def start(
    flags: ModuleFlags, evaluation: EvaluationFlags, values: Sequence[float], head: str
) -> int:
    """Check everything that needs no tensor, then score, tabulate and plot.

    Raises:
        PEMError: flags, modules or data that cannot be used; nothing was written.
    """
    request = _check(flags, evaluation, values, head)
    plan, bench = _prepare(request)
    report = library.TEST if library.TEST in bench.splits else library.VALIDATION
    with StopRequest():  # a signal ends the sweep between lines; finished points are on disk
        summary = library.run(plan, bench, library.VALIDATION, report)
    bench.close()
    print(f"{request.out}: {bench.computed} points scored, {bench.known} known before")
    _finish(request, plan, summary)
    return 0


def _check(
    flags: ModuleFlags, evaluation: EvaluationFlags, values: Sequence[float], head: str
) -> Request:
    count = len(flags.adapters)
    points = pairs(values, count)
    model = evaluation.model_name_or_path or next(iter(flags.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to evaluate on", expected="a directory or a name"
        )
    check_dropout(flags.dropout_list, count)
    out = common.output_directory(flags, count)
    _check_output(out)
    reference = evaluation.reference_module
    paths = (*flags.adapters, *([reference] if reference else []))
    names = common.labels(flags.adapters, flags.adatasks)
    names += [common.labels(paths)[-1]] if reference else []
    headers = _headers(flags, names[:count])
    data = _read_data(evaluation)
    source = _resolve(model)
    common.check_model([source], headers, flags.allow_base_mismatch)
    spaces = _spaces(flags, headers[0])
    return Request(
        flags,
        evaluation,
        points,
        head,
        source,
        Path(model).name,
        out,
        paths,
        tuple(names),
        spaces,
        headers[0].kind,
        data,
    )


def _resolve(model: str) -> str:
    from pem_composition.evaluation.models import resolve

    return resolve(model)


def _check_output(out: Path) -> None:
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
    spaces = flags.space or library.SPACES
    if flags.rank is not None and "delta" not in spaces:
        raise UsageError.build(
            "--rank",
            "applies to delta space only",
            found=f"--space {' '.join(spaces)}",
            do="add delta",
        )
    return [
        common.read_headers(flags.adapters, names, flags, flags.adaconfig, space=space)
        for space in spaces
    ][-1]


def _spaces(flags: ModuleFlags, header: ModuleHeader) -> tuple[str, ...]:
    """Both spaces unless one is named; where they are the same sum, one."""
    spaces = tuple(flags.space) or library.SPACES
    if header.kind != "lora" and len(spaces) > 1:
        print(f"kind {header.kind}: parameter and delta space are the same sum, scored once")
        return ("parameter",)
    return spaces


def _read_data(flags: EvaluationFlags) -> TaskData:
    from pem_composition.tasks.data import load_task

    if flags.task_name is None and flags.validation_file is None and flags.data_dir is None:
        raise UsageError.build(
            "--evaluate", "no data to score on", expected="--task_name, or --validation_file"
        )
    wanted = [library.VALIDATION]
    if flags.test_file or flags.data_dir:
        wanted.append(library.TEST)
    return load_task(
        flags.task_name,
        validation_file=flags.validation_file,
        test_file=flags.test_file,
        data_dir=flags.data_dir,
        splits=tuple(wanted),
        max_eval_samples=flags.max_eval_samples,
        max_predict_samples=flags.max_eval_samples,
    )


def _prepare(request: Request) -> tuple[library.Plan, library.Bench]:
    """Load the modules; the base model waits until a point needs it."""
    inputs = _load_inputs(request)
    evaluation, data = request.evaluation, request.data
    settings = library.Settings(
        base=_fingerprint(request.model),
        task=data.task.name,
        max_seq_length=evaluation.max_seq_length or 128,
        head=request.head,
        rank=request.flags.rank,
    )
    batch_size = evaluation.per_device_eval_batch_size or 64
    splits = {
        split: library.Rows(data.task, examples, settings.max_seq_length, batch_size)
        for split, examples in data.splits.items()
        if split in (library.VALIDATION, library.TEST) and _labelled(examples)
    }
    ledger = library.Ledger(request.out / RESULTS, fresh=request.flags.overwrite)
    count = len(request.flags.adapters)
    reference = inputs[count] if len(inputs) > count else None
    plan = library.Plan(
        tuple(inputs[:count]), request.points, request.spaces, reference, request.base_name
    )
    return plan, library.Bench(lambda: _load_base(request), splits, settings, ledger, _say)


def _load_inputs(request: Request) -> list[library.Input]:
    base = request.model if request.kind == "full" else None
    modules = common.load_modules(request.paths, request.names, base=base)
    inputs = [
        library.Input(name, module, library.digest_of(path))
        for name, module, path in zip(request.names, modules, request.paths, strict=True)
    ]
    _check_heads(inputs, request.head)
    return inputs


def _fingerprint(model: str) -> str:
    from pem_composition.checkpoint import base_identity

    return base_identity(model).fingerprint or model


def _say(line: str) -> None:
    """At once, so that a log shows how far a sweep is."""
    print(line, flush=True)


def _labelled(examples: Sequence[Any]) -> bool:
    return any(e.label is not None for e in examples)


def _check_heads(inputs: Sequence[library.Input], head: str) -> None:
    """A module without a head would be scored with a random one."""
    if head == "none":
        raise UsageError.build(
            "--head",
            "a merge without a head cannot be scored",
            found="none",
            expected="average, first or last",
        )
    for module in inputs:
        if not module.pem.head_tensors():
            raise IncompatibleModules.build(
                module.name,
                "has no classification head to score",
                do="use modules trained on the task",
            )


def _load_base(request: Request) -> tuple[Any, Any]:
    import torch

    from pem_composition.evaluation.models import load_base

    torch.manual_seed(0)  # the new head is replaced by the modules' own; drawn alike all the same
    base, tokenizer, _ = load_base(request.model, request.data.task)
    on_gpu = torch.cuda.is_available() and not request.evaluation.use_cpu
    return base.to("cuda" if on_gpu else "cpu"), tokenizer


def _finish(request: Request, plan: library.Plan, summary: dict[str, Any]) -> None:
    """Write the selected modules (whole models are left to merge.py), the table and the plot."""
    from pem_composition.report import plot, table

    flags, out = request.flags, request.out
    for space, coefficients in summary["selected"].items() if request.kind != "full" else ():
        target = out / f"selected_{space}"
        merged = _selected(request, plan, space, coefficients)
        merged.save(target, format=flags.format, dtype=flags.dtype, overwrite=True)
        common.report(target, merged)
    print()
    print(table.write(out / RESULTS, out))
    for path in plot.write(out / RESULTS, out):
        print(f"plot: {path}")


def _selected(
    request: Request, plan: library.Plan, space: str, coefficients: Sequence[float]
) -> PEM:
    from pem_composition.module import combine

    return combine(
        [i.pem for i in plan.inputs],
        coefficients,
        space=space,
        head=request.head,
        rank=request.flags.rank if space == "delta" else None,
        dtype=request.flags.dtype,
        allow_base_mismatch=True,
    )
