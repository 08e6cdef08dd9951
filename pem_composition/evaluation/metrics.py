"""The published GLUE metrics, their standard errors, and the signs of a dead classifier.

Computed with scikit-learn and scipy. Where a metric is undefined (a correlation with a constant,
F1 without a positive) it is 0.0, and no warning is printed.

Shapes: n rows, c classes; logits (n, c), for regression (n, 1); labels (n,) of either kind.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

from pem_composition.errors import DataError
from pem_composition.tasks.data import check_labelled
from pem_composition.tasks.glue import Task

Floats = NDArray[np.float64]

BOOTSTRAP_SAMPLES = 1000
BLOCK = 2**20  # rows of bootstrap samples at once
# A classifier that gives one answer to more than this share of the rows is called degenerate.
DEGENERATE_SHARE = 0.97
SMALLER_IS_BETTER = frozenset(
    {
        "loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score",
        "ter",
    }
)  # fmt: skip


def greater_is_better(name: str) -> bool:
    """The direction in which a metric improves; after a comma stands how answers were filtered."""
    return name.partition(",")[0] not in SMALLER_IS_BETTER


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of rows predicted right."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """F1 of class 1: 2 TP / (2 TP + FP + FN); 0 if there is nothing to find and nothing found."""
    x, y = np.asarray(labels) == 1, np.asarray(predictions) == 1
    return float(f1_score(x, y, zero_division=0.0))


def f1_macro(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean F1 over the classes that occur in labels or predictions, as scikit-learn has it."""
    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def matthews_correlation(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Matthews correlation of two classifications; 0 if either is constant."""
    if len(np.unique(np.asarray(labels))) < 2 or len(np.unique(np.asarray(predictions))) < 2:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Pearson correlation; 0 if either side is constant."""
    return float(_correlation(pearsonr, labels, predictions, axis=-1))


def spearman(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Spearman rank correlation; 0 if either side is constant."""
    return float(_correlation(spearmanr, labels, predictions))


def _correlation(
    statistic: Callable[..., Any], labels: ArrayLike, predictions: ArrayLike, **options: int
) -> Floats:
    """Of the last axis of labels and predictions (..., n)."""
    x, y = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if x.shape[-1] < 2:
        return np.zeros(x.shape[:-1])
    constant = (np.ptp(x, axis=-1) == 0) | (np.ptp(y, axis=-1) == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy on constant or nearly constant input
        values = np.asarray(statistic(x, y, **options).statistic)
    return np.where(constant | ~np.isfinite(values), 0.0, values)


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearman,
}


def predictions_of(task: Task, logits: ArrayLike) -> NDArray[Any]:
    """The answers that logits (n, c) give: class numbers, or scores for regression.

    Raises:
        DataError: the number of columns is not that of the task's answers.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] != task.num_labels:
        raise DataError.build(
            task.name, "logits do not fit the task", found=f"shape {logits.shape}",
            expected=f"(rows, {task.num_labels})",
        )  # fmt: skip
    return logits[:, 0].astype(np.float64) if task.regression else logits.argmax(axis=1)


def compute(
    task: Task, predictions: ArrayLike, labels: ArrayLike, names: Sequence[str] = ()
) -> dict[str, float]:
    """The task's published metrics by their usual names, or those of ``names``.

    Args:
        predictions: class numbers (n,), the number after the last class for an answer that is none
            of them; or scores for regression.
        labels: the same of the gold standard.

    Raises:
        DataError: different lengths, no rows, or a prediction that is not finite.
    """
    _check_same(task, predictions, labels)
    return {name: METRICS[name](labels, predictions) for name in names or task.metrics}


def standard_error(
    metric: str,
    predictions: ArrayLike,
    labels: ArrayLike,
    *,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> float:
    """Standard error of a metric over the choice of evaluation rows.

    Accuracy: sqrt(p (1 - p) / n). The others: standard deviation over bootstrap samples of rows.
    """
    x, y = np.asarray(labels), np.asarray(predictions)
    if metric == "accuracy":
        p = accuracy(x, y)
        return math.sqrt(p * (1 - p) / len(x))
    rng = np.random.default_rng(seed)
    if metric in ("pearson", "spearmanr"):
        return float(np.std(resampled(metric, x, y, rng, samples), ddof=1))
    return float(np.std(_bootstrap_counts(metric, x, y, rng, samples), ddof=1))


def resampled(
    metric: str,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    rng: np.random.Generator,
    samples: int,
) -> Floats:
    """The metric on bootstrap samples of the rows."""
    n = len(labels)
    rows = (rng.integers(n, size=n) for _ in range(samples))
    if metric != "pearson":
        return np.array([METRICS[metric](labels[i], predictions[i]) for i in rows])
    # Many samples at once: scipy takes longer to begin than for a sample of hundreds of rows.
    blocks = iter(lambda: list(itertools.islice(rows, max(1, BLOCK // n))), [])
    found = (
        _correlation(pearsonr, labels[i], predictions[i], axis=-1) for i in map(np.array, blocks)
    )
    return np.concatenate(list(found))


def _bootstrap_counts(
    metric: str,
    labels: NDArray[Any],
    predictions: NDArray[Any],
    rng: np.random.Generator,
    samples: int,
) -> Floats:
    """Scores of bootstrap samples of a classification.

    Such a score depends on the rows through the confusion matrix only, and the matrix of a
    bootstrap sample is one multinomial draw.
    """
    classes = int(max(labels.max(), predictions.max(), 1)) + 1
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, predictions), 1)
    n = len(labels)
    draws = rng.multinomial(n, (confusion / n).ravel(), size=samples).reshape(-1, classes, classes)
    counts = draws.astype(np.float64)
    if metric == "f1":
        hits = 2 * counts[:, 1, 1]
        total = counts[:, 1, :].sum(axis=1) + counts[:, :, 1].sum(axis=1)
        return np.divide(hits, total, out=np.zeros(samples), where=total > 0)
    gold, said = counts.sum(axis=2), counts.sum(axis=1)
    if metric == "f1_macro":
        hits = 2 * np.diagonal(counts, axis1=1, axis2=2)
        total, occurs = gold + said, gold + said > 0
        per_class = np.divide(hits, total, out=np.zeros_like(total), where=occurs)
        return np.asarray(per_class.sum(axis=1) / occurs.sum(axis=1))
    covariance = n * np.trace(counts, axis1=1, axis2=2) - (gold * said).sum(axis=1)
    spread = np.sqrt((n**2 - (gold**2).sum(axis=1)) * (n**2 - (said**2).sum(axis=1)))
    return np.divide(covariance, spread, out=np.zeros(samples), where=spread > 0)


def auc(logits: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve of logits (n, 2): how well they rank, whatever the threshold.

    A merge whose classes are told apart but whose bias is off has a high AUC and a low accuracy.
    None unless both classes occur.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] != 2 or len(np.unique(labels)) != 2:
        return None
    return float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))


def predicted_shares(task: Task, predictions: ArrayLike) -> dict[str, float]:
    """Share of the rows that each class is predicted for; empty for regression.

    A number after the last class stands for an answer that is none; such rows are in no share.
    """
    if task.regression:
        return {}
    counts = np.bincount(np.asarray(predictions), minlength=task.num_labels)
    return {word: float(c / counts.sum()) for word, c in zip(task.labels, counts, strict=False)}


def is_degenerate(shares: dict[str, float]) -> bool:
    """True if (nearly) every row gets the same answer."""
    return bool(shares) and max(shares.values()) > DEGENERATE_SHARE


def _check_same(task: Task, predictions: ArrayLike, labels: ArrayLike) -> None:
    p, y = np.asarray(predictions), np.asarray(labels)
    if p.shape != y.shape or p.ndim != 1 or len(p) == 0:
        raise DataError.build(
            task.name, "predictions and labels differ in number", found=f"{p.shape} and {y.shape}",
            expected="one prediction per label, at least one",
        )  # fmt: skip
    if not np.isfinite(p.astype(np.float64)).all():
        bad = int(np.flatnonzero(~np.isfinite(p.astype(np.float64)))[0])
        raise DataError.build(task.name, f"prediction of row {bad} is not finite", found=p[bad])


def gold_labels(task: Task, labels: Sequence[int | float | None]) -> NDArray[Any]:
    """Labels as an array of class numbers or scores.

    Raises:
        DataError: a row without a label (a test set whose labels are not published).
    """
    check_labelled(task, labels)
    return np.asarray(labels, dtype=np.float64 if task.regression else np.int64)
