"""Losses that are means over the labels of the global batch, whatever the number of processes.

Shapes: B rows of this process, S target tokens, C classes or words; n real labels of the global
batch. A label that is IGNORED (of a filler row, or behind a target's end) counts nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pem_composition.evaluation.encoded import IGNORED
from pem_composition.evaluation.joint_task import JointTask
from pem_composition.tasks.glue import Task


def loss_of(task: Task, *, words: bool) -> Callable[..., Tensor]:
    """The loss of a task whose answers are words, or of its own kind."""
    if isinstance(task, JointTask):
        return functools.partial(of_tasks, spans=task.spans)
    return squared_error if task.regression and not words else cross_entropy


def cross_entropy(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """sum_i CE(logits_i, label_i) / n;  logits (B, C) and labels (B,), or (B, S, C) and (B, S).

    With smoothing e the target is (1 - e) of the label and e of the mean over all C.
    """
    total = F.cross_entropy(
        outputs["logits"].float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / _count(labels, num_items_in_batch)


def squared_error(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """sum_i (logit_i - score_i)^2 / n;  logits (B, 1), labels (B,)."""
    errors = outputs["logits"].float().squeeze(-1) - labels.float()
    return (errors.square() * labels.ne(IGNORED)).sum() / _count(labels, num_items_in_batch)


def of_tasks(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    spans: Sequence[tuple[int, int, bool]],
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean over rows of several tasks, of each row the loss of its task's outputs alone.

    logits (B, C); labels (B, 2): number of the task, and class or score within it, so that a row
    counts two labels.

    Args:
        spans: of each task first output, end, and whether it is one score.
    """
    logits = outputs["logits"].float()
    total = logits.new_zeros(())
    for number, (start, stop, regression) in enumerate(spans):
        rows = labels[:, 0] == number
        own, given = {"logits": logits[rows, start:stop]}, labels[rows, 1]
        if regression:
            total = total + squared_error(own, given, 1)
        else:
            total = total + cross_entropy(own, given.long(), 1, label_smoothing=label_smoothing)
    return 2 * total / _count(labels, num_items_in_batch)


def _count(labels: Tensor, given: Tensor | int | None) -> Tensor | int:
    """At least 1: in a batch of prompts that fill their length no label counts; its loss is 0."""
    count = labels.ne(IGNORED).sum() if given is None else given
    return max(count, 1) if isinstance(count, int) else count.clamp(min=1)
