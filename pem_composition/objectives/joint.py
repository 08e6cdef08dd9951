"""The rows of several tasks together: one module, one head with a part of its outputs for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from pem_composition.errors import DataError
from pem_composition.evaluation.encoded import EncodedDataset
from pem_composition.evaluation.joint_task import JointTask, joint_task
from pem_composition.objectives.classification import Classification, check_ends
from pem_composition.objectives.objective import ModelRows
from pem_composition.tasks.data import Example, RowFiles, TaskData, load_task
from pem_composition.tasks.glue import Reading


@dataclass(frozen=True)
class Joint(Classification):
    """loss = 1/n sum_i loss_t(i)(the outputs of row i's task t(i), label_i), over all rows alike.

    An epoch visits each row of each task once, mixed. What stands before the last layer of the head
    is shared. The best step is that of the largest mean of the tasks' own metrics.

    Attributes:
        names: of the tasks.
    """

    names: tuple[str, ...] = ()

    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
        """The rows of every task, one task after the other.

        Raises:
            DataError: also a split that one task alone lacks, or two tasks with one file.
        """
        task = joint_task(self.names)
        read = [load_task(name, files, reading=reading) for name in self.names]
        splits = tuple(dict.fromkeys(chain.from_iterable(data.splits for data in read)))
        for split in splits:
            places = [data.require(split) and data.sources[split] for data in read]
            if len(set(places)) < len(places):
                raise DataError.build(
                    "--joint_tasks", "several tasks read the same rows", found=places[0],
                    expected="a folder with a folder per task", do=f"give {self.names[0]} its own",
                )  # fmt: skip
        rows = {
            split: tuple(
                replace(example, label=(number, example.label))
                for number, data in enumerate(read)
                for example in data.require(split)
            )
            for split in splits
        }
        sources = {s: ", ".join(data.sources[s] for data in read) for s in splits}
        return TaskData(task, rows, sources, tuple(n for data in read for n in data.notes))

    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        encoded = [super(Joint, self).training_rows(part) for part in _apart(rows)]
        inputs = {n: [*chain(*(data.inputs[n] for data in encoded))] for n in encoded[0].inputs}
        labels: Any = tuple(
            [number, label] for number, data in enumerate(encoded) for label in data.labels
        )
        joined = EncodedDataset(inputs, labels, encoded[0].padding)
        check_ends(rows, joined)
        return joined


def _apart(rows: ModelRows) -> list[ModelRows]:
    """The rows of each task with their own labels."""
    assert isinstance(rows.task, JointTask)
    parts: list[list[Example]] = [[] for _ in rows.task.parts]
    for example in rows.examples:
        assert isinstance(example.label, tuple)
        number, label = example.label
        parts[number].append(replace(example, label=label))
    return [
        rows._replace(task=task, examples=own)
        for task, own in zip(rows.task.parts, parts, strict=True)
    ]
