"""Predictions do not depend on batching, padding or order; scores are those of the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from support.tiny_models import VOCABULARY, tiny, write_causal
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation.encoded import EncodedDataset, encode
from pem_composition.evaluation.evaluator import classification_evaluator
from pem_composition.evaluation.models import load_base
from pem_composition.evaluation.padded import batches
from pem_composition.objectives.classification import Classification
from pem_composition.tasks.data import Example
from pem_composition.tasks.glue import TASKS

PAD = 1


def random_rows(n: int = 23, seed: int = 0) -> EncodedDataset:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, VOCABULARY, rng.integers(3, 40)).tolist() for _ in range(n)]
    masks = [[1] * len(row) for row in ids]
    labels = tuple(int(v) for v in rng.integers(0, 3, n))
    padding = {"input_ids": PAD, "attention_mask": 0}
    return EncodedDataset({"input_ids": ids, "attention_mask": masks}, labels, padding)


def predict(model, data, **layout):
    """Logits (n, c), in the order of the rows."""
    return classification_evaluator(TASKS["mnli"], data, **layout).predict(model)


def score(task, logits, labels):
    data = EncodedDataset({"input_ids": [[1]] * len(labels)}, tuple(labels), {"input_ids": PAD})
    return classification_evaluator(task, data).score(logits)


def one_by_one(model: torch.nn.Module, data: EncodedDataset) -> np.ndarray:
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits[0].numpy() for ids in data.inputs["input_ids"]]
    return np.stack(rows)


BATCHINGS = [
    {"batch_size": 1},
    {"batch_size": 7},
    {"batch_size": 64},
    {"batch_size": 64, "token_budget": 90},
    {"batch_size": 8, "pad_to": 64},
]


@pytest.mark.parametrize("name", ["roberta", "bert", "mpnet", "distilbert", "deberta-v2"])
def test_padded_batches_give_the_logits_of_single_unpadded_rows(name):
    model, data = tiny(name).double(), random_rows()
    expected = one_by_one(model, data)
    assert np.ptp(expected, axis=0).min() > 0.01  # rows differ, so that a wrong order would show
    for batching in BATCHINGS:
        logits = predict(model, data, **batching)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-6)  # rounded to float32


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_answers_behind_a_row_s_last_token_whatever_the_batch(tmp_path, name):
    """Its config.json names another padding token than the tokenizer pads with, and one text is
    empty: GPT-2 reads the start token of it."""
    base = write_causal(tmp_path / name, name, ["w1 w2 good bad"])
    torch.manual_seed(0)
    model, tokenizer, _ = load_base(base, TASKS["sst2"])
    texts = ["w1", "good w2 bad w1 w2", "", "w2 w1 good"]
    data = encode(tokenizer, [Example(text, None, 0, i) for i, text in enumerate(texts)])
    expected = []
    for text in texts:
        ids = tokenizer(text).input_ids or [tokenizer.bos_token_id]
        with torch.no_grad():
            states = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            expected.append((model.score.weight @ states).numpy())
    for size in (1, 2, 4):
        found = predict(model, data, batch_size=size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_are_cut_where_the_model_s_context_ends_whoever_asks(tmp_path, name):
    """Rotary positions go on beyond it without an error, to inputs that no training has seen."""
    base = write_causal(tmp_path / name, name, ["w1 w2 good bad"])
    model, tokenizer, _ = load_base(base, TASKS["sst2"])
    context = model.config.max_position_embeddings
    rows = [Example("good w1 bad w2 " * n, None, 0, n) for n in (1, 40, 60)]
    long, cut = (
        Classification(max_seq_length=n).evaluator(TASKS["sst2"], rows, tokenizer, model.config)
        for n in (4 * context, context)
    )
    np.testing.assert_array_equal(long.predict(model), cut.predict(model))
    encoded = Classification(max_seq_length=4 * context).encode(
        TASKS["sst2"], rows, tokenizer, model.config
    )
    assert max(map(len, encoded.inputs["input_ids"])) == context


def test_prepared_batches_give_the_same_logits_and_leave_the_model_as_it_was():
    model = tiny("roberta").train()
    prepared = classification_evaluator(TASKS["mnli"], random_rows(), batch_size=5)
    np.testing.assert_array_equal(prepared.predict(model), prepared.predict(model))
    assert model.training


def test_a_bfloat16_model_gives_float32_logits():
    assert predict(tiny("roberta").bfloat16(), random_rows(4)).dtype == np.float32


row_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(row_lengths, st.integers(1, 9), st.integers(1, 120))
def test_batches_hold_every_row_once_within_their_limits(lengths, batch_size, budget):
    ids = [[7] * n for n in lengths]
    data = EncodedDataset({"input_ids": ids}, (0,) * len(ids), {"input_ids": PAD})
    made = batches(data, batch_size=batch_size, token_budget=budget)
    assert sorted(i for b in made for i in b.rows) == list(range(len(ids)))
    widths = []
    for batch in made:
        shape = tuple(batch.inputs["input_ids"].shape)
        widths.append(shape[1])
        assert shape == (len(batch.rows), max(lengths[i] for i in batch.rows))
        assert shape[0] <= batch_size
        assert shape[0] == 1 or shape[0] * shape[1] <= budget
    assert widths == sorted(widths, reverse=True)


def test_dynamic_padding_spends_fewer_tokens_than_padding_to_the_maximum():
    data = random_rows(100)
    spent = [sum(b.inputs["input_ids"].numel() for b in batches(data, batch_size=10, pad_to=w))
             for w in (None, 40)]  # fmt: skip
    assert spent[0] < 1.15 * sum(data.lengths)
    assert spent[1] == 100 * 40


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def test_encoding_keeps_pairs_segments_and_row_order(tokenizer):
    data = encode(tokenizer, [Example("a b", "c", 1, 0), Example("d", "e f g", 0, 1)])
    assert data.inputs["input_ids"] == [[1, 4, 5, 2, 6, 2], [1, 7, 2, 8, 9, 10, 2]]
    assert data.inputs["token_type_ids"] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert data[0] == {
        "input_ids": [1, 4, 5, 2, 6, 2], "token_type_ids": [0, 0, 0, 0, 1, 1],
        "attention_mask": [1] * 6, "labels": 1,
    }  # fmt: skip
    (batch,) = batches(data)
    assert batch.rows == [1, 0]
    assert batch.inputs["input_ids"][1].tolist() == [1, 4, 5, 2, 6, 2, 0]
    assert batch.inputs["attention_mask"][1].tolist() == [1] * 6 + [0]


def test_long_rows_are_cut_the_longer_text_first(tokenizer):
    data = encode(tokenizer, [Example("a " * 50, "b c", 0, 0)], max_seq_length=12)
    assert data.lengths == [12]
    assert data.inputs["input_ids"][0][-4:] == [2, 5, 6, 2]
    with pytest.raises(DataError, match="--max_seq_length: too short; found 4"):
        encode(tokenizer, [Example("a", None, 0, 0)], max_seq_length=4)


def test_the_collator_of_transformers_pads_the_rows(tokenizer):
    from transformers import DataCollatorWithPadding

    data = encode(tokenizer, [Example("a b", None, 1, 0), Example("d", None, 0, 1)])
    batch = DataCollatorWithPadding(tokenizer)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[1, 4, 5, 2], [1, 7, 2, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_an_evaluation_scores_its_own_predictions():
    model, data, task = tiny("roberta"), random_rows(60), TASKS["mnli"]
    evaluator = classification_evaluator(task, data, batch_size=9)
    result = evaluator.score(evaluator.predict(model), seconds=2.0)
    answers = one_by_one(model, data).argmax(axis=1)
    p = np.mean(answers == np.array(data.labels))
    assert (result.task, result.metric, result.n) == ("mnli", "accuracy", 60)
    assert result.score == result.scores["accuracy"] == pytest.approx(p)
    assert result.stderr == pytest.approx(np.sqrt(p * (1 - p) / 60))
    assert result.predicted_shares["neutral"] == pytest.approx(np.mean(answers == 1))
    assert result.auc is None
    assert result.seconds == 2.0
    f1 = f1_score(data.labels, answers, average="macro")
    assert result.to_dict()["scores"] == {"accuracy": result.score, "f1_macro": pytest.approx(f1)}


def test_a_module_that_predicts_one_class_is_named_although_it_ranks():
    labels = np.arange(100) % 2
    logits = np.stack([np.zeros(100), 10 + labels], axis=1)
    result = score(TASKS["rte"], logits, labels)
    assert result.score == 0.5
    assert result.degenerate
    assert result.predicted_shares == {"entailment": 0.0, "not_entailment": 1.0}
    assert result.auc == 1.0


def test_regression_scores_the_single_output():
    labels = np.array([0.0, 1.0, 2.0, 4.0])
    result = score(TASKS["stsb"], 3 * labels[:, None] + 1, labels)
    assert result.scores == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})
    assert (result.metric, result.auc, result.predicted_shares) == ("pearson", None, {})
    assert not result.degenerate


def test_a_logit_that_is_not_finite_fails_the_run_and_names_the_row():
    logits = np.zeros((3, 2))
    logits[1, 0] = np.nan
    with pytest.raises(RunFailed, match=r"the logits of row 1 are not finite"):
        score(TASKS["rte"], logits, np.zeros(3, dtype=int))


def test_what_cannot_be_evaluated_is_refused():
    data = random_rows(3)
    with pytest.raises(DataError, match=r"found shape \(3, 3\), expected \(rows, 2\)"):
        score(TASKS["rte"], predict(tiny("roberta"), data), [0, 1, 0])
    with pytest.raises(DataError, match="not a batch size; found 0"):
        batches(data, batch_size=0)
    hidden = EncodedDataset(data.inputs, (None,) * 3, data.padding)
    with pytest.raises(DataError, match="cannot score unlabelled rows"):
        score(TASKS["mnli"], predict(tiny("roberta"), hidden), [None] * 3)
    assert "labels" not in hidden[0]
