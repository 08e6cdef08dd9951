"""Metrics against formulas written out in numpy, hand cases, and their standard errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition.errors import DataError
from pem_composition.evaluation import metrics
from pem_composition.tasks.glue import TASKS

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


def literal_f1(y, p):
    tp = sum(a == 1 and b == 1 for a, b in zip(y, p, strict=True))
    fp = sum(a == 0 and b == 1 for a, b in zip(y, p, strict=True))
    fn = sum(a == 1 and b == 0 for a, b in zip(y, p, strict=True))
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def literal_mcc(y, p):
    tp, tn = np.sum((y == 1) & (p == 1)), np.sum((y == 0) & (p == 0))
    fp, fn = np.sum((y == 0) & (p == 1)), np.sum((y == 1) & (p == 0))
    product = float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / product**0.5 if product else 0.0


def literal_pearson(x, y):
    a, b = x - x.mean(), y - y.mean()
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def ranks(x):
    """Mean rank of each value, ties sharing theirs."""
    return np.array([np.mean(np.flatnonzero(np.sort(x) == v)) for v in x])


def answers(task, rng, n):
    """Gold and predicted answers of which about three quarters agree."""
    if task.regression:
        gold = rng.integers(0, 26, n) / 5
        return gold, gold + rng.normal(0, 1, n)
    gold = rng.integers(0, task.num_labels, n)
    return gold, np.where(rng.random(n) < 0.75, gold, rng.integers(0, task.num_labels, n))


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("seed", range(5))
def test_glue_metrics_equal_formulas_written_out(name, seed):
    task = TASKS[name]
    y, p = answers(task, np.random.default_rng(seed), 137)
    literal = {
        "accuracy": lambda: np.mean([a == b for a, b in zip(y, p, strict=True)]),
        "f1": lambda: literal_f1(y, p),
        "matthews_correlation": lambda: literal_mcc(y, p),
        "pearson": lambda: literal_pearson(y, p),
        "spearmanr": lambda: literal_pearson(ranks(y), ranks(p)),
    }
    scores = metrics.compute(task, p, y)
    assert list(scores) == list(task.metrics)
    for metric, value in scores.items():
        assert value == pytest.approx(literal[metric](), abs=1e-12)


def test_hand_cases():
    y, p = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    assert metrics.accuracy(y, p) == pytest.approx(4 / 6)
    assert metrics.f1(y, p) == pytest.approx(2 / 3)
    assert metrics.matthews_correlation(y, p) == pytest.approx(1 / 3)
    assert metrics.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert metrics.spearman([1, 2, 3], [1, 10, 5]) == pytest.approx(0.5)


@pytest.mark.parametrize("name", GLUE)
def test_constant_predictions_have_a_value_and_no_warning(name):
    task = TASKS[name]
    y = np.arange(6) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metrics.compute(task, np.zeros(6, dtype=int), y)
        metrics.standard_error(task.primary, np.zeros(6, dtype=int), y)
    assert scores == {m: 0.5 if m == "accuracy" else 0.0 for m in task.metrics}


@given(st.integers(2, 400), st.integers(0, 10))
def test_standard_error_of_accuracy_is_binomial(n, seed):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 2, n), rng.integers(0, 2, n)
    share = np.mean(y == p)
    error = metrics.standard_error("accuracy", p, y)
    assert error == pytest.approx(np.sqrt(share * (1 - share) / n))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb"])
def test_bootstrap_error_is_the_spread_over_resampled_rows(name):
    task = TASKS[name]
    metric = task.metrics[-1]
    y, p = answers(task, np.random.default_rng(1), 300)
    error = metrics.standard_error(metric, p, y)
    rng = np.random.default_rng(99)
    draws = [rng.integers(300, size=300) for _ in range(500)]
    literal = np.std([metrics.METRICS[metric](y[i], p[i]) for i in draws])
    assert error == pytest.approx(literal, rel=0.15)
    assert error == metrics.standard_error(metric, p, y)


def test_the_two_bootstraps_score_the_confusion_matrix_as_the_metric_does():
    y, p = answers(TASKS["mnli"], np.random.default_rng(2), 90)

    class NoResampling:
        def multinomial(self, n, shares, size):
            return np.tile(np.rint(n * shares).astype(int), (size, 1))

    for metric, gold, said in (
        ("matthews_correlation", y, p),
        ("f1", np.minimum(y, 1), np.minimum(p, 1)),
    ):
        scores = metrics._bootstrap_counts(metric, gold, said, NoResampling(), 3)
        assert scores == pytest.approx([metrics.METRICS[metric](gold, said)] * 3)


def test_auc_ranks_whatever_the_bias():
    y = np.array([0, 0, 1, 1])
    logits = np.array([[0.0, 5.0], [0.0, 6.0], [0.0, 7.0], [0.0, 8.0]])
    assert metrics.accuracy(y, logits.argmax(1)) == 0.5
    assert metrics.auc(logits, y) == 1.0
    assert metrics.auc(-logits, y) == 0.0
    assert metrics.auc(logits, np.zeros(4)) is None
    assert metrics.auc(np.zeros((4, 3)), y) is None


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    y, margin = rng.integers(0, 2, 80), rng.integers(0, 9, 80)
    pairs = [(a > b) + 0.5 * (a == b) for a in margin[y == 1] for b in margin[y == 0]]
    logits = np.stack([np.zeros(80), margin], axis=1)
    assert metrics.auc(logits, y) == pytest.approx(np.mean(pairs))


def test_predicted_shares_name_every_class_and_tell_a_dead_classifier():
    shares = metrics.predicted_shares(TASKS["mnli"], [0, 0, 0, 2])
    assert shares == {"entailment": 0.75, "neutral": 0.0, "contradiction": 0.25}
    assert not metrics.is_degenerate(shares)
    assert metrics.is_degenerate(metrics.predicted_shares(TASKS["rte"], [1] * 98 + [0] * 2))
    assert not metrics.is_degenerate(metrics.predicted_shares(TASKS["rte"], [1] * 97 + [0] * 3))
    assert metrics.predicted_shares(TASKS["stsb"], [0.5]) == {}
    assert not metrics.is_degenerate({})


def test_what_does_not_fit_is_refused():
    rte = TASKS["rte"]
    with pytest.raises(DataError, match=r"found shape \(4, 3\), expected \(rows, 2\)"):
        metrics.predictions_of(rte, np.zeros((4, 3)))
    with pytest.raises(DataError, match=r"found \(2,\) and \(3,\)"):
        metrics.compute(rte, [0, 1], [0, 1, 1])
    with pytest.raises(DataError, match="prediction of row 1 is not finite"):
        metrics.compute(TASKS["stsb"], [0.0, float("nan")], [0.0, 1.0])
    with pytest.raises(DataError, match="found 1 without a label"):
        metrics.gold_labels(rte, [0, None])


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "classes"), enumerate([2, 3, 7, 2, 3]))
def test_macro_f1_and_its_bootstrap_are_those_of_scikit_learn(seed, classes):
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(seed)
    labels, said = rng.integers(classes, size=(2, 40))
    said[:20] = labels[:20]
    expected = f1_score(labels, said, average="macro")
    assert metrics.METRICS["f1_macro"](labels, said) == pytest.approx(expected)
    draws = [rng.integers(40, size=40) for _ in range(400)]
    scores = [f1_score(labels[i], said[i], average="macro", zero_division=0) for i in draws]
    assert metrics.standard_error("f1_macro", said, labels) == pytest.approx(
        np.std(scores), rel=0.2
    )


def test_macro_f1_is_reported_of_more_than_two_classes():
    assert TASKS["mnli"].scores == ("accuracy", "f1_macro")
    assert TASKS["rte"].scores == TASKS["rte"].metrics
    assert TASKS["stsb"].scores == TASKS["stsb"].metrics
