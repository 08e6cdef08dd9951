"""One model, alone or with a module, on one task: how it is loaded, what it answers, its scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers

from pem_composition import launch
from pem_composition.adapters import attach
from pem_composition.checkpoint import inspect_header
from pem_composition.evaluation import metrics, models
from pem_composition.evaluation.attached import device_of, load_module
from pem_composition.evaluation.evaluator import Evaluator
from pem_composition.evaluation.model_names import max_input_length
from pem_composition.evaluation.own_classes import (
    Classes,
    in_order_of,
    of_model,
    of_module,
    order_of,
)
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.predictions import predictions
from pem_composition.evaluation.predictions import write as write_predictions
from pem_composition.objectives import Objective, objective_of
from pem_composition.tasks.data import Example, RowFiles, TaskData
from pem_composition.tasks.glue import Reading, Task
from pem_composition.training.training_flags import DECODERS

if TYPE_CHECKING:
    from pem_composition.evaluation.models import LoadedBase
    from pem_composition.module import PEM


__all__ = ["Answered", "TaskModel", "evaluate", "write_predictions"]


class Answered(NamedTuple):
    """Scores of one split, none where labels are missing, and the prediction for each row."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A model, alone or with a module, and how it answers a task.

    Attributes:
        model: folder or name; ``adapter`` is the folder of a module to attach, None for none.
        head: which head of a module that has several.
        answers: how an answer in text is found; None: scoring.
        max_seq_length, block_size: tokens.
        seed: of a head that neither model nor module brings.
    """

    model: str
    adapter: str | None = None
    head: str | None = None
    objective: str = "classification"
    next_block: bool = False
    prompt: str | None = None
    template: str | None = None
    answers: str | None = None
    max_seq_length: int = 128
    block_size: int = 128
    seed: int = 42
    allow_base_mismatch: bool = False

    @property
    def classifies(self) -> bool:
        """True where a head answers."""
        return self.objective == "classification"

    @property
    def own_classes(self) -> Classes:
        """The classes of the module's head, of a whole model else."""
        if not self.classifies:
            return None
        if self.adapter is None:
            return of_model(self.model)
        return of_module(inspect_header(self.adapter), self.head)

    def objective_of(self, task: Task | None = None) -> Objective:
        """How rows are asked; with a task, for a head that answers in an order of its own."""
        return objective_of(
            self.objective, next_block=self.next_block, max_seq_length=self.max_seq_length,
            block_size=self.block_size, prompt=self.prompt, template=self.template,
            found=self.answers, order=order_of(task, self.own_classes) if task is not None else (),
        )  # fmt: skip

    def read(
        self, task_name: str | None, files: RowFiles, reading: Reading, *, scored: bool
    ) -> TaskData:
        """The rows of the splits of ``files``, all of them.

        Args:
            scored: rows are compared with their labels.

        Raises:
            DataError: rows that cannot be used, or without labels where they are to be scored.
        """
        objective = self.objective_of()
        data = objective.read(task_name, files, reading=reading)
        for split in files.splits if scored and objective.labelled else ():
            metrics.gold_labels(data.task, [example.label for example in data.require(split)])
        for split in files.splits:
            data.require(split)
        return data

    def load(self, task: Task) -> LoadedBase:
        """The model with a head for the task, or with its output embeddings."""
        transformers.set_seed(self.seed)
        if self.classifies:
            return models.load_base(self.model, in_order_of(task, self.own_classes))
        return models.load_text_to_text(self.model, alone=self.objective in DECODERS)

    def module(self, task: Task, *, one_head: bool = True) -> PEM | None:
        """The module to attach, checked against task and base.

        Raises:
            IncompatibleModules: it belongs to another base, or its head is for another task.
        """
        return self.adapter and load_module(  # type: ignore[return-value]
            self.adapter, self.model, task, head=self.head, needs_head=one_head and self.classifies,
            allow_base_mismatch=self.allow_base_mismatch,
        )  # fmt: skip


def evaluate(
    asked: TaskModel,
    data: TaskData,
    splits: Sequence[str],
    *,
    batch_size: int | None = None,
    pad: bool = False,
    predict: bool = False,
    bf16: bool = False,
    use_cpu: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Answered]:
    """Load the model, attach the module, score every row; by split the scores of ``pem train``.

    The processes of a launch share the rows.

    Args:
        pad: every example to the longest that is taken, instead of to its batch.
        predict: also the prediction for every row, which may lack labels then.

    Raises:
        IncompatibleModules: the module does not fit the model or the task.
        CheckpointError, DataError: a file, a prompt or rows that cannot be used.
    """
    launch.join_group()
    objective = asked.objective_of(data.task)
    module = asked.module(data.task)
    device = device_of(use_cpu)
    model, tokenizer, info = asked.load(data.task)
    if module is not None:
        attach(model, module, allow_base_mismatch=asked.allow_base_mismatch)
    if info["missing_keys"] and (module is None or not module.head_names):
        remedy = "" if module is None else "; the module brings none (merge with --head first|last)"
        say(f"note: the head is newly initialised (--seed {asked.seed}), not trained{remedy}")
    objective = objective.within(max_input_length(model.config, tokenizer))
    layout: dict[str, Any] = {
        "batch_size": batch_size,
        "pad_to": objective.max_seq_length if pad else None,
        "device": device,
    }
    found = {}
    with reduced(model.to(device), bf16):
        for split in splits:
            rows = data.require(split)
            evaluator = objective.evaluator(data.task, rows, tokenizer, model.config, **layout)
            answered = _answered(evaluator, model, rows, predict=predict)
            if objective.labelled and not asked.classifies and answered.scores:
                answered.scores["answers"] = asked.answers or "scoring"
            found[split] = answered
    return found


def _answered(
    evaluator: Evaluator, model: Any, rows: Sequence[Example], *, predict: bool
) -> Answered:
    """Scores of rows that have labels, and their predictions where they are asked for."""
    began = time.perf_counter()
    outputs = evaluator.predict(model)
    seconds = time.perf_counter() - began
    told = predictions(evaluator, outputs, rows) if predict else []
    if predict and any(example.label is None for example in rows):
        return Answered({}, told)
    return Answered(evaluator.report(outputs, seconds=seconds), told)
