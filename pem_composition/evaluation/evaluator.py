"""One evaluator per way of answering: rows prepared once, then a model's outputs and their scores.

An evaluator turns a model into per-row outputs (n, k), numbers that fit in an array whatever the
objective, so that processes can share the rows and a sweep can keep them; and outputs into scores.

Shape suffixes: n rows, k numbers per row; b rows of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor, nn

from pem_composition.errors import DataError
from pem_composition.evaluation import classify, metrics
from pem_composition.evaluation.classify import Batch, EvalResult
from pem_composition.tasks.glue import Task

Outputs = NDArray[np.float32]


class Evaluator(ABC):
    """The prepared rows of one split."""

    def __init__(self, task: Task, batches: Sequence[Batch]) -> None:
        self.task = task
        self.batches = tuple(batches)
        self.size = sum(len(batch.rows) for batch in self.batches)

    def outputs(
        self, model: nn.Module, batches: Sequence[Batch] | None = None
    ) -> tuple[list[int], Outputs]:
        """Row numbers (n,) and outputs (n, k) of some batches, of all of them if None."""
        return classify.collect(model, self.batches if batches is None else batches, self.forward)

    def predict(self, model: nn.Module) -> Outputs:
        """Outputs (n, k) of every row in order."""
        return classify.in_order(*self.outputs(model))

    @abstractmethod
    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Outputs (b, k) of one padded batch."""

    @abstractmethod
    def score(self, outputs: Outputs, *, seconds: float = 0.0) -> EvalResult:
        """Scores of outputs (n, k) in the order of the rows.

        Raises:
            RunFailed: an output that is not finite.
        """

    @abstractmethod
    def loss(self, outputs: Outputs) -> float | None:
        """Mean loss of outputs (n, k); None where they do not tell."""

    @abstractmethod
    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        """What is predicted for each row (n,), to be compared with ``labels`` in a bootstrap."""

    @property
    @abstractmethod
    def labels(self) -> NDArray[Any]:
        """Gold labels (n,)."""

    def class_scores(self, outputs: Tensor) -> Tensor:
        """Scores (b, w) whose softmax is the model's distribution over the w answers, from outputs
        (b, k); differentiable. Regression: what it predicts, (b, 1).

        Raises:
            DataError: rows that have no fixed set of answers.
        """
        raise DataError.build(
            self.task.name, "has no fixed set of answers", found=type(self).__name__,
            expected="classification, or text to text with the answers of a prompt",
        )  # fmt: skip

    def ensemble(self, outputs: Sequence[tuple[float, Outputs]]) -> Outputs:
        """Outputs (n, k) whose distribution over the answers is the weighted mean of several.

        Raises:
            DataError: answers that have no mean.
        """
        raise DataError.build(
            self.task.name, "its answers have no mean", found=type(self).__name__,
            expected="classification or regression by a head",
        )  # fmt: skip


class ClassificationEvaluator(Evaluator):
    """Logits of a head in the order of the task's classes; k = classes, or 1 for regression."""

    def __init__(
        self,
        task: Task,
        labels: Sequence[Any],
        batches: Sequence[Batch],
        order: tuple[int, ...] = (),
    ) -> None:
        super().__init__(task, batches)
        self._given, self._order = labels, list(order)

    @cached_property
    def _labels(self) -> NDArray[Any]:
        """Rows without labels can be predicted, not scored."""
        return metrics.gold_labels(self.task, self._given)

    @property
    def labels(self) -> NDArray[Any]:
        return self._labels

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs).logits
        return logits[:, self._order] if self._order else logits

    def class_scores(self, outputs: Tensor) -> Tensor:
        return outputs

    def ensemble(self, outputs: Sequence[tuple[float, Outputs]]) -> Outputs:
        """log sum_i w_i softmax(o_i); of a regression sum_i w_i o_i."""
        wide = [(w, o.astype(np.float64)) for w, o in outputs]
        if self.task.regression:
            total = np.sum([w * o for w, o in wide], axis=0)
        else:
            logs = [np.log(w) + o - logsumexp(o, axis=1, keepdims=True) for w, o in wide]
            total = logsumexp(logs, axis=0)
        return total.astype(np.float32)  # type: ignore[no-any-return]

    def score(self, outputs: Outputs, *, seconds: float = 0.0) -> EvalResult:
        return classify.score(self.task, outputs, self._labels, seconds=seconds)

    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        return metrics.predictions_of(self.task, outputs)

    def loss(self, outputs: Outputs) -> float:
        """Mean cross entropy, or mean squared error for regression."""
        wide = outputs.astype(np.float64)
        if self.task.regression:
            return float(np.mean((wide[:, 0] - self._labels) ** 2))
        shifted = wide - wide.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(shifted).sum(axis=1))
        return float(np.mean(log_total - shifted[np.arange(len(wide)), self._labels]))
