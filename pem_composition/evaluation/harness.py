"""Tasks of the lm-evaluation-harness, answered by a model that is loaded already.

The harness asks, filters and scores; the model stays in memory while modules are attached to it and
taken off. Seeds are the harness's defaults, so that the scores of a composition are those of

    lm_eval --model hf --model_args pretrained=BASE,peft=MODULE,dtype=float32 --tasks NAME

A result depends on the task's settings, its rows, the examples shown before a row, ``limit`` and
the harness's version; ``HarnessTask.identity`` holds them all. Standard errors are the harness's
own. It has none for perplexities of words and bytes; there the rows are drawn again with
replacement. Source: https://github.com/EleutherAI/lm-evaluation-harness.

Task files are data: one that names Python code (``!function``, ``class``, a metric from the hub) is
refused unless it belongs to the installed harness, and templates run in Jinja's sandbox.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api import metrics as aggregations
from lm_eval.api.registry import metric_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from pem_composition import checkpoint
from pem_composition.adapters import attach
from pem_composition.errors import DataError, UsageError
from pem_composition.evaluation import model_names, models
from pem_composition.evaluation.attached import device_of
from pem_composition.evaluation.metrics import BOOTSTRAP_SAMPLES, greater_is_better
from pem_composition.evaluation.standard_errors import mean
from pem_composition.safe_files import write_text

RANDOM_SEED, SEED = 0, 1234  # the harness's: of Python, and of NumPy, torch and the examples shown
NEAR = 5  # names that are proposed for one that is unknown
STDERR = "_stderr"
CODE = "!function"
FORMATS = (
    "json",
    "csv",
    "parquet",
    "text",
    "arrow",
    "xml",
)  # of files, by which datasets reads them
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.()-]{0,99}", re.ASCII)

Sample = dict[str, Any]


@dataclass(frozen=True)
class HarnessScores:
    """What a model scored on one task.

    Attributes:
        scores: value of each metric; a metric under another filter than none is METRIC,FILTER.
        stderr: the harness's standard error of each; None where it has none.
        values: of each row, what the first metric is made of.
        samples: the harness's record of each row and filter: prompt, answers, scores.
    """

    scores: dict[str, float]
    stderr: dict[str, float | None]
    values: list[Any]
    samples: list[Sample]


class HarnessTask:
    """One task with its rows, asked in one way.

    Args:
        task: the harness's own.
        num_fewshot: examples before each row; None: the task's own number.
        limit: only so many rows; None: all of them.
    """

    def __init__(
        self, name: str, task: Any, *, num_fewshot: int | None = None, limit: int | None = None
    ) -> None:
        self.name, self.limit, self._task = name, limit, task
        own = task.get_config("num_fewshot")
        if own != 0 and (num_fewshot is not None or own is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        _check_directions(name, task.higher_is_better())

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows that are scored, in order."""
        return [dict(doc) for _, doc in self._task.doc_iterator(limit=self.limit)]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores; the first is the task's own."""
        filters = [f.name for f in getattr(self._task, "_filters", ())] or ["none"]
        return tuple(_named(m, f) for f in filters for m in self._task.aggregation())

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores besides the model."""
        shown = int(self._task.get_config("num_fewshot"))
        examples = list(self._task.fewshot_docs() or ()) if shown else []
        return {
            "task": self.name,
            "rows": _digest([*self.rows, "shown", *map(dict, examples)]),
            "harness": {
                "version": version("lm_eval"),
                "task_version": str(self._task.VERSION),
                "task_hash": _digest([self._config]),
                "num_fewshot": shown,
                "limit": self.limit,
                "seed": SEED,
            },
        }

    @property
    def _config(self) -> dict[str, Any]:
        """The task's settings; where it and its rows lie decides nothing, rows are compared."""
        found = self._task.dump_config()
        said = {k: v for k, v in (found.get("metadata") or {}).items() if k != "config_source"}
        kept = {k: v for k, v in found.items() if not k.startswith("dataset_")}
        return {**kept, "metadata": said}

    @property
    def writes(self) -> bool:
        """True where the model writes text, so that its generation_config.json decides, too."""
        return str(self._task.OUTPUT_TYPE) == "generate_until"

    def answer(self, lm: Any) -> HarnessScores:
        """Ask a model made by ``language_model``.

        Raises:
            DataError: the harness cannot ask or score this task.
        """
        _seed()
        self._task.set_fewshot_seed(seed=SEED)
        loaded = {"tasks": {self.name: self._task}, "groups": {}}
        with _quiet(), _as_one_line(self.name):
            found = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=self.limit)
            return self._scores(found["results"][self.name], found["samples"][self.name])

    def _scores(self, numbers: Mapping[str, Any], samples: list[Sample]) -> HarnessScores:
        pairs = [name.split(",", 1) for name in numbers if "," in name]
        named = {_named(m, f): (m, f) for m, f in pairs if not m.endswith(STDERR)}
        errors = {name: numbers.get(f"{m}{STDERR},{f}") for name, (m, f) in named.items()}
        metric, kept = named[self.metrics[0]]
        return HarnessScores(
            {name: float(numbers[f"{m},{f}"]) for name, (m, f) in named.items()},
            {name: e if isinstance(e, float) else None for name, e in errors.items()},
            [sample[metric] for sample in samples if sample["filter"] == kept],
            samples,
        )

    def estimate(self, terms: Sequence[tuple[float, Sequence[Any]]]) -> tuple[float, float]:
        """A weighted sum of first metrics over the same rows, and its standard error.

            sum_k w_k m(values_k);   1 * own - 1 * other is a paired difference

        The error of a mean is s / sqrt(n) of the weighted sums of the rows; that of another metric
        is the standard deviation over rows drawn again with replacement.

        Args:
            terms: weights, and of each row what the metric is made of.
        """
        weights = np.asarray([weight for weight, _ in terms])
        if self.averages:
            found = mean(weights @ np.asarray([values for _, values in terms], np.float64))
            return float(found.value or 0.0), float(found.stderr or 0.0)
        rows = [[tuple(v) if isinstance(v, list) else v for v in values] for _, values in terms]
        draw, places = random.Random(SEED), range(len(rows[0]))
        drawn = [draw.choices(places, k=len(places)) for _ in range(BOOTSTRAP_SAMPLES)]

        def value(chosen: Sequence[int]) -> float:
            scores = [self._aggregation([values[i] for i in chosen]) for values in rows]
            return float(weights @ np.asarray(scores))

        return value(places), float(np.std([value(chosen) for chosen in drawn], ddof=1))

    @property
    def averages(self) -> bool:
        """True where the first metric is the mean of its values over the rows."""
        return self._aggregation is aggregations.mean

    @property
    def _aggregation(self) -> Callable[[Sequence[Any]], float]:
        found: Callable[[Sequence[Any]], float] = next(iter(self._task.aggregation().values()))
        return found


def read(
    names: Sequence[str],
    *,
    include: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> tuple[HarnessTask, ...]:
    """The tasks with their rows, in the order of their names.

    Args:
        names: tasks, groups or tags; a group stands for its tasks.
        include: folder of further task files; None: only those that the harness brings.
        num_fewshot, limit: of every task, see ``HarnessTask``; a task that says 0 keeps 0 examples.

    Raises:
        UsageError: a name that no task has; names that are near are listed.
        DataError: a folder, a task file, a name or rows that cannot be used.
    """
    with _quiet():
        manager, unknown = _manager(names, include)
    if unknown:
        near = difflib.get_close_matches(unknown, manager.all_tasks, n=NEAR, cutoff=0.5)
        places = f" or in {include}" if include else ""
        raise UsageError.build(
            "--harness_tasks", f"no task of that name in lm_eval{places}", found=unknown,
            do=f"near names: {', '.join(near)}" if near else "lm_eval ls tasks lists all names",
        )  # fmt: skip
    _sandbox()
    with _quiet(), _uncounted(), _read_anew(), _as_one_line(", ".join(names)):
        loaded = manager.load(list(names))["tasks"]
        found = tuple(
            HarnessTask(name, task, num_fewshot=num_fewshot, limit=limit)
            for name, task in loaded.items()
        )
    for task in found:
        if not FILE_NAME.fullmatch(task.name):
            raise DataError.build(
                f"--harness_tasks {task.name!r}", "samples are kept in a file of the task's name",
                expected="at most 100 of letters, digits and . _ - ( )",
                do="correct task: in its file",
            )  # fmt: skip
        if not task.rows:
            raise DataError.build(task.name, "has no rows")
    return found


def language_model(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | None = None,
    bf16: bool = False,
) -> Any:
    """The harness's view of a loaded model; it sees whatever is attached to it later.

    Args:
        batch_size: requests per forward pass; None: 1, as the harness.
        bf16: matrix products in bfloat16.
    """
    with _quiet():
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size or 1,
            mixed_precision_dtype="bfloat16" if bf16 else None,
        )


def evaluate(
    model: str | Path,
    tasks: Sequence[HarnessTask],
    *,
    adapter: str | Path | None = None,
    allow_base_mismatch: bool = False,
    use_cpu: bool = False,
    batch_size: int | None = None,
    bf16: bool = False,
) -> list[HarnessScores]:
    """Load a model, attach a module, ask every task.

    Args:
        model: a decoder or an encoder-decoder model: a folder, or a name.
        adapter: folder of the module; None: the model as it is.

    Raises:
        IncompatibleModules: the module does not fit the model.
        CheckpointError, DataError: a file or a task that cannot be used.
    """
    source = model_names.resolve(model)
    module = None if adapter is None else checkpoint.load(adapter, base=source)
    loaded, tokenizer, _ = models.load_text_to_text(source)
    loaded.to(device_of(use_cpu))
    if module is not None:
        attach(loaded, module, allow_base_mismatch=allow_base_mismatch)
    lm = language_model(loaded, tokenizer, batch_size=batch_size, bf16=bf16)
    return [task.answer(lm) for task in tasks]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """One line of JSON per row and filter, in the harness's words; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(sample, default=str, sort_keys=True) + "\n" for sample in samples]
    write_text(path, "".join(lines))


def _digest(parts: Sequence[Any]) -> str:
    """sha256 of values; of a function its name, as an address differs from run to run."""
    text = json.dumps(parts, sort_keys=True, default=lambda v: getattr(v, "__qualname__", str(v)))
    return hashlib.sha256(text.encode()).hexdigest()


def _named(metric: str, kept: str) -> str:
    return metric if kept == "none" else f"{metric},{kept}"


def _seed() -> None:
    random.seed(RANDOM_SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _check_directions(name: str, directions: Mapping[str, bool]) -> None:
    """Refuse a task that calls a metric better in the other direction than everybody else.

    Raises:
        DataError: naming it.
    """
    for metric, higher in directions.items():
        if bool(higher) != greater_is_better(metric):
            raise DataError.build(
                name, f"higher_is_better of {metric} is not the metric's own",
                found=higher, expected=not higher, do="correct the task file",
            )  # fmt: skip


# --- the harness's files ---


def _manager(names: Sequence[str], include: str | None) -> tuple[Any, str | None]:
    """An index that holds all names, or the first name that none holds.

    The harness's own index is made of 15,000 files; it is left alone where the folder has all.
    """
    if include is not None:
        if not Path(include).is_dir():
            raise DataError.build(
                f"--harness_include {include}", "no such folder",
                expected="a folder of task files (.yaml)",
            )  # fmt: skip
        for path in sorted(Path(include).rglob("*.yaml")):
            _check_plain(path, set())
        own = TaskManager(include_path=include, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own, None
    manager = TaskManager(include_path=include)
    missing = (name for name in names if name not in set(manager.all_tasks))
    return manager, next(missing, None)


def _check_plain(path: Path, seen: set[Path]) -> None:
    """Refuse a task file that names code, in itself or in what it includes.

    Raises:
        DataError: with the file and what it names.
    """
    path = path.resolve()
    if path in seen or path.is_relative_to(Path(lm_eval.__file__).parent):
        return
    seen.add(path)

    class Plain(yaml.SafeLoader):
        """YAML without objects; the harness's one tag is found by name."""

    def code(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        raise _names_code(path, f"{CODE} {node.value}")

    Plain.add_constructor(CODE, code)
    try:
        found = Plain(path.read_bytes()).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError.build(path, "not a YAML file", found=str(error)) from error
    if not isinstance(found, dict):
        raise DataError.build(path, "not a task file", expected="a mapping with task: NAME")
    if "class" in found:
        raise _names_code(path, f"class: {found['class']}")
    for metric in found.get("metric_list") or ():
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if name not in metric_registry or metric.get("hf_evaluate"):
            raise _names_code(path, f"metric: {name}", "a metric that lm_eval itself has")
    included = found.get("include") or []
    for name in [included] if isinstance(included, str) else included:
        _check_plain(path.parent / name, seen)


def _names_code(path: Path, found: str, expected: str = "YAML and templates alone") -> DataError:
    built: DataError = DataError.build(  # type: ignore[assignment]
        path, "the task names code, which is not run", found=found, expected=expected,
        do="write it without, or use a task that lm_eval brings",
    )  # fmt: skip
    return built


def _sandbox() -> None:
    """Templates come from files: let them compute with the row and reach nothing else."""
    if not isinstance(utils.env, SandboxedEnvironment):
        made = SandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True
        )
        made.filters.update(utils.env.filters)
        utils.env = made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars, prints and log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """Files of one's own are no download that the hub has to be told of."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextlib.contextmanager
def _read_anew() -> Iterator[None]:
    """Files of one's own are read each time: the cache of datasets knows them by their date."""
    cached = datasets.load_dataset

    def load(path: str, *given: Any, **options: Any) -> Any:
        own = path in FORMATS and "://" not in json.dumps(options.get("data_files"), default=str)
        if not own:
            return cached(path, *given, **options)
        with tempfile.TemporaryDirectory() as folder:
            return cached(path, *given, **options | {"cache_dir": folder, "keep_in_memory": True})

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = cached


@contextlib.contextmanager
def _as_one_line(where: str) -> Iterator[None]:
    """Whatever the harness raises over a task's files or rows, as one line.

    Raises:
        DataError: with the reason.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except StopIteration as error:  # of datasets
        raise DataError.build(
            f"--harness_tasks {where}", "has no rows", found="an empty data file",
            expected="a line for each row", do="correct data_files in the task's file",
        ) from error  # fmt: skip
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError.build(
            f"--harness_tasks {where}", "lm_eval cannot use the task",
            found=f"{type(error).__name__}: {reason}",
            do="correct the task's files; data of the hub has to be in the cache when offline",
        ) from error  # fmt: skip
