"""The classes that a module or a model brings: what rows of no known task mean, and in which order
the outputs answer a known one.

Empty for a regression; None where nothing is said, as by a language model or a base without head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.head_policies import OUTPUT_MODULES, own_head, tasks_of
from pem_composition.checkpoint.full import head_info
from pem_composition.config import HeadInfo
from pem_composition.evaluation.model_names import local_config, resolve

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.module import PEM
    from pem_composition.tasks.glue import Task

Classes = tuple[str, ...] | None
DEFAULT_OUTPUTS = 2  # of a classifier whose config.json names no class


def of_module(header: ModuleHeader, head: str | None = None) -> Classes:
    """The classes of a module's head, or of one of its heads by name."""
    if head is None:
        return _said(header.head, _outputs(header.head_shapes))
    if head in header.heads:
        return _said(header.heads[head])
    part = tasks_of(header.head).get(head)
    return tuple(part["labels"]) if part else None


def of_loaded(module: PEM) -> Classes:
    """The classes of a loaded module's own head."""
    shapes = {name: tuple(tensor.shape) for name, tensor in own_head(module).items()}
    return _said(module.head, _outputs(shapes))


def answer(own: Classes, labels: Sequence[str], *, unsaid: bool = True) -> bool:
    """True if the outputs of a head are a task's: as many, and of its classes in its order, as far
    as these are named; or both are a score.

    Args:
        own: the head's classes.
        unsaid: what counts for a head that says nothing.

    Examples:
        >>> answer(("LABEL_0", "LABEL_1"), ("no", "yes")), answer(("yes", "no"), ("no", "yes"))
        (True, False)
        >>> answer((), ("no", "yes")), answer((), ()), answer(None, ("no", "yes"))
        (False, True, True)
    """
    if own is None:
        return unsaid
    return len(own) == len(labels) and HeadInfo(own).fits(labels)


def of_model(model_name_or_path: str) -> Classes:
    """The classes of a model that was saved as a sequence classifier."""
    source = resolve(model_name_or_path)
    raw = local_config(source)
    if raw is None:
        from pem_composition.evaluation.models import stored_config

        raw = stored_config(source)
    classifies = any("SequenceClassification" in str(n) for n in raw.get("architectures") or ())
    return _said(head_info(raw), DEFAULT_OUTPUTS) if classifies else None


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


def _outputs(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many outputs a head of these parameters has; 0 where it has no output layer."""
    widths = {
        shape[0]
        for name, shape in shapes.items()
        if len(shape) == 2 and name.split(".")[-2:-1] and name.split(".")[-2] in OUTPUT_MODULES
    }
    return widths.pop() if len(widths) == 1 else 0


def _said(info: HeadInfo | None, outputs: int = 0) -> Classes:
    """The names of the classes; numbered ones, as transformers gives, for outputs without names."""
    if info is None or info.problem == "regression":
        return None if info is None else ()
    numbered = tuple(f"LABEL_{i}" for i in range(outputs))
    return info.labels or (numbered if info.problem == "classification" else ()) or None
