"""Several tasks as one that a single head answers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pem_composition.arithmetic.head_policies import side_by_side, tasks_of
from pem_composition.config import HeadInfo
from pem_composition.errors import DataError
from pem_composition.tasks.glue import Task, get_task

MEAN = "mean"  # of the tasks' own metrics


@dataclass(frozen=True)
class JointTask(Task):
    """Several tasks as one whose labels are the outputs of a head for all of them."""

    parts: tuple[Task, ...] = ()

    @property
    def head(self) -> HeadInfo:
        """The head: its labels, and which of them are each task's."""
        return side_by_side({part.name: part.labels for part in self.parts})[0]

    @property
    def spans(self) -> tuple[tuple[int, int, bool], ...]:
        """Of each task the first of its outputs, their end, and whether it is one score."""
        where = tasks_of(self.head)
        return tuple(
            (where[p.name]["start"], where[p.name]["stop"], p.regression) for p in self.parts
        )

    @property
    def scores(self) -> tuple[str, ...]:
        return (MEAN, *(f"{part.name}_{name}" for part in self.parts for name in part.scores))


def joint_task(names: Sequence[str]) -> JointTask:
    """The tasks of these names as one.

    Raises:
        DataError: an unknown task, or one in two spellings.
    """
    parts = tuple(get_task(name, "--joint_tasks") for name in names)
    if len({part.name for part in parts}) < len(parts):
        raise DataError.build(
            "--joint_tasks", "one task in two spellings", found=" ".join(names),
            expected="each task once",
        )  # fmt: skip
    task = JointTask("+".join(names), ("text", None), (), (MEAN,), MEAN, parts=parts)
    return replace(task, labels=task.head.labels)
