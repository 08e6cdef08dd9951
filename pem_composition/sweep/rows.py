"""The rows of one task and split: prepared once, then scored for any weights of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pem_composition.evaluation.keys import rows_digest, task_content
from pem_composition.objectives.classification import Classification

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.evaluator import Evaluator
    from pem_composition.objectives import Objective
    from pem_composition.tasks.data import Example
    from pem_composition.tasks.glue import Task

Record = Mapping[str, Any]


class Rows:
    """Rows of a task, how they are asked, and records of how modules answered.

    Args:
        batch_size: rows per forward pass; None: 16 on a CPU, 64 on a GPU.
        name: what to call the task, where another one of that name is scored beside it.
        head: the task's own head by parameter name, for tasks that no common head answers; None
            for the one that a module brings.

    Raises:
        DataError: a row without the label that it is scored by.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        objective: Objective,
        batch_size: int | None = None,
        name: str | None = None,
        head: Mapping[str, Tensor] | None = None,
    ) -> None:
        from pem_composition.evaluation.metrics import gold_labels

        self.task, self.examples, self.objective = task, examples, objective
        self.batch_size, self.name, self.head = batch_size, name or task.name, head
        labels = [e.label for e in examples]
        self.labels = gold_labels(task, labels) if objective.labelled else None
        self.identity = {
            **task_content(task),
            **objective.described(task),
            "rows": rows_digest(examples),
            **identity_of(head),
        }
        self._evaluator: Evaluator | None = None
        self._draws: dict[str, NDArray[Any]] = {}

    def class_shares(self) -> tuple[float, ...]:
        """Share of the rows per class, in the task's order; none where rows have no class or a
        class has no row."""
        if self.labels is None or not self.task.labels:
            return ()
        counts = [int((self.labels == place).sum()) for place in range(len(self.task.labels))]
        return tuple(count / len(self.labels) for count in counts) if all(counts) else ()

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Evaluator:
        """Tokenise and pad the rows; the second call gives the same evaluator.

        Raises:
            DataError: rows that cannot be asked of this model.
        """
        if self._evaluator is None:
            self._evaluator = self._evaluator_of(self.objective, self.examples, model, tokenizer)
        return self._evaluator

    def for_head(
        self, examples: Sequence[Example], model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Evaluator, tuple[int, ...]]:
        """Other rows of the task, asked alike, whose outputs are in the order of the head; and the
        number of the output for each class, empty where that is the task's order."""
        objective = self.objective
        assert isinstance(objective, Classification), "heads belong to classification"
        plain = replace(objective, order=())
        return self._evaluator_of(plain, examples, model, tokenizer), objective.order

    def _evaluator_of(
        self,
        objective: Objective,
        examples: Sequence[Example],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Evaluator:
        device = next(model.parameters()).device
        return objective.evaluator(
            self.task, examples, tokenizer, model.config, batch_size=self.batch_size,
            device=device,
        )  # fmt: skip

    def evaluate(
        self,
        model: nn.Module,
        _partial: object = None,
        _key: str = "",
        *,
        bf16: bool = False,
        head: Mapping[str, Tensor] | None = None,
        prior_matched: bool = False,
        shares: Sequence[float] = (),
    ) -> dict[str, Any]:
        """Score, standard error, predictions and what else a record holds of an evaluation.

        Args:
            head: what answers, instead of the task's own.
            prior_matched: answers are weighted for a mean of ``shares``, none for a uniform one
                (``Evaluator.prior_matched``).
        """
        outputs = self.predict(model, bf16=bf16, head=head)
        if prior_matched:
            assert self._evaluator is not None, "prepare comes first"
            outputs = self._evaluator.prior_matched(outputs, shares)
        return self.result(outputs)

    def predict(
        self, model: nn.Module, *, bf16: bool = False, head: Mapping[str, Tensor] | None = None
    ) -> NDArray[Any]:
        """The model's outputs (n, k) on the rows, with a head or the task's own."""
        evaluator = self._evaluator
        assert evaluator is not None, "prepare comes first"
        with self.answering(model, self.head if head is None else head, bf16=bf16):
            return evaluator.predict(model)

    def answering(
        self, model: nn.Module, head: Mapping[str, Tensor] | None, *, bf16: bool
    ) -> AbstractContextManager[None]:
        """The model as it answers: with a head in the place of its own, in its precision."""
        assert self._evaluator is not None, "prepare comes first"
        return self._evaluator.answering(model, head, bf16=bf16)

    def ensemble(self, outputs: Sequence[tuple[float, NDArray[Any]]]) -> dict[str, Any]:
        """What a record holds of the mean of several models' answers."""
        assert self._evaluator is not None, "prepare comes first"
        return self.result(self._evaluator.ensemble(outputs))

    def result(self, outputs: NDArray[Any]) -> dict[str, Any]:
        """What a record holds of outputs (n, k)."""
        evaluator = self._evaluator
        assert evaluator is not None, "prepare comes first"
        result = evaluator.score(outputs).to_dict()
        return {
            "metric": result["metric"],
            "score": result["score"],
            "standard_error": result["stderr"],
            "n": result["n"],
            "scores": result["scores"],
            "loss": evaluator.loss(outputs),
            "auc": result["auc"],
            "predicted_share": result["predicted_shares"],
            "degenerate": result["degenerate"],
            "invalid_share": result["invalid_share"],
            "predictions": _packed(evaluator.predictions(outputs).tolist()),
        }

    def gain(self, record: Record, others: Sequence[Record]) -> tuple[float, float]:
        """score - mean of the others' scores, and its standard error over the choice of rows."""
        gain = record["score"] - sum(o["score"] for o in others) / len(others)
        error = self._resampled(record) - self._mean_resampled(others)
        return gain, float(error.std(ddof=1))

    def average(self, records: Sequence[Record]) -> dict[str, Any]:
        """The mean of the records' scores as a row of the table."""
        aucs = [r["auc"] for r in records]
        return {
            "metric": records[0]["metric"],
            "score": sum(r["score"] for r in records) / len(records),
            "standard_error": float(self._mean_resampled(records).std(ddof=1)),
            "auc": sum(aucs) / len(aucs) if all(a is not None for a in aucs) else None,
            "n": records[0]["n"],
        }

    def _mean_resampled(self, records: Sequence[Record]) -> NDArray[Any]:
        total: NDArray[Any] = sum(map(self._resampled, records))  # type: ignore[assignment]
        return total / len(records)

    def _resampled(self, record: Record) -> NDArray[Any]:
        """The record's score on bootstrap samples of the rows, the same for every record."""
        from pem_composition.evaluation.standard_errors import draws  # numpy; --help does without

        if record["key"] not in self._draws:
            given = [float(p) for p in record["predictions"]]
            self._draws[record["key"]] = draws(record["metric"], self.labels, given)
        return self._draws[record["key"]]


def identity_of(head: Mapping[str, Tensor] | None) -> dict[str, str]:
    """What tells a head that rows are answered with from others; nothing for that of a module."""
    if head is None:
        return {}
    digest = hashlib.sha256()
    for name, tensor in sorted(head.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return {"own_head": digest.hexdigest()}


def _packed(predictions: Sequence[float]) -> str | list[float]:
    """Class numbers of up to ten classes as one digit per row; scores rounded to six digits."""
    if all(isinstance(p, int) and 0 <= p < 10 for p in predictions):
        return "".join(map(str, predictions))
    return [round(p, 6) for p in predictions]
