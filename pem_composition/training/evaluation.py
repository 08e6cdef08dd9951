"""One model, alone or with a module, on one task: how it is loaded, what it answers, its scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers

from pem_composition import launch
from pem_composition.adapters import attach
from pem_composition.evaluation import models
from pem_composition.evaluation.attached import device_of, load_module
from pem_composition.evaluation.evaluator import Evaluator
from pem_composition.evaluation.own_classes import in_order_of
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.predictions import predictions
from pem_composition.evaluation.predictions import write as write_predictions
from pem_composition.tasks.data import Example, TaskData
from pem_composition.tasks.glue import Task
from pem_composition.training.task_model import TaskModel
from pem_composition.training.training_flags import DECODERS

if TYPE_CHECKING:
    from pem_composition.evaluation.models import LoadedBase
    from pem_composition.module import PEM


__all__ = ["Answered", "evaluate", "load_asked", "module_asked", "write_predictions"]


class Answered(NamedTuple):
    """Scores of one split, none where labels are missing, and the prediction for each row."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]


def load_asked(asked: TaskModel, task: Task) -> LoadedBase:
    """The model with a head for the task, or with its output embeddings."""
    transformers.set_seed(asked.seed)
    if asked.classifies:
        return models.load_base(asked.model, in_order_of(task, asked.own_classes))
    return models.load_text_to_text(asked.model, alone=asked.objective in DECODERS)


def module_asked(asked: TaskModel, task: Task, *, one_head: bool = True) -> PEM | None:
    """The module to attach, checked against task and base.

    Raises:
        IncompatibleModules: it belongs to another base, or its head is for another task.
    """
    return asked.adapter and load_module(  # type: ignore[return-value]
        asked.adapter, asked.model, task, head=asked.head, needs_head=one_head and asked.classifies,
        allow_base_mismatch=asked.allow_base_mismatch,
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
    module = module_asked(asked, data.task)
    device = device_of(use_cpu)
    model, tokenizer, info = load_asked(asked, data.task)
    if module is not None:
        attach(model, module, allow_base_mismatch=asked.allow_base_mismatch)
    if info["missing_keys"] and (module is None or not module.head_names):
        remedy = "" if module is None else "; the module brings none (merge with --head first|last)"
        say(f"note: the head is newly initialised (--seed {asked.seed}), not trained{remedy}")
    objective = objective.read_by(model.config, tokenizer)
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
