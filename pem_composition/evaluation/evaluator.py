"""One evaluator per way of answering: rows prepared once, then a model's outputs and their scores.

An evaluator turns a model into per-row outputs (n, k), numbers that fit in an array whatever the
objective, so that processes can share the rows and a sweep can keep them; and outputs into scores.

Shape suffixes: n rows, k numbers per row; b rows of a batch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn

from pem_composition.adapters import wearing
from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation import metrics, padded
from pem_composition.evaluation.encoded import EncodedDataset
from pem_composition.evaluation.joint_task import JointTask
from pem_composition.evaluation.padded import Batch
from pem_composition.evaluation.precision import reduced
from pem_composition.evaluation.sharding import is_sharded, run_whole
from pem_composition.tasks.glue import Task

Outputs = NDArray[np.float32]
PRIOR_STEPS, PRIOR_TOLERANCE = 10_000, 1e-9  # of ``matching_prior``


@dataclass(frozen=True)
class EvalResult:
    """Scores of one evaluation.

    Attributes:
        score: the primary metric, whose standard error over the choice of rows is ``stderr``.
        scores: every metric of the task (``Task.scores``).
        predicted_shares: share of the rows per predicted class; empty for regression.
        degenerate: nearly every row gets the same class (above 97 percent).
        auc: two classes only: how well the logits rank.
        invalid_share: text-to-text only: share of the rows for which generation gives none of the
            answers; free and greedy generation, unless the evaluator is one of constrained answers.
        seconds: wall time of the predictions.
    """

    task: str
    metric: str
    score: float
    stderr: float
    n: int
    scores: dict[str, float] = field(default_factory=dict)
    predicted_shares: dict[str, float] = field(default_factory=dict)
    degenerate: bool = False
    auc: float | None = None
    invalid_share: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return asdict(self)

    def report(self) -> dict[str, Any]:
        """The same as it stands in the result files."""
        text = {} if self.invalid_share is None else {"invalid_share": self.invalid_share}
        return {
            **self.scores,
            "stderr": self.stderr,
            "samples": self.n,
            "auc": self.auc,
            "predicted_shares": self.predicted_shares,
            "degenerate": self.degenerate,
            **text,
            "runtime": round(self.seconds, 3),
        }


def check_finite(task: Task, outputs: NDArray[Any], what: str) -> None:
    """Refuse outputs (n, k) that are not numbers.

    Raises:
        RunFailed: naming the first such row.
    """
    finite = np.isfinite(outputs).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise RunFailed.build(
            f"evaluation of {task.name}", f"the {what} of row {row} are not finite",
            found=outputs[row].tolist(), do="the module or its training diverged",
        )  # fmt: skip


def result_of(
    task: Task,
    predictions: NDArray[Any],
    labels: NDArray[Any],
    *,
    more: Mapping[str, float] | None = None,
    auc: float | None = None,
    invalid_share: float | None = None,
    seconds: float = 0.0,
) -> EvalResult:
    """Metrics, standard error and shares of predictions (n,), beside what is known already."""
    scores = metrics.compute(task, predictions, labels, task.scores)
    shares = metrics.predicted_shares(task, predictions)
    return EvalResult(
        task=task.name,
        metric=task.primary,
        score=scores[task.primary],
        stderr=metrics.standard_error(task.primary, predictions, labels),
        n=len(labels),
        scores={**scores, **(more or {})},
        predicted_shares=shares,
        degenerate=metrics.is_degenerate(shares),
        auc=auc,
        invalid_share=invalid_share,
        seconds=seconds,
    )


def matching_prior(
    scores: NDArray[np.float64], shares: Sequence[float] = ()
) -> NDArray[np.float64]:
    """What to add to the scores (n, w) of w answers (w,) so that the mean over the rows of their
    distributions is ``shares``: b <- b + log(shares) - log(sum_i softmax(z_i + b) / n) until it
    stands still.

    Args:
        shares: (w,), positive, of sum 1; none: uniform.

    Examples:
        >>> scores = np.array([[3.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
        >>> b = matching_prior(scores)
        >>> round(float(b[1] - b[0]), 3)
        3.0
        >>> b = matching_prior(scores, (0.75, 0.25))
        >>> p = np.exp(scores + b)
        >>> (p / p.sum(1, keepdims=True)).mean(0).round(3).tolist()
        [0.75, 0.25]
    """
    n, w = scores.shape
    total = np.log(np.multiply(n, shares or np.full(w, 1 / w)))
    b = np.zeros(w)
    for _ in range(PRIOR_STEPS):
        step = logsumexp(log_softmax(scores + b, axis=1), axis=0) - total
        b -= step
        if abs(step).max() < PRIOR_TOLERANCE:
            break
    return b


class Evaluator(ABC):
    """The prepared rows of one split."""

    def __init__(
        self, task: Task, batches: Sequence[Batch], labels: Sequence[Any] | NDArray[Any] = ()
    ) -> None:
        self.task, self._given = task, labels
        self.batches = tuple(batches)
        self.size = sum(len(batch.rows) for batch in self.batches)

    @cached_property
    def labels(self) -> NDArray[Any]:
        """Gold labels (n,); rows without labels can be predicted, not scored.

        Raises:
            DataError: a row without one.
        """
        return metrics.gold_labels(self.task, self._given)

    @contextmanager
    def answering(
        self, model: nn.Module, head: Mapping[str, Tensor] | None = None, *, bf16: bool = False
    ) -> Iterator[None]:
        """The model with a head in the place of its own, in full precision or in bfloat16."""
        with nullcontext() if head is None else wearing(model, head), reduced(model, bf16):
            yield

    def outputs(
        self, model: nn.Module, batches: Sequence[Batch] | None = None
    ) -> tuple[list[int], Outputs]:
        """Row numbers (n,) and outputs (n, k) of some batches, of all of them if None."""
        return padded.collect(model, self.batches if batches is None else batches, self.forward)

    def predict(self, model: nn.Module) -> Outputs:
        """Outputs (n, k) of every row in order; processes of one launch share the rows."""
        if is_sharded(model):  # a process without rows would not take part in gathering weights
            return padded.in_order(*run_whole(model, self.outputs))
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return padded.in_order(*self.outputs(model))
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        own = self.batches[rank::world]
        parts: list[Any] = [None] * world
        share = self.outputs(model, own) if own else None
        torch.distributed.all_gather_object(parts, share)
        rows, outputs = zip(*(part for part in parts if part is not None), strict=True)
        return padded.in_order([row for part in rows for row in part], np.concatenate(outputs))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Loss, metrics, standard error, AUC, predicted shares and time; no random number."""
        start = time.perf_counter()
        outputs = self.predict(model)
        return self.report(outputs, seconds=time.perf_counter() - start)

    def report(self, outputs: Outputs, *, seconds: float = 0.0) -> dict[str, Any]:
        """The same of outputs (n, k) that are at hand; names as in ``eval_results.json``."""
        return {"loss": self.loss(outputs), **self.score(outputs, seconds=seconds).report()}

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

    def prior_matched(self, outputs: Outputs, shares: Sequence[float] = ()) -> Outputs:
        """Outputs (n, k) with one number added per answer, so that the mean over the rows of the
        distribution over the answers is ``shares`` (w,): sum_i softmax(z_i + b) / n; none: uniform.

        No label of these rows is used. Prior matching (Liusie et al. 2023, arXiv 2309.04992); batch
        calibration (Zhou et al. 2023, arXiv 2309.17249) is b = -log(sum_i softmax(z_i) / n).

        Raises:
            DataError: rows that have no fixed set of answers.
        """
        scores = self.class_scores(torch.from_numpy(outputs)).double().numpy()  # the first columns
        matched = outputs.copy()
        matched[:, : scores.shape[1]] = scores + matching_prior(scores, shares)
        return matched

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
        super().__init__(task, batches, labels)
        self._order = list(order)

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
        check_finite(self.task, outputs, "logits")
        return result_of(
            self.task,
            self.predictions(outputs),
            self.labels,
            auc=None if self.task.regression else metrics.auc(outputs, self.labels),
            seconds=seconds,
        )

    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        return metrics.predictions_of(self.task, outputs)

    def loss(self, outputs: Outputs) -> float:
        """Mean cross entropy, or mean squared error for regression."""
        wide = outputs.astype(np.float64)
        if self.task.regression:
            return float(np.mean((wide[:, 0] - self.labels) ** 2))
        shifted = wide - wide.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(shifted).sum(axis=1))
        return float(np.mean(log_total - shifted[np.arange(len(wide)), self.labels]))


class JointEvaluator(Evaluator):
    """Logits (n, k) of one head for several tasks, whose rows stand one task after the other.

    Args:
        apart: of each task its outputs and what scores them.
    """

    def __init__(
        self,
        task: Task,
        apart: Sequence[tuple[slice, ClassificationEvaluator]],
        batches: Sequence[Batch],
    ) -> None:
        super().__init__(task, batches)
        self._apart = tuple(apart)

    @cached_property
    def labels(self) -> NDArray[Any]:
        return np.concatenate([e.labels for _, e in self._apart])

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs).logits
        return logits

    def _own(self, outputs: Outputs) -> Iterator[tuple[ClassificationEvaluator, Outputs]]:
        """What scores each task, and the outputs of its rows that are its own."""
        first = 0
        for columns, evaluator in self._apart:
            last = first + len(evaluator.labels)
            yield evaluator, outputs[first:last, columns]
            first = last

    def score(self, outputs: Outputs, *, seconds: float = 0.0) -> EvalResult:
        """The mean of the tasks' own metrics, and every task's metrics by TASK_METRIC."""
        each = [evaluator.score(own) for evaluator, own in self._own(outputs)]
        mean = float(np.mean([e.score for e in each]))
        return EvalResult(
            task=self.task.name,
            metric=self.task.primary,
            score=mean,
            stderr=float(np.linalg.norm([e.stderr for e in each])) / len(each),
            n=len(self.labels),
            scores={
                self.task.primary: mean,
                **{f"{e.task}_{name}": value for e in each for name, value in e.scores.items()},
            },
            seconds=seconds,
        )

    def loss(self, outputs: Outputs) -> float:
        """Mean over all rows of the loss that each has among its task's outputs."""
        return float(
            sum(e.loss(own) * len(own) for e, own in self._own(outputs)) / len(self.labels)
        )

    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        """Classes within each task, or scores, as floats."""
        each = [e.predictions(own).astype(np.float64) for e, own in self._own(outputs)]
        return np.concatenate(each)


def classification_evaluator(
    task: Task, data: EncodedDataset, order: tuple[int, ...] = (), **layout: Any
) -> Evaluator:
    """Rows that a head answers; see ``padded.batches``.

    Args:
        order: number of the head's output for each class of the task; empty: in the task's order.
    """
    batches = padded.batches(data, **layout)
    if not isinstance(task, JointTask):
        return ClassificationEvaluator(task, data.labels, batches, order)
    labels: list[list[Any]] = [[] for _ in task.parts]
    for number, label in cast("Sequence[tuple[int, Any]]", data.labels):
        labels[number].append(label)
    apart = [
        (slice(start, stop), ClassificationEvaluator(part, own, ()))
        for part, own, (start, stop, _) in zip(task.parts, labels, task.spans, strict=True)
    ]
    return JointEvaluator(task, apart, batches)
