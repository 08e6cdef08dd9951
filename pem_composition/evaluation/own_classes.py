"""The classes that a module or a model brings: what rows of no known task mean, and in which order
the outputs answer a known one.

Empty for a regression; None where nothing is said, as by a language model or a base without head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.heads import tasks_of
from pem_composition.checkpoint.full import head_info
from pem_composition.evaluation.models import resolve, stored_config

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.config import HeadInfo
    from pem_composition.tasks.glue import Task

Classes = tuple[str, ...] | None


def of_module(header: ModuleHeader, head: str | None = None) -> Classes:
    """The classes of a module's head, or of one of its heads by name."""
    if head is None:
        return _said(header.head)
    if head in header.heads:
        return _said(header.heads[head])
    part = tasks_of(header.head).get(head)
    return tuple(part["labels"]) if part else None


def of_model(model_name_or_path: str) -> Classes:
    """The classes of a model that was saved as a sequence classifier."""
    source = resolve(model_name_or_path)
    raw = stored_config(source)
    classifies = any("SequenceClassification" in str(n) for n in raw.get("architectures") or ())
    return _said(head_info(raw)) if classifies else None


def in_order_of(task: Task, own: Classes) -> Task:
    """The task with its classes in the order of a head; as it is where the head answers others."""
    words = {word.lower(): word for word in task.labels}
    named = [word.lower() for word in own or ()]
    if len(words) < len(task.labels) or sorted(named) != sorted(words):
        return task
    return replace(task, labels=tuple(words[word] for word in named))


def order_of(task: Task, own: Classes) -> tuple[int, ...]:
    """Number of the output for each class of the task; empty where outputs are in its order."""
    answered = in_order_of(task, own).labels
    return () if answered == task.labels else tuple(map(answered.index, task.labels))


def _said(info: HeadInfo | None) -> Classes:
    if info is None or (info.problem != "regression" and not info.labels):
        return None
    return info.labels
