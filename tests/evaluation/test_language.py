"""Language modelling of a domain: the model's own loss on the same blocks."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.tiny_models import write_text_to_text

from pem_composition.errors import DataError, RunFailed, UsageError
from pem_composition.evaluation.models import load_seq2seq
from pem_composition.objectives.next_block import NextBlocks
from pem_composition.tasks.data import RowFiles
from pem_composition.tasks.document_rows import LANGUAGE, load_documents

WORDS = [f"w{i}" for i in range(12)]
SIZE = 7


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny T5 with its tokenizer, and documents."""
    folder = tmp_path_factory.mktemp("language")
    base = write_text_to_text(folder / "t5", [" ".join(WORDS)] * 20)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 15))) for _ in range(20)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "dev.jsonl").write_text(rows)
    data = load_documents(
        None, RowFiles(validation_file=folder / "dev.jsonl", splits=("validation",))
    )
    return load_seq2seq(base), texts, data.validation


def evaluator_of(language, **layout):
    (model, tokenizer, _), _, documents = language
    objective = NextBlocks(max_seq_length=SIZE)
    return objective.evaluator(LANGUAGE, documents, tokenizer, model.config, **layout)


def blocks_by_hand(tokenizer, texts):
    """Every document with the end token that the tokenizer writes itself."""
    stream = [token for text in texts for token in tokenizer(text).input_ids]
    assert stream.count(tokenizer.eos_token_id) == len(texts)
    whole = len(stream) // SIZE * SIZE
    return torch.tensor(stream[:whole]).reshape(-1, SIZE)


def test_the_loss_is_the_model_s_own_on_the_same_blocks(language, one_thread):
    (model, tokenizer, _), texts, _ = language
    evaluator = evaluator_of(language)
    outputs = evaluator.predict(model)
    blocks = blocks_by_hand(tokenizer, texts)
    assert len(outputs) == evaluator.size == len(blocks) - 1 > 8
    with torch.no_grad():
        whole = model(input_ids=blocks[:-1], labels=blocks[1:]).loss.item()
        single = [
            model(input_ids=source[None], labels=target[None]).loss.item()
            for source, target in pairwise(blocks)
        ]
    assert evaluator.loss(outputs) == pytest.approx(whole, rel=1e-6)
    np.testing.assert_allclose(evaluator.predictions(outputs), single, rtol=1e-5)
    assert np.ptp(single) > 0.1  # blocks differ: a wrong order would show
    result = evaluator.score(outputs)
    assert result.score == result.scores["loss"] == pytest.approx(whole, rel=1e-6)
    assert result.scores["perplexity"] == pytest.approx(math.exp(whole), rel=1e-5)
    assert result.stderr == pytest.approx(np.std(single, ddof=1) / math.sqrt(len(single)), rel=1e-4)
    assert (result.metric, result.n, result.invalid_share) == ("loss", len(single), None)


def test_neither_batches_nor_padding_change_a_block(language, one_thread):
    model = language[0].model
    one = evaluator_of(language, batch_size=1).predict(model)
    other = evaluator_of(language, batch_size=5).predict(model)
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(one[:, 1], SIZE)


def test_a_document_is_not_cut_at_the_model_s_length(language):
    (model, tokenizer, _), texts, _ = language
    tokenizer.model_max_length, before = 8, tokenizer.model_max_length
    try:
        assert evaluator_of(language).size == len(blocks_by_hand(tokenizer, texts)) - 1
    finally:
        tokenizer.model_max_length = before
    assert model.config.is_encoder_decoder


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_fails_the_run(language, value):
    evaluator = evaluator_of(language)
    outputs = np.ones((evaluator.size, 2), np.float32)
    outputs[2, 0] = value
    with pytest.raises(RunFailed, match="the loss of a row is not finite"):
        evaluator.score(outputs)


def test_too_little_text_is_refused(language):
    (model, tokenizer, _), _, documents = language
    with pytest.raises(DataError, match=r"fewer than two blocks; found .* expected at least 128"):
        NextBlocks(max_seq_length=64).evaluator(LANGUAGE, documents[:1], tokenizer, model.config)


def test_padding_counts_nothing_and_blocks_are_not_cut(language):
    model = language[0][0]
    padded = evaluator_of(language, pad_to=SIZE + 3).predict(model)
    np.testing.assert_allclose(padded, evaluator_of(language).predict(model), rtol=1e-4)
    with pytest.raises(
        UsageError, match=f"--block_size: longer .* found {SIZE} tokens to read, expected at most"
    ):
        NextBlocks(max_seq_length=SIZE).within(SIZE - 1)
