"""``pem search``: find coefficients, method, settings and rank of a merge; table, plot, module."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import launch
from pem_composition.arithmetic.methods.registry import METHODS, SIMPLE, SUM
from pem_composition.arithmetic.statistics import FISHER, GRAM, SUBSPACE
from pem_composition.checkpoint.several import read_modules
from pem_composition.cli import common, parser, sweep
from pem_composition.cli.flags import (
    HEADS,
    MERGE_WAYS,
    MergeControlFlags,
    ModuleFlags,
    RuleFlags,
    ScoringFlags,
)
from pem_composition.cli.parser import COMMAND
from pem_composition.cli.report import show
from pem_composition.errors import Preempted, RunFailed, UsageError, close_match
from pem_composition.flag_declarations import flag, seed_flag
from pem_composition.report.records import RESULTS
from pem_composition.safe_files import json_bytes, read_json, write_bytes
from pem_composition.sweep import goals as wanted
from pem_composition.sweep import samplers, space
from pem_composition.sweep.grids import merges, union
from pem_composition.sweep.merge_search import Search, best_point, finish, work
from pem_composition.sweep.points import read_input
from pem_composition.sweep.result_store import WRITER
from pem_composition.sweep.setup import MergeSetup, report_split
from pem_composition.tasks.data import VALIDATION

if TYPE_CHECKING:
    from pem_composition.sweep.runner import Runner

NAME = "search"
HELP = "search coefficients, method, settings and rank of a merge for the best score; resumable"
EXAMPLES = """
  pem search -a runs/rte runs/mnli runs/sst2 -p runs/search --model_name_or_path minilm \\
      --task_name rte mnli sst2 --data_dir glue --head per-task --goal normalised \\
      --methods sum ties dare_ties --search density=0.1:0.9 rank=8,16 --trials 30
  pem search -a runs/a runs/b runs/c -p runs/hub --model_name_or_path t5-base --objective seq2seq \\
      --task_name rte --data_dir glue --max_eval_samples 64 --methods sum --space parameter \\
      --goal loss --penalty 0.05 --coefficients_range -1.5 1.5 --sampler cma      # LoraHub
"""
GRID = (0.0, 0.25, 1.0)
CALL = "search.json"  # how it was called, for --join
METHOD_OF = {m.needs: name for name, m in METHODS.items() if m.needs}  # by kind of statistics


@dataclass(frozen=True, kw_only=True)
class Config(ModuleFlags, ScoringFlags, RuleFlags, MergeControlFlags):
    """Flags of pem search."""

    methods: tuple[str, ...] = flag(
        (SUM,), "sum, or methods of pem methods; a study for each", metavar="METHOD"
    )
    goal: tuple[str, ...] = flag(
        (wanted.MEAN,),
        "mean, worst (task), normalised (score / own module's score), loss, or a task; "
        "two for the front between them",
        metavar="GOAL",
    )
    constraint: tuple[str, ...] = flag(
        (), 'what a result has to meet: "rte>=0.55", "invalid<=0.1"', metavar="COND"
    )
    coefficients: str = flag(
        space.EACH,
        "one per module, one for all modules, or the method's own",
        choices=(space.EACH, space.SHARED, space.FIXED),
    )
    coefficients_range: tuple[float, float] = flag(
        (0.0, 1.0), "lowest and highest coefficient", metavar="C"
    )
    grid: tuple[float, ...] = flag(
        GRID,
        "--sampler grid: START STEP STOP, as in pem sweep; of a shared coefficient its values",
        metavar="T",
    )
    search: tuple[str, ...] = flag(
        (),
        "settings and rank: density=0.1:0.9 rank=4,8,16 election=total,frequency; a "
        "grid needs steps, density=0.1:0.9:0.2",
        metavar="NAME=VALUES",
    )
    sampler: str = flag(
        samplers.TPE,
        "how candidates are chosen; all but grid need optuna",
        choices=samplers.SAMPLERS,
    )
    trials: int = flag(30, "of each study (grid: all points)", least=1)
    seed: int = seed_flag("of the sampler")
    penalty: float = flag(0.0, "goal loss: this times the mean absolute coefficient", least=0)
    workers: int = flag(1, "processes that share the trials", least=1)
    storage: str = flag(
        samplers.SQLITE,
        "where processes keep the trials: sqlite (in OUT: of one machine), journal:DIR (machines "
        "that share folders), postgresql://HOST/NAME, mysql+pymysql://HOST/NAME",
    )
    join: Path | None = flag(
        None,
        "alone: take part in the search of this OUT, from any machine that sees it, with its flags",
        metavar="OUT",
    )
    head: str = flag(
        "average",
        "which head a merge has; per-task: task i is scored with the head of module i",
        choices=HEADS,
    )
    fisher_list: tuple[str, ...] = flag(
        (), "one pem fisher file per module", short="-f", metavar="FILE"
    )
    gram_list: tuple[str, ...] = flag((), "one pem gram file per module", metavar="FILE")
    subspace_list: tuple[str, ...] = flag(
        (), "one pem gram --merge_with file per module", metavar="FILE"
    )
    compare: tuple[str, ...] = flag((), "further modules to score in the table", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join is not None:
            raise UsageError.build(
                "--join", "brings the flags of the search", do="give nothing beside it"
            )
        samplers.check_storage(self.storage)
        low, high = self.coefficients_range
        if not (low < high and math.isfinite(high - low)):
            raise UsageError.build(
                "--coefficients_range", "not a range", found=f"{low:g} {high:g}",
                expected="two finite numbers, the lower one first",
            )  # fmt: skip
        if len(self.goal) > 2:
            raise UsageError.build("--goal", "too many", found=len(self.goal), expected="1 or 2")
        if len(set(self.goal)) < len(self.goal):
            raise UsageError.build("--goal", "given twice", found=self.goal[0], do="give it once")
        if self.penalty and wanted.LOSS not in self.goal:
            raise UsageError.build(
                "--penalty", "has no effect without --goal loss", do="leave it out"
            )
        if len(self.goal) == 2 and self.sampler == samplers.CMA:
            raise UsageError.build(
                "--sampler", "CMA-ES has one goal", found="two", do="use tpe or random"
            )
        for method in self.methods:
            _check_method(method)
        for what, method in METHOD_OF.items():
            given = getattr(self, f"{what}_list")
            if bool(given) != (method in self.methods):
                raise UsageError.build(
                    f"--{what}_list", f"goes with --methods {method}", found=f"{len(given)} files",
                    do=f"give it with {method} and only then",
                )  # fmt: skip


def _check_method(name: str) -> None:
    known = (SUM, *(w for w in MERGE_WAYS if w != SIMPLE), "adapters_linear")
    if name not in known:
        remedy = close_match(name, known)
        raise UsageError.build(
            "--methods", f"unknown method {name!r}", do=remedy,
            expected=None if remedy else ", ".join(known),
        )  # fmt: skip


def expand(argv: Sequence[str]) -> list[str]:
    """The words of a search that ``--join OUT`` takes part in, as they were given there.

    Raises:
        UsageError: no search in the folder, or the place that its paths start from is not here.
    """
    words = [part for word in argv for part in word.split("=", 1)]
    if len(words) != 2 or words[0] != "--join":
        return list(argv)
    file = Path(words[1]) / CALL
    call = read_json(file) if file.is_file() else {}
    if not call:
        raise UsageError.build(
            f"--join {words[1]}", "no search to take part in", found=f"no {CALL}",
            do="give the OUT of a search that has started",
        )  # fmt: skip
    if not Path(call["folder"]).is_dir():
        raise UsageError.build(
            f"--join {words[1]}", "the folder that its paths start from is not here",
            found=call["folder"], do="start the search with absolute paths, from a shared folder",
        )  # fmt: skip
    os.chdir(call["folder"])
    WRITER.set(f"{platform.node()}-{os.getpid()}")
    return list(call["words"])


def run(config: Config) -> int:
    """Search, choose, tabulate, plot, write the best module."""
    config.check_tracker()
    setup = _check(config)
    if config.sampler != samplers.GRID:
        samplers.need_optuna()
    summary, runner, search = _searched(config, setup)
    print(f"{setup.out}: {runner.told('points scored')}")
    if not launch.is_main():
        return 0
    with runner.store.finish(summary):  # processes that share the output write in turn
        if setup.kind != "full":  # whole models are left to merge.py
            best = best_point(search, runner, summary).module(runner.settings, saved=True)
            best.save(setup.out / "best", format=config.format, dtype=config.dtype, overwrite=True)
            common.report(setup.out / "best", best)
        show(setup.out / RESULTS, setup.out, config.report_to)
    return 0


def _searched(config: Config, setup: MergeSetup) -> tuple[dict[str, Any], Runner, Search]:
    """This process's share of the trials and that of its workers; then what was found."""
    search, runner = _prepare(config, setup)
    if not WRITER.get() and launch.is_main():
        setup.out.mkdir(parents=True, exist_ok=True)
        words = shlex.split(COMMAND.get())[2:]
        write_bytes(setup.out / CALL, json_bytes({"folder": str(Path.cwd()), "words": words}))
    helpers = [_start_worker(config, place) for place in range(1, config.workers)]
    try:
        work(search, runner, VALIDATION, setup.out)
    except Preempted:
        for helper in helpers:
            helper.terminate()  # they keep what they have finished, too
        raise
    finally:
        for helper in helpers:
            helper.join()
    failed = [h.exitcode for h in helpers if h.exitcode]
    if failed:
        raise RunFailed.build(
            "--workers", "a worker failed; see above", found=f"exit code {failed[0]}",
            do="run the command again: it goes on",
        )  # fmt: skip
    summary = finish(search, runner, VALIDATION, report_split(runner))
    runner.close()
    return summary, runner, search


def _start_worker(config: Config, place: int) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(config, place))
    process.start()
    return process


def _work(config: Config, place: int) -> None:
    """What another process does: its share of the trials."""

    os.environ["LOCAL_RANK"] = str(place)  # worker i computes on device i mod n
    WRITER.set(f"{platform.node()}-{os.getpid()}")

    def body() -> int:
        setup = _check(config)
        search, runner = _prepare(config, setup)
        work(search, runner, VALIDATION, setup.out)
        return 0

    raise SystemExit(parser.guarded(body, f"pem search, worker {place}"))


def _check(config: Config) -> MergeSetup:
    """Everything that needs no tensor.

    Raises:
        PEMError: flags, modules or data that cannot be used; nothing was written.
    """
    for what, paths in _statistics(config).items():
        common.find_statistics(paths, what, len(config.adapters))
    setup = sweep.check(config, (0.0, 1.0, 1.0), config.head)
    headers = common.headers_of(config.compare, common.labels(config.compare))
    common.check_model([setup.base], headers, config.allow_base_mismatch)
    tasks = tuple(task.name for task in setup.tasks)
    own = len(tasks) == len(config.adapters)
    loss = not config.harness_tasks
    for name in config.goal:
        wanted.check_name(name, tasks, "--goal", own=own, loss=loss)
    for text in config.constraint:
        wanted.condition(text, tasks, own=own, loss=loss)
    _studies(config, setup)
    return setup


def _statistics(config: Config) -> dict[str, tuple[str, ...]]:
    """Files by the kind of statistics that they hold."""
    files = {FISHER: config.fisher_list, GRAM: config.gram_list, SUBSPACE: config.subspace_list}
    return {what: paths for what, paths in files.items() if paths}


def _studies(config: Config, setup: MergeSetup) -> tuple[space.Study, ...]:
    """What is searched for each method.

    Raises:
        UsageError: a dimension that no method has, or nothing to search.
    """
    values: tuple[float, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    if config.sampler == samplers.GRID and config.coefficients != space.FIXED:
        if config.coefficients == space.SHARED:
            values = union(config.grid)
        else:
            points = merges(config.grid, setup.count)
    low, high = config.coefficients_range
    dimensions = space.parse(config.search)
    wishes = space.Wishes(config.coefficients, low, high, values, points, dimensions)
    return space.of_methods(
        config.methods, setup.spaces, setup.kind, setup.count, wishes, config.sampler
    )


def _prepare(config: Config, setup: MergeSetup) -> tuple[Search, Runner]:
    """The search and its runner; the base model waits until a point needs it."""
    plan, runner = setup.prepare(common.say)
    inputs = list(plan.inputs)
    for what, paths in _statistics(config).items():
        own = common.read_statistics(paths, what)
        inputs = [
            replace(i, statistics={**i.statistics, what: s})
            for i, s in zip(inputs, own, strict=True)
        ]
    tasks = plan.tasks
    own_modules = len(tasks) == len(inputs)
    names = common.labels(config.compare)
    compared = read_modules(config.compare, names, base=setup.base)
    search = Search(
        inputs=tuple(inputs),
        studies=_studies(config, setup),
        tasks=tasks,
        goals=tuple(wanted.Goal(g, config.penalty) for g in config.goal),
        conditions=tuple(wanted.condition(t, tasks, own=own_modules) for t in config.constraint),
        trials=config.trials,
        sampler=config.sampler,
        seed=config.seed,
        own=own_modules,
        spaces=setup.spaces,
        compare=tuple(
            read_input(*one) for one in zip(names, compared, config.compare, strict=True)
        ),
        base_name=plan.base_name,
        metrics=plan.metrics,
        command=plan.command,
        controls=plan.controls,
        rule=plan.rule,
        storage=config.storage,
        statistics={METHOD_OF[what]: paths for what, paths in _statistics(config).items()},
    )
    return search, runner
