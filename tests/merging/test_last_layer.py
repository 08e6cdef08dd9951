"""A refitted last layer is the minimum of its objective, on the inputs the live layer gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import minimize
from support import tiny_models as tiny

from pem_composition.adapters import head_parameter_names
from pem_composition.errors import DataError, IncompatibleModules
from pem_composition.evaluation.evaluator import ClassificationEvaluator
from pem_composition.evaluation.padded import Batch
from pem_composition.merging.last_layer import features, fit, last_layer
from pem_composition.tasks.glue import TASKS

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_labels": 3, "pad_token_id": 1,
}  # fmt: skip


def classifiers():
    t = transformers
    decoder = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
    return {
        "Roberta": t.RobertaForSequenceClassification(t.RobertaConfig(**SIZES)),
        "Bert": t.BertForSequenceClassification(t.BertConfig(**SIZES)),
        "DistilBert": tiny.BUILDERS["distilbert"](),
        "DebertaV2": t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**SIZES)),
        "MPNet": t.MPNetForSequenceClassification(t.MPNetConfig(**SIZES)),
        "GPT2": t.GPT2ForSequenceClassification(
            t.GPT2Config(
                vocab_size=96, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=1
            )
        ),
        "Llama": t.LlamaForSequenceClassification(t.LlamaConfig(**decoder)),
        "Qwen2": t.Qwen2ForSequenceClassification(t.Qwen2Config(**decoder)),
    }


@pytest.mark.parametrize("name", list(classifiers()))
def test_the_features_times_the_layer_are_the_logits(name: str) -> None:
    """Pooling and the position that answers are the model's own, with rows of two lengths."""
    torch.manual_seed(0)
    model = classifiers()[name].eval()
    ids = torch.randint(3, 96, (4, 9))
    ids[2:, 6:] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    evaluator = ClassificationEvaluator(TASKS["mnli"], [0] * 4, [Batch([2, 0, 3, 1], inputs)])
    layer = last_layer(model, head_parameter_names(model), 3)
    found = features(model, layer, evaluator)
    live = model.get_submodule(layer)
    assert isinstance(live, torch.nn.Linear)
    expected = evaluator.predict(model)
    got = found @ live.weight.detach().numpy().T
    got = got if live.bias is None else got + live.bias.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def objective(flat, x, y, classes, bias, penalty):
    """The docstring's sum, written out."""
    outputs = classes or 1
    w = flat[: outputs * x.shape[1]].reshape(outputs, -1)
    b = flat[outputs * x.shape[1] :] if bias else np.zeros(outputs)
    z = x @ w.T + b
    if classes is None:
        loss = np.mean((z[:, 0] - y) ** 2) / 2
    else:
        top = z.max(axis=1, keepdims=True)
        loss = np.mean(np.log(np.exp(z - top).sum(axis=1)) + top[:, 0] - z[np.arange(len(y)), y])
    return loss + penalty / 2 * np.sum(w**2)


@pytest.mark.parametrize("classes", [2, 3, None])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_minimum_of_its_objective(classes: int | None, bias: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) * [1, 10, 0.1, 3] + 1
    x[:, 3] = 5.0  # a feature that never changes
    y = rng.normal(size=60) if classes is None else rng.integers(0, classes, 60)
    penalty = 0.05
    layer = fit(x, y, classes=classes, bias=bias, penalties=[penalty])
    spread = np.sqrt(np.mean(x.std(axis=0) ** 2))
    outputs = classes or 1
    size = outputs * 4 + (outputs if bias else 0)
    arguments = (x / spread, y, classes, bias, penalty)
    oracle = minimize(objective, np.zeros(size), arguments, method="BFGS", options={"gtol": 1e-9})
    own = (layer.weight_cd * spread).ravel()
    own = np.concatenate([own, layer.bias_c]) if layer.bias_c is not None else own
    assert objective(own, *arguments) <= oracle.fun + 1e-7
    weight = oracle.x[: outputs * 4].reshape(outputs, 4) / spread
    np.testing.assert_allclose(layer.weight_cd, weight, atol=2e-3 * np.abs(weight).max())


@pytest.mark.parametrize("classes", [2, None])
def test_inputs_that_vary_by_rounding_alone_change_no_answer(classes: int | None) -> None:
    """What a saturated tanh gives: constants, whose last bits differ from batch to batch."""
    rng = np.random.default_rng(2)
    x, new = rng.normal(size=(2, 60, 3))
    y = x[:, 0] + rng.normal(size=60) / 2
    y = y if classes is None else (y > 0).astype(int)
    constants = 1 - 2.0**-24 * rng.integers(0, 2, size=(60, 40))
    layer = fit(np.hstack([x, constants]), y, classes=classes)
    expected = fit(x, y, classes=classes, penalties=[layer.penalty * 3 / 43])  # 43 share the scale
    outputs = layer(np.hstack([new, np.full((60, 40), 1 - 2.0**-23)]))
    np.testing.assert_allclose(outputs, expected(new), atol=1e-4)


def test_the_penalty_is_the_one_whose_left_out_rows_lose_least() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 30))
    y = (x[:, 0] + rng.normal(size=80) > 0).astype(int)  # one feature tells, 29 are noise
    layer = fit(x, y, classes=2)
    assert layer.penalty == min(layer.losses, key=layer.losses.__getitem__)
    assert layer.losses[1e-3] > layer.losses[layer.penalty]
    again = fit(x, y, classes=2)
    assert np.array_equal(layer.weight_cd, again.weight_cd)


def test_a_class_without_rows_is_refused() -> None:
    x, y = np.eye(6), np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(DataError, match="rows of class '2'; found 0"):
        fit(x, y, classes=3, penalties=[0.1])
    with pytest.raises(DataError, match="too few rows of class '0'; found 3, expected at least 5"):
        fit(x, y, classes=2)


def test_a_head_without_one_last_layer_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3))
    with pytest.raises(IncompatibleModules, match="cannot be told"):
        last_layer(model, ["0.weight", "1.weight"], 3)
