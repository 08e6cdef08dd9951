"""The tasks that modules are scored on: their rows, and how modules answer them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint.several import short_paths
from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.evaluation.own_classes import (
    Classes,
    answer,
    in_order_of,
    of_module,
    order_of,
)
from pem_composition.merging.penalties import check_enough, counted
from pem_composition.objectives import Objective, objective_of
from pem_composition.sweep import goals
from pem_composition.sweep.points import PER_TASK
from pem_composition.sweep.rows import Rows
from pem_composition.tasks.data import TEST, TRAIN, VALIDATION, RowFiles
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.glue import Reading
from pem_composition.tasks.prompts import get_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.tasks.data import Example, TaskData
    from pem_composition.tasks.glue import Task
    from pem_composition.tasks.prompts import Prompt


AS_THEY_STAND = Reading()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which rows modules are scored on, and how they answer.

    Attributes:
        task_name, validation_file, test_file, train_file: one value per task.
        data_dir, prompt: likewise, or one value for all tasks.
        next_block: the rows are a domain's text.
        template: how instructions are written down, for all tasks.
        max_seq_length, block_size: tokens.
        batch_size: rows per forward pass; None: by the device.
        metrics: what selects: one, or one per task; none: each task's own.
        max_invalid: see ``engine.Plan``.
        refit: training rows of each task that new last layers are fitted on.
        refit_select: points are chosen by their scores with new last layers.
        harness_tasks: tasks of the lm-evaluation-harness instead of rows; the options beside it
            are those of ``evaluation.harness.read``.
    """

    objective: str = "classification"
    next_block: bool = False
    task_name: Sequence[str] | None = None
    validation_file: Sequence[str] | None = None
    test_file: Sequence[str] | None = None
    train_file: Sequence[str] | None = None
    data_dir: Sequence[str] | None = None
    prompt: Sequence[str] | None = None
    template: str | None = None
    reading: Reading = AS_THEY_STAND
    max_seq_length: int = 128
    block_size: int = 128
    max_eval_samples: int | None = None
    batch_size: int | None = None
    metrics: Sequence[str] = ()
    max_invalid: float | None = None
    harness_tasks: Sequence[str] = ()
    harness_options: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    refit: int | None = None
    refit_select: bool = False

    @property
    def by_head(self) -> bool:
        """True where modules answer by a classification head."""
        return self.objective == "classification" and not self.harness_tasks


@dataclass(frozen=True)
class ScoredTask:
    """One task's rows and how they are asked.

    Attributes:
        name: what the user calls it; no other task of the run is called so.
        objective: how the rows become inputs and outputs become scores.
        prompt: text to text with answers: the template; else None.
        own: the classes of the head that answers, where it says them.
    """

    name: str
    data: TaskData
    objective: Objective
    prompt: Prompt | None
    own: Classes = None

    @property
    def answered(self) -> Task:
        """The task with its classes in the order of the head."""
        return in_order_of(self.data.task, self.own)

    def rows(self, split: str) -> tuple[Example, ...] | None:
        """Rows that can be scored; None where the split is missing or its labels are hidden."""
        examples = self.data.splits.get(split)
        if examples is None or not self.objective.labelled:
            return examples
        return examples if any(e.label is not None for e in examples) else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names by which points can be chosen."""
        answered = ("exact_match",) if self.prompt is not None else ()
        return tuple(dict.fromkeys((*self.data.task.scores, *answered, "loss")))

    def scored(self, split: str, batch_size: int | None, head: Mapping[str, Tensor] | None) -> Rows:
        """The rows of one split, to be prepared for a model.

        Args:
            head: the task's own; None for the one that a module brings.
        """
        examples = self.rows(split)
        assert examples is not None, "required when the tasks were read"
        return Rows(self.data.task, examples, self.objective, batch_size, self.name, head)


def read(
    scoring: Scoring,
    headers: Sequence[ModuleHeader] = (),
    *,
    own_heads: bool = False,
    say: Callable[[str], None] = print,
    out: Path | None = None,
) -> tuple[Any, ...]:
    """Rows and prompt of every task: a ``ScoredTask`` each, or what stands for one.

    Args:
        headers: the modules, whose heads name the classes of rows of no known task.
        own_heads: every task is scored with a head of its own, so their classes may differ: that of
            module i for task i.
        out: folder of the results, where samples of the harness's tasks are kept.

    Raises:
        UsageError: no rows named, values that do not belong to one number of tasks, or tasks that
            no common head answers.
        DataError: rows or a prompt that cannot be used.
    """
    if scoring.harness_tasks:
        found = _of_harness(scoring, out, own_heads=own_heads)
    else:
        found = _of_rows(scoring, headers, own_heads=own_heads, say=say)
    for task in found:
        if task.name in goals.OVER_TASKS:
            raise UsageError.build(
                "the name of a task", "means something else in tables and goals", found=task.name,
                expected=f"none of {', '.join(goals.OVER_TASKS)}", do="call the task otherwise",
            )  # fmt: skip
    return found


def _of_rows(
    scoring: Scoring,
    headers: Sequence[ModuleHeader],
    *,
    own_heads: bool,
    say: Callable[[str], None],
) -> tuple[ScoredTask, ...]:
    """The tasks of rows that were named."""
    places = _places(scoring)
    own = _own_classes(scoring, headers, len(places), own_heads=own_heads)
    found = [(_read(scoring, place, o), place) for place, o in zip(places, own, strict=True)]
    for data, _ in found:
        for note in data.notes:
            say(f"note: {note}")
    names = _names(found)
    tasks = []
    for name, (data, place), classes in zip(names, found, own, strict=True):
        objective = _objective(scoring, place, order_of(data.task, classes))
        asked = objective.labelled and not scoring.by_head
        prompt = get_prompt(data.task, place["prompt"]) if asked else None
        tasks.append(ScoredTask(name, data, objective, prompt, classes))
    if scoring.by_head and not own_heads:
        _check_one_head(tasks)
    return tuple(tasks)


def _of_harness(scoring: Scoring, out: Path | None, *, own_heads: bool) -> tuple[Any, ...]:
    """The harness's tasks, which have their rows and metrics as a ``ScoredTask`` has them."""
    from pem_composition.sweep import harness_rows

    if own_heads:
        raise UsageError.build(
            "--head", "tasks of the harness are answered without a head", found=PER_TASK,
            do="leave it out",
        )  # fmt: skip
    assert out is not None, "samples are kept"
    return harness_rows.read(
        scoring.harness_tasks, out, batch_size=scoring.batch_size, bf16=scoring.bf16,
        **scoring.harness_options,
    )  # fmt: skip


def training_rows(scoring: Scoring, tasks: Sequence[ScoredTask]) -> tuple[tuple[Example, ...], ...]:
    """Of each task the rows that new last layers are fitted on, as ``pem refit`` reads them.

    Raises:
        UsageError: tasks that no head answers, or no training rows named.
        DataError: training rows that cannot be used, or too few of a class.
    """
    if scoring.refit is None:
        return ()
    if not scoring.by_head:
        raise UsageError.build(
            "--refit", "fits last layers of classification heads, and these tasks have none",
            do="leave it out",
        )  # fmt: skip
    found = []
    for task, place in zip(tasks, _places(scoring), strict=True):
        if not any(place[name] for name in ("train_file", "data_dir", "task_name")):
            raise UsageError.build(
                "--refit", f"no training rows of {task.name}", expected="--train_file or --data_dir"
            )
        files = RowFiles(
            train_file=place["train_file"], data_dir=place["data_dir"], splits=(TRAIN,),
            max_train_samples=scoring.refit,
        )  # fmt: skip
        reading = replace(scoring.reading, own=task.own)
        data = task.objective.read(place["task_name"], files, reading=reading)
        rows = data.require(TRAIN)
        check_enough(
            counted((example.label for example in rows), data.task.labels),
            where=f"--refit {scoring.refit}: {task.name}", do="give more rows",
        )  # fmt: skip
        found.append(rows)
    return tuple(found)


def check_own_heads(
    scoring: Scoring, tasks: Sequence[ScoredTask], headers: Sequence[ModuleHeader]
) -> None:
    """Module i must bring a head for task i.

    Raises:
        UsageError: text to text, or not one task per module.
        IncompatibleModules: a module without a head, or with that of another task.
    """
    if not scoring.by_head:
        raise UsageError.build(
            "--head", "text to text has no heads", found="per-task", do="leave it out"
        )
    if len(tasks) != len(headers):
        raise UsageError.build(
            "--head per-task",
            "task i is scored with the head of module i",
            found=f"{len(tasks)} tasks for {len(headers)} modules",
            expected="one task per module, in the same order",
        )
    for task, header in zip(tasks, headers, strict=True):
        wanted, found = task.answered.labels, of_module(header)
        if not header.head_shapes or not answer(found, wanted):
            raise IncompatibleModules.build(
                f"{header.name} for {task.name}",
                "the module's head does not answer the task",
                found="no head" if found is None else ", ".join(found) or "a score",
                expected=", ".join(wanted) or "a score",
                do="give modules and tasks in the same order",
            )


def check_labels(headers: Sequence[ModuleHeader], tasks: Sequence[ScoredTask]) -> None:
    """The head that a module brings must answer every task's classes, all in one order.

    Raises:
        IncompatibleModules: with both orders; a module that does not say its classes is taken.
    """
    for header in headers:
        for task in tasks:
            wanted, found = task.answered.labels, of_module(header)
            if not answer(found, wanted):
                raise IncompatibleModules.build(
                    f"{header.name} for {task.name}",
                    "the module's head has other classes, or in another order",
                    found=", ".join(found or ()) or "a score",
                    expected=", ".join(wanted) or "a score",
                    do="score it on the task it was trained on, in rows that have every class",
                )


def check_joint(headers: Sequence[ModuleHeader], tasks: Sequence[ScoredTask]) -> None:
    """A module of all tasks must bring a head for each: under the task's name, or one for all.

    Raises:
        IncompatibleModules: naming the first task without one.
    """
    for header in headers:
        for task in tasks:
            wanted, own = task.answered.labels, of_module(header, task.name)
            found = of_module(header) if own is None else own
            if (own is None and not header.head_shapes) or not answer(found, wanted):
                raise IncompatibleModules.build(
                    f"{header.name} for {task.name}", "no head of the module answers the task",
                    found=", ".join(header.heads) or ", ".join(found or ()) or "no head",
                    expected=", ".join(wanted) or "a score",
                    do="pem train --joint_tasks TASK TASK ... trains one, pem refit --task_name "
                    "TASK TASK ... gives it a head per task",
                )  # fmt: skip


def report_split(tasks: Sequence[ScoredTask], say: Callable[[str], None] = print) -> str:
    """The split of the table: test where every task has labelled test rows, else validation."""
    lacking = [task.name for task in tasks if task.rows(TEST) is None]
    if lacking and len(lacking) < len(tasks):
        say(
            f"note: {', '.join(lacking)} without labelled test rows: the table is on the "
            "validation rows of every task"
        )
    return VALIDATION if lacking else TEST


def chosen_by(scoring: Scoring, tasks: Sequence[ScoredTask]) -> tuple[str, ...]:
    """For each task the metric that selects; empty: their own.

    Raises:
        UsageError: not one metric or one per task, or none that the task has.
    """
    given = [name.removeprefix("eval_") for name in scoring.metrics]
    if not given:
        return ()
    where = "--metric_for_best_model"
    if len(given) not in (1, len(tasks)):
        raise UsageError.build(
            where, "one value, or one per task, is needed", found=len(given), expected=len(tasks)
        )
    names = tuple(given * len(tasks) if len(given) == 1 else given)
    for task, name in zip(tasks, names, strict=True):
        if name not in task.metrics:
            raise UsageError.build(
                where, f"no metric of {task.name}", found=name, expected=", ".join(task.metrics)
            )
    return names


Place = dict[str, Any]  # the values of one task


def _places(scoring: Scoring) -> list[Place]:
    """The values of each task; a data_dir or a prompt given once is for all tasks."""
    names = ("task_name", "validation_file", "test_file", "train_file")
    own = {n: getattr(scoring, n) for n in names}
    shared = {n: getattr(scoring, n) for n in ("data_dir", "prompt")}
    first = next((n for n, values in own.items() if values), None)
    if first in (None, "test_file") and not scoring.data_dir:
        raise UsageError.build(
            "--evaluate", "no data to score on", expected="--task_name, or --validation_file"
        )
    count = len(own[first]) if first else 1
    for name, values in (own | shared).items():
        if values and len(values) != count and not (name in shared and len(values) == 1):
            raise UsageError.build(
                f"--{name}",
                "one value per task is needed",
                found=len(values),
                expected=f"{count} (as many as --{first})" if first else 1,
            )
    spread = {n: v * count if v and len(v) == 1 else v for n, v in (own | shared).items()}
    return [{n: v[i] if v else None for n, v in spread.items()} for i in range(count)]


def _own_classes(
    scoring: Scoring, headers: Sequence[ModuleHeader], count: int, *, own_heads: bool
) -> list[Classes]:
    """For each task the classes of the head that answers it; None in text to text."""
    if not scoring.by_head:
        return [None] * count
    heads = [of_module(header) for header in headers]
    if own_heads:
        return [*heads, *[None] * count][:count]
    return [next((head for head in heads if head is not None), None)] * count


def _objective(scoring: Scoring, place: Place, order: tuple[int, ...] = ()) -> Objective:
    return objective_of(
        scoring.objective,
        next_block=scoring.next_block,
        max_seq_length=scoring.max_seq_length,
        block_size=scoring.block_size,
        prompt=place["prompt"],
        template=scoring.template,
        order=order,
    )


def _read(scoring: Scoring, place: Place, own: Classes) -> TaskData:
    data = _objective(scoring, place).read(
        place["task_name"],
        RowFiles(
            **{n: place[n] for n in ("validation_file", "test_file", "data_dir")},
            splits=(VALIDATION, TEST),
            max_eval_samples=scoring.max_eval_samples,
            max_predict_samples=scoring.max_eval_samples,
        ),
        reading=replace(scoring.reading, own=own),
    )
    data.require(VALIDATION)
    return data


def _names(found: Sequence[tuple[TaskData, Place]]) -> list[str]:
    """Task names; where two agree, with the files that tell their rows apart."""
    names = [
        (place["task_name"] if data.task == LANGUAGE else None) or data.task.name
        for data, place in found
    ]
    if len(set(names)) == len(names):
        return names
    sources = short_paths([data.sources[VALIDATION] for data, _ in found])
    named = [f"{name} ({source})" for name, source in zip(names, sources, strict=True)]
    distinct = len(set(named)) == len(named)
    return named if distinct else [f"{name} {i}" for i, name in enumerate(named, start=1)]


def _check_one_head(tasks: Sequence[ScoredTask]) -> None:
    """A model has one head, so tasks that are scored together need one set of classes."""
    first = tasks[0].data.task
    for other in tasks[1:]:
        task = other.data.task
        if task.labels != first.labels:
            raise UsageError.build(
                "--task_name",
                f"{tasks[0].name} and {other.name} need different heads, and a model has one",
                found=" ".join(task.labels) or "a score",
                expected=" ".join(first.labels) or "a score",
                do="give each its own module's head (--head per-task of pem sweep and pem search), "
                "or train text to text (--objective seq2seq)",
            )
