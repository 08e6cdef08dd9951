"""Label-word scoring: every answer's log-probability, and which one greedy generation gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation.encoded import writing_of
from pem_composition.evaluation.prompted_rows import INVALID, ScoringEvaluator, decoded_together
from pem_composition.tasks.glue import TASKS

ANSWERS = {  # name: answers, and whether one begins another
    "one token": ([(7,), (30,), (61,)], False),
    "one length": ([(7, 9), (7, 30), (61, 8)], False),
    "several lengths": ([(7,), (30, 8, 9), (61, 8)], False),
    "nested": ([(7, 9), (7,), (7, 9, 9), (61,)], True),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_scores_are_the_log_probabilities_of_a_pass_without_cache_and_padding(oracle, kind):
    answers, nested = ANSWERS[kind]
    outputs = ScoringEvaluator(oracle.asked(answers)).predict(oracle.model)
    expected = oracle.scores(answers, end=nested)
    assert np.ptp(expected, axis=0).min() > 0.5  # rows differ: a wrong order would show
    np.testing.assert_allclose(outputs[:, :-1], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ANSWERS)
def test_neither_batches_nor_padding_change_a_row(oracle, kind):
    answers, _ = ANSWERS[kind]
    one = ScoringEvaluator(oracle.asked(answers, batch_size=1)).predict(oracle.model)
    for layout in ({"batch_size": 5}, {"batch_size": 64}, {"batch_size": 3, "pad_to": 40}):
        other = ScoringEvaluator(oracle.asked(answers, **layout)).predict(oracle.model)
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ANSWERS)
def test_batches_that_are_decoded_together_change_no_row(oracle, kind, monkeypatch):
    answers, _ = ANSWERS[kind]
    evaluator = ScoringEvaluator(oracle.asked(answers, batch_size=2))
    assert len({batch.inputs["input_ids"].shape for batch in evaluator.batches}) > 1
    together = evaluator.predict(oracle.model)
    monkeypatch.setattr("pem_composition.evaluation.prompted_rows.DECODED_TOKENS", 1)
    assert len(list(decoded_together(evaluator.batches, evaluator.answers))) == len(
        evaluator.batches
    )
    np.testing.assert_allclose(evaluator.predict(oracle.model), together, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("bound", [1, 100, 400, 10**6])
def test_batches_are_decoded_together_in_order_within_a_bound(oracle, kind, bound, monkeypatch):
    monkeypatch.setattr("pem_composition.evaluation.prompted_rows.DECODED_TOKENS", bound)
    answers, _ = ANSWERS[kind]
    asked = oracle.asked(answers, batch_size=3)
    groups = list(decoded_together(asked.batches, answers))
    assert [id(batch) for group in groups for batch in group] == [*map(id, asked.batches)]
    copies = 1 if kind == "one token" else len(answers)

    def tokens(group):
        """Of the group's padded inputs, once for each copy."""
        width = max(batch.inputs["input_ids"].shape[1] for batch in group)
        return sum(len(batch.rows) for batch in group) * width * copies

    assert all(len(group) == 1 or tokens(group) <= bound for group in groups)
    assert all(tokens([*group, after[0]]) > bound for group, after in pairwise(groups))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ANSWERS)
def test_the_last_column_is_what_greedy_generation_writes(oracle, kind):
    answers, _ = ANSWERS[kind]
    outputs = ScoringEvaluator(oracle.asked(answers)).predict(oracle.model)
    np.testing.assert_array_equal(outputs[:, -1], oracle.written(answers, 4))


@pytest.mark.slow
def test_answers_that_are_written_are_found_and_no_others(fluent):
    oracle, answers = fluent
    assert any(a != b and b[: len(a)] == a for a in answers for b in answers)
    ones = [a for a in answers if len(a) == 1]
    for chosen in (answers, ones, answers[-2:], ones[:2]):
        evaluator = ScoringEvaluator(oracle.asked(chosen, labels=np.zeros(24, int)))
        outputs = evaluator.predict(oracle.model)
        expected = oracle.written(chosen, 4)
        assert {INVALID} < set(expected.tolist())
        np.testing.assert_array_equal(outputs[:, -1], expected)
        result = evaluator.score(outputs)
        assert result.invalid_share == pytest.approx(np.mean(expected == INVALID))
        assert result.scores["exact_match"] == pytest.approx(np.mean(expected == 0))
        if chosen in (ones, ones[:2]):  # of one token: what is written is the best
            given = expected != INVALID
            np.testing.assert_array_equal(outputs[given, :-1].argmax(1), expected[given])


@pytest.mark.slow
def test_what_is_written_is_what_the_library_generates(fluent):
    oracle, answers = fluent
    writing = oracle.writing
    outputs = ScoringEvaluator(oracle.asked(answers, batch_size=7)).predict(oracle.model)
    closed = [[*a, writing.end] for a in answers]
    for row, number in zip(oracle.rows, outputs[:, -1], strict=True):
        tokens = oracle.model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=4, do_sample=False, num_beams=1, eos_token_id=writing.end,
        )[0, 1:].tolist()  # fmt: skip
        assert number == (closed.index(tokens) if tokens in closed else INVALID)


def random_outputs(oracle, task, seed=0, width=2):
    """An evaluator of ``task`` and outputs that no model gave."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, len(oracle.rows))
    evaluator = ScoringEvaluator(oracle.asked([(7,), (30,)][:width], labels, task=task))
    scores = rng.normal(size=(len(labels), 2)).astype(np.float32)
    written = rng.integers(-1, 2, len(labels)).astype(np.float32)
    return evaluator, np.column_stack([scores, written]), labels, written


@pytest.mark.parametrize("name", ["rte", "mrpc", "cola"])
def test_a_result_holds_the_metrics_of_the_best_answers(oracle, name):
    task = TASKS[name]
    evaluator, outputs, labels, written = random_outputs(oracle, task)
    best = outputs[:, :2].argmax(1)
    result = evaluator.score(outputs, seconds=2.5)
    known = {
        "accuracy": accuracy_score(labels, best),
        "f1": f1_score(labels, best),
        "matthews_correlation": matthews_corrcoef(labels, best),
    }
    expected = {metric: known[metric] for metric in task.metrics}
    assert result.scores == pytest.approx(expected | {"exact_match": np.mean(written == labels)})
    assert result.score == pytest.approx(known[task.primary])
    assert result.invalid_share == pytest.approx(np.mean(written == -1))
    assert list(result.predicted_shares.values()) == pytest.approx(np.bincount(best) / len(best))
    assert (result.n, result.seconds, result.task) == (len(labels), 2.5, name)
    wins = [
        (a > b) + 0.5 * (a == b)
        for a in (outputs[:, 1] - outputs[:, 0])[labels == 1]
        for b in (outputs[:, 1] - outputs[:, 0])[labels == 0]
    ]
    assert result.auc == pytest.approx(np.mean(wins))
    assert evaluator.loss(outputs) == pytest.approx(-outputs[np.arange(len(labels)), labels].mean())
    if task.primary == "accuracy":
        p = result.score
        assert result.stderr == pytest.approx(np.sqrt(p * (1 - p) / len(labels)))


def test_a_regression_task_is_scored_by_the_number_that_is_answered(oracle):
    task = TASKS["stsb"]
    words, answers = ("0.0", "2.5", "5.0"), [(7,), (30, 8), (61,)]
    labels = np.linspace(0, 5, len(oracle.rows))
    evaluator = ScoringEvaluator(oracle.asked(answers, labels, task=task, words=words))
    outputs = evaluator.predict(oracle.model)
    values = np.array([0.0, 2.5, 5.0])[oracle.scores(answers, end=False).argmax(1)]
    np.testing.assert_array_equal(evaluator.predictions(outputs), values)
    result = evaluator.score(outputs)
    expected = np.corrcoef(values, labels)[0, 1] if np.ptp(values) else 0.0
    assert result.score == pytest.approx(expected)
    assert result.auc is None and result.predicted_shares == {}
    nearest = np.abs(labels[:, None] - [0.0, 2.5, 5.0]).argmin(1)
    gold = outputs[np.arange(len(labels)), nearest]
    assert evaluator.loss(outputs) == pytest.approx(-gold.mean(), rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_fails_the_run_and_names_the_row(oracle, value):
    evaluator, outputs, *_ = random_outputs(oracle, TASKS["rte"])
    outputs[3, 1] = value
    with pytest.raises(RunFailed, match="the scores of row 3 are not finite") as error:
        evaluator.score(outputs)
    assert error.value.exit_code == 3


def test_a_diverged_model_is_refused(oracle):
    with torch.no_grad():
        next(oracle.model.parameters())[:] = torch.nan
    evaluator = ScoringEvaluator(oracle.asked([(7,), (30, 8)]))
    with pytest.raises(RunFailed, match="are not finite"):
        evaluator.score(evaluator.predict(oracle.model))


def test_evaluation_draws_no_random_numbers_and_restores_the_mode(oracle):
    state = torch.get_rng_state()
    oracle.model.train()
    ScoringEvaluator(oracle.asked([(7,), (30, 8)])).predict(oracle.model)
    assert oracle.model.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_does_not_say_how_it_writes_is_refused(oracle):
    class Tokenizer:
        eos_token_id = None

    with pytest.raises(
        DataError, match=r"found decoder_start_token_id (\d|None), eos_token_id None"
    ):
        writing_of(Tokenizer(), oracle.model.config)
