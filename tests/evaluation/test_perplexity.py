"""Perplexity of tiny causal models equals a float64 computation token by token."""

from __future__ import annotations

import json
import math
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from support.tiny_models import random_module, write_causal

from pem_composition.adapters import attach
from pem_composition.errors import DataError, UsageError
from pem_composition.evaluation.decoding import Windows
from pem_composition.evaluation.long_texts import increase, perplexity, read_texts, text_evaluator
from pem_composition.evaluation.models import load_causal
from pem_composition.objectives.documents import Documents
from pem_composition.tasks.data import Example
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.tokens import begun

WORDS = [f"w{i}" for i in range(12)]
CAUSAL = ("gpt2", "llama")


@pytest.fixture(scope="module", params=CAUSAL)
def loaded(request, tmp_path_factory):
    """A tiny model whose output embeddings are its own, its tokenizer, and documents."""
    folder = tmp_path_factory.mktemp(request.param)
    base = load_causal(write_causal(folder, request.param, [" ".join(WORDS)] * 9))
    rng = np.random.default_rng(0)
    return base, [" ".join(rng.choice(WORDS, rng.integers(1, 14))) for _ in range(15)]


@torch.no_grad()
def nll(model, tokens, begin):
    """-log p of the tokens from ``begin`` on, in float64, each read from the first on: one pass
    per token, without batches, padding or targets."""
    out = []
    for place in range(begin, len(tokens)):
        wide = model(input_ids=torch.tensor([tokens[:place]])).logits[0, -1].double().numpy()
        out.append(np.log(np.exp(wide).sum()) - wide[tokens[place]])
    return out


def windows_by_hand(model, text, start, windows):
    """Sums and counts of each window; a token is counted in the first window that holds it."""
    size = windows.window - (len(start) if windows.start == "every" else 0)
    whole = [*start, *text] if windows.start == "first" else list(text)
    parts, seen = [], set(range(len(whole) - len(text)))
    if windows.start == "none" or not start:
        seen |= {0}
    for begin in range(0, len(whole), windows.stride):
        held = list(range(begin, min(begin + size, len(whole))))
        new = [i for i in held if i not in seen]
        if new:
            before = start if windows.start == "every" else []
            read = [*before, *(whole[i] for i in held)]
            parts.append((sum(nll(model, read, len(read) - len(new))), len(new)))
            seen |= set(new)
    assert seen == set(range(len(whole)))
    return np.array(parts)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["every", "first", "none"])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (12, 5), (2, 1), (60, 30)])
def test_sliding_windows_equal_float64_brute_force(loaded, one_thread, window, stride, start):
    (model, tokenizer, _), texts = loaded
    joined = "\n\n".join(texts)
    tokens = tokenizer(joined, add_special_tokens=False).input_ids[:75]
    head = [tokenizer.bos_token_id] if model.config.model_type == "llama" else []
    assert begun(tokenizer, joined)[:76] == ([*head, *tokens, *([] if head else [ANY])])
    windows = Windows(window, stride, start)
    evaluator = text_evaluator(texts, windows, tokenizer, max_tokens=75, batch_size=3)
    parts = windows_by_hand(model, tokens, head, windows)
    found = perplexity(model, evaluator)
    loss = parts[:, 0].sum() / parts[:, 1].sum()
    counted = 75 if head and start != "none" else 74
    assert (found["tokens"], found["windows"]) == (counted, len(parts))
    assert found["loss"] == pytest.approx(loss, rel=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    n, rest = len(parts), parts[:, 0] - loss * parts[:, 1]
    error = math.sqrt(n / (n - 1) * (rest**2).sum()) / parts[:, 1].sum() if n > 1 else 0
    assert found["loss_stderr"] == pytest.approx(error, rel=1e-4)
    assert found["perplexity_stderr"] == pytest.approx(error * math.exp(loss), rel=1e-4)
    kept = "none" if not head else start
    assert windows.readable(model.config, tokenizer).start == kept, "what is recorded"


def test_the_standard_error_of_equal_windows_is_that_of_their_mean(loaded):
    (model, tokenizer, _), texts = loaded
    evaluator = text_evaluator(texts, Windows(5, 4, "none"), tokenizer, max_tokens=41)
    means = evaluator.predictions(evaluator.predict(model)).astype(float)
    assert len(means) == 10
    expected = means.std(ddof=1) / math.sqrt(10)
    assert perplexity(model, evaluator)["loss_stderr"] == pytest.approx(expected, rel=1e-4)


def test_neither_batches_nor_their_padding_change_a_figure(loaded, one_thread):
    (model, tokenizer, _), texts = loaded
    found = [
        perplexity(model, text_evaluator(texts, Windows(14, 6), tokenizer, batch_size=size))
        for size in (1, 3, 99)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_documents_are_read_alone_from_their_beginning_to_their_end_token(loaded, one_thread):
    (model, tokenizer, _), texts = loaded
    examples = [Example(text, None, None, i) for i, text in enumerate(texts)]
    objective = Documents(max_seq_length=60)
    evaluator = objective.evaluator(LANGUAGE, examples, tokenizer, model.config, batch_size=4)
    outputs = evaluator.predict(model)
    by_hand = []
    for text in texts:
        tokens = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        values = nll(model, tokens, 1)
        by_hand.append((sum(values), len(values)))
    np.testing.assert_allclose(outputs, by_hand, rtol=1e-5)
    result = evaluator.score(outputs)
    sums, counts = np.sum(by_hand, axis=0)
    assert result.score == pytest.approx(sums / counts, rel=1e-6)
    assert result.scores["perplexity"] == pytest.approx(math.exp(sums / counts), rel=1e-5)


def test_a_module_changes_the_figure_and_taking_it_off_gives_it_back(loaded):
    (model, tokenizer, _), texts = loaded
    evaluator = text_evaluator(texts, Windows(16, 8), tokenizer)
    before = perplexity(model, evaluator)
    with attach(model, random_module(model)):
        assert abs(perplexity(model, evaluator)["loss"] - before["loss"]) > 1e-3
    assert perplexity(model, evaluator) == before


def test_windows_are_cut_to_the_context():
    assert Windows().within(66) == Windows(66, 33)
    assert Windows(40, 30).within(66) == Windows(40, 30)
    assert Windows(100, 20).within(66) == Windows(66, 20)
    assert Windows().within(None) == Windows(1024, 512)
    for wrong in ({"window": 1}, {"stride": 0}, {"window": 8, "stride": 9}, {"stride": 16}):
        with pytest.raises(UsageError):
            Windows(**{"window": 16, "stride": 8, **wrong})


def test_every_token_but_the_first_is_counted_once_with_the_context_it_has():
    tokens = list(range(100, 100 + 50))
    rows = Windows(12, 5).rows(tokens)
    counted = [t for _, targets in rows for t in targets if t != -100]
    assert counted == tokens[1:]
    for read, targets in rows:
        assert len(read) == len(targets) <= 11
        assert all(t in (-100, r + 1) for r, t in zip(read, targets, strict=True))
    for _, targets in rows[1:]:
        assert targets.count(-100) >= 12 - 5 - 1
    assert Windows(12, 5).rows(tokens[:12]) == [(tokens[:11], tokens[1:12])]


def test_rows_of_a_text_are_those_of_wikitext_on_the_hub(tmp_path):
    raw = tmp_path / "wiki.test.raw"
    raw.write_text(" \n = Title = \n \n A line\u2028of text . \n", encoding="utf-8")
    assert read_texts(raw) == ["", " = Title = \n", "", " A line\u2028of text . \n"]
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"text": "a\n"}) + "\n" + json.dumps({"text": ""}) + "\n")
    assert read_texts(table) == ["a\n", ""]


def test_the_raw_test_set_has_the_rows_of_the_published_one(shared):
    rows = read_texts(shared / "data" / "lm" / "wikitext2" / "wiki2.test.raw.gz")
    assert len(rows) == 4358 and rows[0] == "" and rows[1] == " = Robert Boulter = \n"


def test_texts_and_files_that_hold_nothing_are_refused(loaded, tmp_path):
    (_, tokenizer, _), _ = loaded
    with pytest.raises(DataError, match="nothing to predict"):
        text_evaluator([""], Windows(), tokenizer)
    with pytest.raises(DataError, match=r"cannot read lines; found no such file"):
        read_texts(tmp_path / "none.raw")


def test_a_whole_document_longer_than_the_context_is_refused_with_its_row(loaded):
    (model, tokenizer, _), _ = loaded
    examples = [Example("w1", None, None, 0), Example("w1 w2 " * 40, None, None, 7)]
    objective = Documents(truncate=False, max_seq_length=16)
    with pytest.raises(DataError, match=r"row 7: longer than the model's context; found .* 66"):
        objective.evaluator(LANGUAGE, examples, tokenizer, model.config)


def test_an_increase_is_the_ratio_of_perplexities_with_the_error_of_paired_windows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 9, 40)
    before = tokens * rng.uniform(2, 4, 40)
    nll = before + tokens * rng.normal(0.1, 0.02, 40)
    ratio, error, high = increase(nll, before, tokens)
    after, first = (math.exp(total.sum() / tokens.sum()) for total in (nll, before))
    assert ratio == pytest.approx(after / first - 1)
    draws = rng.integers(40, size=(4000, 40))
    samples = [(nll[d].sum() - before[d].sum()) / tokens[d].sum() for d in draws]
    assert error == pytest.approx(np.exp(samples).std(), rel=0.05)
    assert high == pytest.approx(np.expm1(np.quantile(samples, 0.975)), rel=0.02)
    assert error < 0.05 * (before / tokens).std(), "what both find hard cancels"
    assert increase(before, before, tokens) == (0.0, 0.0, 0.0)
    assert increase(nll[:1], before[:1], tokens[:1]).high == math.inf
