"""Generation: beam search that can write nothing but the answers, and greedy that can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef
from support.package_files import fetched

from pem_composition.errors import RunFailed
from pem_composition.evaluation.decoding import (
    ANSWERS,
    CONSTRAINED,
    FREE,
    SCORING,
)
from pem_composition.evaluation.generation import (
    GenerationEvaluator,
    answer_numbers,
    constrained,
    continuations,
    free,
)
from pem_composition.evaluation.prompted_rows import INVALID, ScoringEvaluator
from pem_composition.objectives.answers import Answers
from pem_composition.tasks.data import RowFiles, load_task
from pem_composition.tasks.glue import TASKS

ONE_LENGTH = {
    "one token": [(7,), (30,), (61,), (62,), (63,), (64,)],
    "two tokens": [(7, 9), (7, 30), (61, 8)],
}
NESTED = [(7, 9), (7,), (7, 9, 9)]
SEVERAL = [(7,), (30, 8, 9), (61, 8)]


def batch_of(evaluator):
    """The only batch of an evaluator."""
    (batch,) = evaluator.batches
    return batch


def beam(oracle, answers, **options):
    """Numbers and log-probabilities in the order of the rows."""
    batch = batch_of(ScoringEvaluator(oracle.asked(answers, batch_size=64)))
    with torch.inference_mode():
        written = constrained(oracle.model, batch.inputs, answers, oracle.writing, **options)
    order = np.argsort(batch.rows)
    numbers = answer_numbers(written.tokens, answers, oracle.writing.end)
    return numbers.numpy()[order], written.log_p.numpy()[order]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_LENGTH)
def test_beam_search_gives_the_best_answer_of_one_length_without_an_end_token(oracle, kind):
    answers = ONE_LENGTH[kind]
    scores = oracle.scores(answers, end=False)
    numbers, log_p = beam(oracle, answers)
    np.testing.assert_array_equal(numbers, scores.argmax(1))
    np.testing.assert_allclose(log_p, scores.max(1), rtol=1e-5, atol=1e-4)
    scored = ScoringEvaluator(oracle.asked(answers)).predict(oracle.model)
    np.testing.assert_array_equal(numbers, scored[:, :-1].argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("answers", [NESTED, SEVERAL], ids=["nested", "several lengths"])
def test_beam_search_ends_answers_of_different_lengths(oracle, answers):
    scores = oracle.scores(answers, end=True)
    numbers, log_p = beam(oracle, answers)
    np.testing.assert_array_equal(numbers, scores.argmax(1))
    np.testing.assert_allclose(log_p, scores.max(1), rtol=1e-5, atol=1e-4)


def test_scoring_and_beam_search_agree_where_one_answer_begins_another(oracle):
    scored = ScoringEvaluator(oracle.asked(NESTED)).predict(oracle.model)
    np.testing.assert_array_equal(beam(oracle, NESTED)[0], scored[:, :-1].argmax(1))


@pytest.mark.slow
def test_enough_beams_find_the_best_of_many_answers(oracle):
    answers = [(7, 9), (7, 30), (61, 8), (62, 8), (63, 9), (64, 30)]
    scores = oracle.scores(answers, end=False)
    np.testing.assert_array_equal(beam(oracle, answers, beams=6)[0], scores.argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_free_generation_is_the_greedy_column_of_scoring(fluent, batch_size):
    oracle, answers = fluent
    asked = oracle.asked(answers, batch_size=batch_size)
    outputs = GenerationEvaluator(asked, FREE).predict(oracle.model)
    expected = oracle.written(answers, 4)
    assert len(set(expected.tolist())) > 4
    np.testing.assert_array_equal(outputs[:, 0], expected)
    scored = ScoringEvaluator(asked).predict(oracle.model)
    np.testing.assert_array_equal(outputs[:, 0], scored[:, -1])
    for row, number, log_p in zip(oracle.rows, expected, outputs[:, 1], strict=True):
        if number != INVALID:
            dense = oracle.score(row, answers[number], end=True)
            assert log_p == pytest.approx(dense, rel=1e-5, abs=1e-4)


def test_settings_that_a_model_brings_do_not_count(oracle):
    """BART's summarisers force first and last words and a least length."""
    answers = ONE_LENGTH["two tokens"]
    before = [beam(oracle, answers), free_tokens(oracle)]
    own = oracle.model.generation_config
    own.update(forced_bos_token_id=50, forced_eos_token_id=51, min_length=9, num_beams=3)
    own.update(no_repeat_ngram_size=1, repetition_penalty=3.0, length_penalty=2.0)
    after = [beam(oracle, answers), free_tokens(oracle)]
    for old, new in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(old, new)
    assert torch.equal(before[1], after[1])
    assert oracle.model.generation_config is own and own.min_length == 9


def free_tokens(oracle):
    batch = batch_of(ScoringEvaluator(oracle.asked(NESTED, batch_size=64)))
    with torch.inference_mode():
        return free(oracle.model, batch.inputs, oracle.writing, 4).tokens


answer_sets = st.lists(
    st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple), min_size=1, unique=True
)


@given(answer_sets)
def test_the_trie_spells_the_answers_and_nothing_else(answers):
    trie, spelled, open_ = continuations(answers, 1), [], [()]
    while open_:
        beginning = open_.pop()
        for token in trie[beginning]:
            if token == 1:
                spelled.append(beginning)
            else:
                open_.append((*beginning, token))
    assert sorted(spelled) == sorted(answers)


@given(answer_sets, st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=1))
def test_an_answer_is_known_by_its_tokens_before_the_first_end(answers, written):
    numbers = answer_numbers(torch.tensor(written), answers, 1).tolist()
    for tokens, number in zip(written, numbers, strict=True):
        text = tuple(tokens[: tokens.index(1)] if 1 in tokens else tokens)
        assert number == (answers.index(text) if text in answers else INVALID)


def outputs_of(written):
    return np.column_stack([written, np.full(len(written), -1.0)]).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rte", "mrpc", "cola"])
def test_an_invalid_answer_is_wrong_in_every_metric(oracle, name):
    task, n = TASKS[name], len(oracle.rows)
    rng = np.random.default_rng(1)
    labels, written = rng.integers(0, 2, n), rng.integers(-1, 2, n)
    evaluator = GenerationEvaluator(oracle.asked([(7,), (30,)], labels, task=task), FREE)
    result = evaluator.score(outputs_of(written))
    other = np.where(written == -1, 2, written)
    known = {
        "accuracy": np.mean(written == labels),
        "f1": f1_score(labels == 1, written == 1),
        "matthews_correlation": matthews_corrcoef(labels, other),
    }
    assert (written == -1).any()
    assert result.scores["exact_match"] == pytest.approx(np.mean(written == labels))
    assert {m: result.scores[m] for m in task.metrics} == pytest.approx(
        {m: known[m] for m in task.metrics}
    )
    assert sum(result.predicted_shares.values()) + result.invalid_share == pytest.approx(1)
    assert result.invalid_share == pytest.approx(np.mean(written == -1))
    assert list(result.predicted_shares) == list(task.labels)
    assert evaluator.loss(outputs_of(written)) is None and result.auc is None
    metric = known[task.primary]
    draws = [rng.integers(n, size=n) for _ in range(300)]
    if task.primary == "accuracy":
        spread = np.std([np.mean(written[i] == labels[i]) for i in draws])
        assert result.score == pytest.approx(metric)
    else:
        spread = np.std([matthews_corrcoef(labels[i], other[i]) for i in draws])
    assert result.stderr == pytest.approx(spread, rel=0.25)


def test_answers_that_are_all_invalid_score_nothing(oracle):
    labels = np.array([0, 1] * 7)
    evaluator = GenerationEvaluator(oracle.asked([(7,), (30,)], labels, task=TASKS["mrpc"]), FREE)
    result = evaluator.score(outputs_of(np.full(14, INVALID)))
    assert set(result.scores.values()) == {0.0} and result.stderr == 0.0
    assert result.invalid_share == 1.0 and set(result.predicted_shares.values()) == {0.0}


@pytest.mark.slow
def test_an_invalid_number_is_the_one_below_the_lowest(oracle):
    labels = np.linspace(0, 5, 14)
    words, answers = ("0.0", "2.5", "5.0"), [(7,), (30,), (61,)]
    asked = oracle.asked(answers, labels, task=TASKS["stsb"], words=words)
    written = np.array([0, 1, 2, -1] * 3 + [0, 2])
    evaluator = GenerationEvaluator(asked, FREE)
    predictions = evaluator.predictions(outputs_of(written))
    np.testing.assert_array_equal(predictions, np.array([0.0, 2.5, 5.0, -1.0])[written])
    result = evaluator.score(outputs_of(written))
    assert result.score == pytest.approx(np.corrcoef(predictions, labels)[0, 1])


@pytest.mark.parametrize("answers", [NESTED, SEVERAL, ONE_LENGTH["one token"]])
@pytest.mark.parametrize("how", [CONSTRAINED, FREE])
def test_a_diverged_model_is_refused(oracle, how, answers):
    with torch.no_grad():
        next(oracle.model.parameters())[:] = torch.nan
    evaluator = GenerationEvaluator(oracle.asked(answers), how)
    with pytest.raises(RunFailed, match="are not finite"):
        evaluator.score(evaluator.predict(oracle.model))


@pytest.mark.parametrize("how", [CONSTRAINED, FREE])
def test_generation_draws_no_random_numbers_and_restores_the_mode(oracle, how):
    state = torch.get_rng_state()
    oracle.model.train()
    GenerationEvaluator(oracle.asked(NESTED), how).predict(oracle.model)
    assert oracle.model.training and torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def flan():
    from pem_composition.evaluation.models import load_seq2seq

    return load_seq2seq(fetched("flan-t5-small"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rte", "sst2", "mnli", "cola"])
def test_real_answers_agree_however_they_are_found(flan, shared, name, one_thread):
    model, tokenizer, _ = flan
    folder = shared / "data" / "glue"
    data = load_task(name, RowFiles(data_dir=folder, splits=("validation",), max_eval_samples=16))
    outputs, results = {}, {}
    for how in ANSWERS:
        objective = Answers(found=how)
        evaluator = objective.evaluator(data.task, data.validation, tokenizer, model.config)
        outputs[how] = evaluator.predict(model)
        results[how] = evaluator.score(outputs[how])
    best = outputs[SCORING][:, :-1].argmax(1)
    np.testing.assert_array_equal(outputs[CONSTRAINED][:, 0], best)
    np.testing.assert_array_equal(outputs[FREE][:, 0], outputs[SCORING][:, -1])
    assert results[CONSTRAINED].score == results[SCORING].score
    assert results[CONSTRAINED].invalid_share == 0
    assert results[FREE].invalid_share == results[SCORING].invalid_share
    assert results[FREE].scores["exact_match"] == results[SCORING].scores["exact_match"]


@pytest.mark.slow
def test_real_numbers_agree_with_beams_enough_and_the_end_token(flan, shared, one_thread):
    """STS-B: 26 answers of one and two tokens, so beam search counts the end token."""
    from pem_composition.evaluation.prompted_rows import score_answers

    model, tokenizer, _ = flan
    folder = shared / "data" / "glue"
    data = load_task("stsb", RowFiles(data_dir=folder, splits=("validation",), max_eval_samples=4))
    evaluator = Answers().evaluator(
        data.task, data.validation, tokenizer, model.config, batch_size=4
    )
    inputs, end = batch_of(evaluator).inputs, evaluator.writing.end
    closed = [(*answer, end) for answer in evaluator.answers]
    with torch.inference_mode():
        written = constrained(model, inputs, evaluator.answers, evaluator.writing, beams=26)
        scores = score_answers(model, [inputs], closed, evaluator.writing)[:, :-1]
    numbers = answer_numbers(written.tokens, evaluator.answers, end)
    torch.testing.assert_close(written.log_p, scores.max(1).values, rtol=1e-4, atol=1e-4)
    chosen = scores.gather(1, numbers[:, None])[:, 0]
    torch.testing.assert_close(chosen, scores.max(1).values, rtol=1e-4, atol=1e-4)
