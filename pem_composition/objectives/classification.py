"""A head's logits against the class, or its one output against the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.errors import DataError
from pem_composition.evaluation.encoded import EncodedDataset, encode
from pem_composition.objectives.objective import ModelRows, Objective
from pem_composition.tasks.data import RowFiles, TaskData, load_task
from pem_composition.tasks.glue import TASKS, Reading, Task

if TYPE_CHECKING:
    from pem_composition.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Classification(Objective):
    """loss = 1/n sum_i CE(logits_i, label_i)   or   1/n sum_i (logit_i - score_i)^2.

    Attributes:
        order: number of the head's output for each class of the task; empty: in the task's order.
    """

    order: tuple[int, ...] = ()
    writes = False

    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
        return load_task(task_name, files, reading=reading)

    def content(self, task: Task) -> dict[str, Any]:
        """The class names, where no name of a task stands for them."""
        return {} if task.name in TASKS else {"labels": list(task.labels)}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return task.scores

    def described(self, task: Task) -> dict[str, Any]:
        order = {"order": list(self.order)} if self.order else {}
        return {"max_seq_length": self.max_seq_length, **order}

    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        data = encode(rows.tokenizer, rows.examples, max_seq_length=self.max_seq_length)
        check_ends(rows, data)
        return data

    def prepared(self, rows: ModelRows, layout: Mapping[str, Any]) -> Evaluator:
        from pem_composition.evaluation.evaluator import classification_evaluator

        return classification_evaluator(rows.task, self.training_rows(rows), self.order, **layout)


def check_ends(rows: ModelRows, data: EncodedDataset) -> None:
    """Refuse rows that a classifier with encoder and decoder (BART, T5) cannot read in one batch.

    It answers from the state at a row's last end token, and finds it only where all rows of a batch
    have the same number of end tokens.

    Raises:
        DataError: other rows, as of single sentences beside pairs.
    """
    if rows.decodes:
        return
    end = rows.config.eos_token_id
    counts = sorted({ids.count(end) for ids in data.inputs["input_ids"]})
    if len(counts) > 1:
        raise DataError.build(
            f"rows of {rows.task.name}",
            f"a classifier of {rows.config.model_type} cannot read them",
            found=f"{' or '.join(map(str, counts))} end tokens in a row",
            expected="equally many in every row",
            do="keep single sentences and pairs apart, take end tokens out of the texts",
        )  # fmt: skip
