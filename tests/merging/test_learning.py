"""Learned coefficients: the blended model, its gradients in float64, and what learning finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.float64_rows import evaluator, logits, model_and_modules, wide
from support.tiny_models import inputs_for, logits_of, random_module, tiny

import pem_composition as library
from pem_composition.adapters import attach, wearing
from pem_composition.adapters.plan import check_layers
from pem_composition.errors import DataError, PEMError
from pem_composition.merging import learning
from pem_composition.merging.blend import Blend
from pem_composition.merging.learning import LearningRule, Lesson, constrained, learn
from pem_composition.merging.null_space import row_spaces

pytestmark = pytest.mark.usefixtures("one_thread")
COEFFICIENTS = (0.7, -0.4)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_blend_computes_with_the_exact_sum_of_updates(kind, name):
    model, modules = model_and_modules(kind, name=name)
    together = library.combine(modules, COEFFICIENTS, space="delta", head="none")
    before = logits_of(model)
    with attach(model, together):
        expected = logits_of(model).detach()
    with Blend(model, modules) as blend:
        blend.coefficients = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None]
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits_of(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_every_layer_has_its_own_coefficients():
    model, modules = model_and_modules()
    with Blend(model, modules) as blend:
        draw = torch.Generator().manual_seed(3)
        c = torch.randn(2, len(blend.layers), generator=draw, dtype=torch.float64)
        blend.coefficients = c
        found, layers = logits_of(model).detach(), blend.layers
    parts = []
    for place, module in enumerate(modules):
        scaled = {
            n: t * c[place, layers.index(n.rpartition(".")[0])] if n.endswith("lora_B") else t
            for n, t in module.tensors.items()
        }
        parts.append(replace(module, tensors=scaled))
    with attach(model, library.combine(parts, (1, 1), space="delta", head="none")):
        torch.testing.assert_close(found, logits_of(model), rtol=1e-9, atol=1e-9)


def test_modules_of_different_rank_and_layers_blend():
    model = tiny("roberta").double()
    a = wide(random_module(tiny("roberta"), seed=1, r=2, alpha=3))
    b = wide(random_module(tiny("roberta"), seed=2, r=3, alpha=2, target_modules=("value",)))
    with attach(model, library.combine([a, b], COEFFICIENTS, space="delta", head="none")):
        expected = logits_of(model).detach()
    with Blend(model, [a, b]) as blend:
        blend.coefficients = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None]
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["none", "clamp", "softmax"])
@pytest.mark.parametrize(
    ("kind", "loss", "task"),
    [
        ("lora", "entropy", "mnli"), ("ia3", "labels", "mnli"), ("lora", "labels", "stsb"),
        ("lora", "null_space", "stsb"),
    ],
)  # fmt: skip
def test_gradients_of_the_coefficients_are_right(kind, loss, task, constraint):
    model, modules = model_and_modules(kind)
    rows = row_spaces(model, modules[0]) if loss == "null_space" else None
    found = evaluator(3, size=1 if rows else 3, task=task)
    head = regression_head() if task == "stsb" else modules[0].head_tensors()
    lesson = Lesson(task, found, head, rows)
    with Blend(model, modules) as blend:
        draw = torch.Generator().manual_seed(5)
        raw = torch.rand(2, len(blend.layers), generator=draw, dtype=torch.float64)

        def value(raw_TL: torch.Tensor) -> torch.Tensor:
            blend.coefficients = constrained(raw_TL, constraint)
            return learning._loss(model, lesson, found.batches[0], loss)

        assert torch.autograd.gradcheck(value, raw.requires_grad_(), rtol=1e-4, atol=1e-8)


def test_losses_are_what_they_are_called():
    model, (module, _) = model_and_modules()
    found = evaluator(6, size=4)
    with attach(model, module), torch.no_grad():
        p = np.stack([row.softmax(0).numpy() for row in logits(model, found)])
        parts = [(found.forward(model, b.inputs), b) for b in found.batches]
    for loss, expected in (
        ("entropy", -(p * np.log(p)).sum(1)),
        ("labels", -np.log(p[np.arange(6), found.labels])),
    ):
        for outputs, batch in parts:
            value = learning.loss_of(found, outputs, found.labels[batch.rows], loss)
            assert float(value) == pytest.approx(expected[batch.rows].mean(), rel=1e-6)


def regression_head() -> dict[str, torch.Tensor]:
    """A head with one output."""
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(1, 32, generator=draw, dtype=torch.float64)
    return {"classifier.out_proj.weight": weight, "classifier.out_proj.bias": weight[0, :1]}


@pytest.mark.slow
def test_learning_from_labels_finds_the_coefficients_that_made_them():
    """Squared error, and labels that a blend with known coefficients answered."""
    model, modules = model_and_modules(count=3)
    truth = torch.tensor([[0.8], [-0.3], [0.1]], dtype=torch.float64)
    lesson = Lesson("stsb", evaluator(24, "stsb", size=12), regression_head())
    with Blend(model, modules) as blend, wearing(model, lesson.head), torch.no_grad():
        blend.coefficients = truth
        lesson.evaluator.labels = torch.stack(logits(model, lesson.evaluator))[:, 0].numpy()
    rule = LearningRule("labels", scope="module", learning_rate=0.05, steps=150)
    result = learn(model, modules, [lesson], rule)
    np.testing.assert_allclose(result.coefficients, truth, atol=0.02)
    assert result.after < 1e-3 * result.before
    assert len(result.history) == 150


@pytest.mark.parametrize("scope", ["layer", "module"])
def test_adamerging_lowers_the_entropy_within_its_bounds(scope):
    model, modules = model_and_modules()
    lessons = [
        Lesson(str(i), evaluator(12, size=4, seed=i), m.head_tensors())
        for i, m in enumerate(modules)
    ]
    rule = LearningRule("entropy", scope=scope, constraint="clamp", learning_rate=0.05, steps=20)
    result = learn(model, modules, lessons, rule)
    assert result.after < result.before
    values = np.array(result.coefficients)
    assert values.shape == (2, len(result.layers) if scope == "layer" else 1)
    assert values.min() >= 0 and values.max() <= 1
    assert result.of(1).keys() == set(modules[0].layers)


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_the_null_space_loss_is_the_part_of_the_inputs_that_the_module_does_not_see(name):
    """By projection on the whole null space of each A, and inputs recorded by hand."""
    model, modules = model_and_modules(name=name)
    lesson = Lesson("a", evaluator(1), None, row_spaces(model, modules[0]))
    inputs: dict[str, list[np.ndarray]] = {}
    with Blend(model, modules) as blend, torch.no_grad():
        blend.coefficients = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None]
        handles = [
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _m, x, n=layer: inputs.setdefault(n, []).extend(x[0].flatten(0, 1).numpy())
            )
            for layer in lesson.rows
        ]
        found = float(learning._loss(model, lesson, lesson.evaluator.batches[0], "null_space"))
    for handle in handles:
        handle.remove()
    means = []
    for live, own in check_layers(model, modules[0]).items():
        A = modules[0].tensors[f"{live}.lora_A"].numpy()
        null = np.linalg.svd(A)[2][np.linalg.matrix_rank(A) :]
        x = np.stack(inputs[own])
        means.append((np.linalg.norm(x @ null.T, axis=1) / np.linalg.norm(x, axis=1)).mean())
    assert found == pytest.approx(np.mean(means), rel=1e-9)


@pytest.mark.slow
def test_nsc_lowers_its_loss_on_a_regression_without_labels():
    model, modules = model_and_modules()
    lessons = [
        Lesson(task, evaluator(6, task, seed=i), None, row_spaces(model, m))
        for i, (task, m) in enumerate(zip(("mnli", "stsb"), modules, strict=True))
    ]
    rule = LearningRule("null_space", learning_rate=0.05, steps=10, batches=3)
    result = learn(model, modules, lessons, rule)
    assert result.after < result.before and len(result.history) == 10
    lessons[1].evaluator.labels = None
    assert learn(model, modules, lessons, rule) == result


def test_a_module_without_a_null_space_is_refused():
    model = tiny("roberta").double()
    with pytest.raises(PEMError, match=r"about the rows of LoRA's A; found kind ia3"):
        row_spaces(model, model_and_modules("ia3")[1][0])
    with pytest.raises(PEMError, match=r"no layer has a null space"):
        row_spaces(model, random_module(tiny("roberta"), r=32))


def test_softmax_shares_start_equal_and_sum_to_one():
    model, modules = model_and_modules(count=3)
    lesson = Lesson("mnli", evaluator(8, size=4), modules[0].head_tensors())
    rule = LearningRule("labels", constraint="softmax", steps=0)
    start = np.array(learn(model, modules, [lesson], rule).coefficients)
    np.testing.assert_allclose(start, 1 / 3)
    moved = np.array(learn(model, modules, [lesson], replace(rule, steps=5)).coefficients)
    np.testing.assert_allclose(moved.sum(0), 1)
    assert np.abs(moved - start).max() > 1e-3


def test_equal_seeds_learn_equal_coefficients():
    model, modules = model_and_modules()
    lesson = Lesson("mnli", evaluator(12, size=4), modules[0].head_tensors())
    rule = LearningRule("labels", steps=4)
    runs = [learn(model, modules, [lesson], rule).coefficients for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != learn(model, modules, [lesson], replace(rule, seed=1)).coefficients


def test_a_regression_has_no_entropy():
    with pytest.raises(DataError, match="have no entropy"):
        learning.loss_of(evaluator(2, "stsb"), torch.zeros(2, 1), [0, 1], "entropy")


def test_a_model_that_holds_modules_is_not_blended():
    model, modules = model_and_modules()
    with attach(model, modules[0]), pytest.raises(PEMError, match="holds modules"):
        Blend(model, modules)


def test_the_inputs_are_those_of_the_tiny_model():
    """``evaluator`` and ``logits`` read the same rows: batches only pad."""
    model = model_and_modules()[0].double()
    found = evaluator(5, size=3)
    with torch.no_grad():
        padded = torch.cat([found.forward(model, b.inputs) for b in found.batches])
        alone = torch.stack(logits(model, found))
    torch.testing.assert_close(padded, alone)
    assert inputs_for(model)["input_ids"].shape == (2, 9)
