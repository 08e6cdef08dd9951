"""``negation.py --grid ... --evaluate``: negate, generate, judge, perplexity at every strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pem_composition import launch
from pem_composition.cli import common
from pem_composition.cli import flags as shared
from pem_composition.cli.asking import LOCAL, BackendFlags
from pem_composition.cli.parser import COMMAND
from pem_composition.cli.report import show
from pem_composition.cli.texting import BatchFlags, JudgeFlags, PromptFlags, WindowFlags
from pem_composition.errors import UsageError
from pem_composition.evaluation.model_names import resolve
from pem_composition.flag_declarations import flag
from pem_composition.report.records import RESULTS
from pem_composition.sweep import grids, subtraction, tasks
from pem_composition.sweep.setup import MergeSetup, check_results_directory
from pem_composition.training.training_flags import TrackerFlags


@dataclass(frozen=True, kw_only=True)
class MeasureFlags(PromptFlags, JudgeFlags, WindowFlags, BatchFlags, BackendFlags, TrackerFlags):
    """What each strength is put through: prompts, judges, a text to predict."""

    model_name_or_path: str | None = flag(None, "base model: a directory or a name")
    num_samples: int = flag(100, "texts per prompt", least=1)
    perplexity_file: str = flag("wikitext2", "text to predict, as --text_file of pem perplexity")
    guard_file: str | None = flag(
        None,
        "text by which the strength is chosen (default: the first half of --perplexity_file, whose "
        "second half is reported)",
    )
    perplexity_tokens: int | None = flag(
        None, "only the first N tokens of each (default: all)", least=2
    )


@dataclass(frozen=True, kw_only=True)
class UnlearningFlags(shared.ModelFlags, MeasureFlags, shared.HarnessFlags):
    """A module, and what a grid of its negations is put through."""

    grid: tuple[float, ...] | None = flag(
        None, "START STEP STOP, or several such ranges: one negation per strength", metavar="S"
    )
    evaluate: bool = flag(False, "measure the strengths of the grid instead of writing modules")

    NEEDS: ClassVar = {
        "evaluate": (*shared.names_of(MeasureFlags), *shared.names_of(shared.HarnessFlags)),
        "prompt_file": ("max_prompts",),
        **BackendFlags.BACKEND_NEEDS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate:
            if self.grid is None:
                raise UsageError.build(
                    "--evaluate", "no strengths to measure", expected="--grid START STEP STOP",
                    do="add --grid 0 0.1 1",
                )  # fmt: skip
            self.check_harness("prompt", "prompt_file", "guard_file")
            if self.harness_tasks and self.backend != LOCAL:
                raise UsageError.build(
                    "--backend", "the harness's tasks are scored by the model that is loaded here",
                    found=self.backend, do="leave it out",
                )  # fmt: skip
            if not self.harness_tasks:
                self.check_prompts()


def start(config: UnlearningFlags) -> int:
    """Check everything that needs no tensor, then measure, tabulate and plot.

    Raises:
        PEMError: flags, module, prompts or text that cannot be used; nothing was written.
    """
    assert config.grid is not None, "checked with the flags"
    config.check_tracker()
    strengths = grids.strengths(config.grid)
    shared.check_dropout(config.dropout_list, 1)
    for name in ("space", "rank"):
        if getattr(config, name):
            raise UsageError.build(
                f"--{name}", "a sweep has one kind of negation, -s dW, exact in both spaces",
                do="leave it out, or write modules without --evaluate",
            )  # fmt: skip
    out = common.output_directory(config, 1)
    check_results_directory(out)
    (path,), (label,) = config.adapters, common.labels(config.adapters, config.adatasks)
    (header,) = common.read_headers([path], [label], config, config.adaconfig)
    model = config.model_name_or_path or next(iter(config.model), None)
    if model is None:
        raise UsageError.build(
            "--model_name_or_path", "no base model to measure", expected="a directory or a name"
        )
    base = resolve(model)
    common.check_model([base], [header], config.allow_base_mismatch)
    if config.harness_tasks:
        places = {"base": base, "base_name": Path(model).name, "out": out, "name": label}
        return _on_tasks(config, strengths, header.kind, **places)

    from pem_composition.sweep import unlearning as library

    backend = config.text_backend(model, out)
    prompts = config.prompts(config.decoding(), config.rows_at_once(config.batch_size))
    text, guard = library.read_texts(
        config.perplexity_file, config.guard_file, config.windows, config.perplexity_tokens
    )
    plan = library.StrengthPlan(
        strengths, config.threshold, config.max_ppl_increase, Path(model).name, COMMAND.get()
    )
    summary, runner = library.measure(
        plan, path, label, base=base, prompts=prompts, text=text, guard=guard, judges=config.judge,
        out=out, bf16=config.bf16, use_cpu=config.use_cpu, dtype=config.dtype,
        fresh=config.overwrite, backend=backend, say=common.say,
    )  # fmt: skip
    store, chosen = runner.store, summary["selected"]
    print(f"{out}: {store.computed} parts computed, {store.known} known before")
    if not launch.is_main():
        return 0
    with store.finish(summary):  # processes that share the output write in turn
        if chosen is not None and header.kind != "full":  # whole models are left to negation.py
            target, module = out / f"negated_{chosen:.12g}", runner.module(chosen)
            module.save(target, format=config.format, dtype=config.dtype, overwrite=True)
            common.report(target, module)
        show(out / RESULTS, out, config.report_to)
    return 0


def _on_tasks(
    config: UnlearningFlags, strengths: Sequence[float], kind: str, *, name: str, out: Path,
    **places: str,
) -> int:  # fmt: skip
    """The strengths on tasks of the harness, say one to forget and one to keep."""
    scoring = tasks.Scoring(
        harness_tasks=config.harness_tasks or (), harness_options=config.harness_options,
        batch_size=config.batch_size, bf16=config.bf16,
    )  # fmt: skip
    setup = MergeSetup(
        out=out, paths=config.adapters, names=(name,), count=1, kind=kind, scoring=scoring,
        tasks=tasks.read(scoring, out=out), points=tuple((-s,) for s in strengths),
        spaces=(subtraction.SPACE,), choice=config.choice(kind), bf16=config.bf16,
        use_cpu=config.use_cpu, overwrite=config.overwrite, command=COMMAND.get(), **places,
    )  # fmt: skip
    plan, runner = setup.prepare(common.say)
    summary = subtraction.run(plan, runner)
    runner.close()
    print(f"{out}: {runner.told('strengths scored')}")
    if not launch.is_main():
        return 0
    with runner.store.finish(summary):  # processes that share the output write in turn
        show(out / RESULTS, out, config.report_to)
    return 0
