"""Fisher and Gram of a module, against gradients and inputs taken by hand in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.float64_rows import evaluator, logits, model_and_modules, rows
from support.tiny_models import tiny
from torch.func import functional_call

from pem_composition.adapters import attach
from pem_composition.adapters.plan import check_layers
from pem_composition.errors import DataError, PEMError
from pem_composition.evaluation import padded
from pem_composition.evaluation.encoded import Writing, causal_rows
from pem_composition.evaluation.language import LANGUAGE, LanguageEvaluator
from pem_composition.evaluation.prompted_rows import PromptedRows, ScoringEvaluator
from pem_composition.merging.fisher_information import EMPIRICAL, EXACT, diagonal, parameters_of
from pem_composition.merging.gram_matrices import gram
from pem_composition.merging.null_space import NullSpace, row_space, shares
from pem_composition.module import PEM
from pem_composition.tasks.glue import TASKS
from pem_composition.tasks.prompts import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(model: torch.nn.Module, module: PEM, tensors: dict) -> dict[str, torch.Tensor]:
    """The model's parameters with the module folded in, as a function of its tensors."""
    state = dict(model.named_parameters())
    for layer in module.layers:
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        if module.kind == "lora":
            product = tensors[f"{layer}.lora_B"] @ tensors[f"{layer}.lora_A"]
            state[f"{layer}.weight"] = weight + module.config.scaling(layer) * product
            continue
        factor = tensors[f"{layer}.ia3"]
        inputs = module.config.scales_input(layer)
        state[f"{layer}.weight"] = weight * (factor if inputs else factor[:, None])
        state[f"{layer}.bias"] = bias if inputs else bias * factor
    return state | {n.removesuffix(".head"): t for n, t in tensors.items() if n.endswith(".head")}


def by_hand(model, module: PEM, found, expectation: str) -> dict[str, np.ndarray]:
    """1/N sum_x sum_y p(y|x) J_y^2, J the Jacobian of the log-probabilities of one row."""
    names = sorted(module.tensors)
    total: dict = dict.fromkeys(names, 0.0)
    for ids, label in zip(rows(found.size), found.labels, strict=True):

        def log_p(*values: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
            state = changed(model, module, dict(zip(names, values, strict=True)))
            out = functional_call(model, state, kwargs={"input_ids": ids}).logits[0]
            return out if found.task.regression else out.log_softmax(0)

        values = tuple(module.tensors[n] for n in names)
        given = log_p(*values).detach()
        if found.task.regression:
            weights = [1.0 if expectation == EXACT else float((given[0] - label) ** 2)]
        elif expectation == EXACT:
            weights = given.exp().tolist()
        else:
            weights = [float(y == label) for y in range(len(given))]
        for name, J in zip(names, torch.autograd.functional.jacobian(log_p, values), strict=True):
            total[name] += np.tensordot(weights, J.numpy() ** 2, axes=1) / found.size
    return total


@pytest.mark.parametrize("expectation", [EXACT, EMPIRICAL])
@pytest.mark.parametrize(("kind", "task"), [("lora", "mnli"), ("ia3", "mnli"), ("lora", "stsb")])
def test_fisher_is_the_expected_squared_gradient_of_each_row(kind, task, expectation):
    model, (module, _) = model_and_modules(kind)
    if task == "stsb":
        model, module = one_output(model, module)
    found = evaluator(4, task)
    expected = by_hand(model, module, found, expectation)
    with attach(model, module, trainable=True) as attachment:
        computed = diagonal(model, parameters_of(attachment), found, expectation=expectation)
    assert computed.keys() == expected.keys()
    for name, value in computed.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-7, atol=1e-16, err_msg=name)


def one_output(model, module: PEM):
    """The classifier as a regression."""
    for name in ("weight", "bias"):
        parameter = getattr(model.classifier.out_proj, name)
        setattr(model.classifier.out_proj, name, torch.nn.Parameter(parameter[:1].detach()))
    cut = {n: t[:1] if "out_proj" in n else t for n, t in module.tensors.items()}
    return model, replace(module, tensors=cut)


def test_fisher_of_the_output_layer_has_a_closed_form():
    """d log p_y / d W_c = (1[y = c] - p_c) h, so F = mean p_c (1 - p_c) h^2."""
    model, (module, _) = model_and_modules()
    found, seen = evaluator(5), []
    with attach(model, module, trainable=True) as attachment:
        hook = model.classifier.out_proj.register_forward_pre_hook(
            lambda _m, args: seen.append(args[0][0].detach())
        )
        p = torch.stack([row.detach().softmax(0) for row in logits(model, found)])
        hook.remove()
        computed = diagonal(model, parameters_of(attachment), found)
    h = torch.stack(seen)
    expected = torch.einsum("nc,nh->ch", p * (1 - p), h**2) / found.size
    value = computed["classifier.out_proj.weight.head"]
    np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_fisher_of_a_whole_model_has_every_weight():
    from pem_composition.adapters import attach_fresh
    from pem_composition.config import FullConfig

    model, _ = model_and_modules()
    attachment = attach_fresh(model, FullConfig())
    computed = diagonal(model, parameters_of(attachment), evaluator(2))
    names = {n for n, _ in model.named_parameters()}
    assert {n.rpartition(".")[0] for n in computed} == names
    row = torch.autograd.grad(
        logits(model, evaluator(1))[0].log_softmax(0)[0], model.roberta.embeddings.LayerNorm.weight
    )
    assert row[0].abs().max() > 0
    assert computed["roberta.embeddings.LayerNorm.weight.delta"].max() > 0


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_the_references_fisher_is_empty_for_these_modules_and_ours_is_not(kind):
    """Its producer keeps parameters whose names contain "adapters"; those of LoRA and (IA)^3 are
    called "loras" there, so that -w fisher has nothing to weigh by."""
    model, (module, _) = model_and_modules(kind)
    with attach(model, module, trainable=True) as attachment:
        computed = diagonal(model, parameters_of(attachment), evaluator(3))
    adapter = {n: f for n, f in computed.items() if not n.endswith(".head")}
    assert adapter.keys() == module.adapter_tensors().keys()
    # A direction of no effect is rare: nearly every entry says something.
    assert all((f > 0).double().mean() > 0.9 for f in adapter.values())


def test_training_mode_and_gradients_are_as_before():
    model, (module, _) = model_and_modules()
    model.train()
    with attach(model, module, trainable=True) as attachment:
        first = diagonal(model, parameters_of(attachment), evaluator(2))
        assert model.training
        again = diagonal(model, parameters_of(attachment), evaluator(2))
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_rows_are_taken_one_at_a_time():
    model, (module, _) = model_and_modules()
    with attach(model, module, trainable=True) as attachment, pytest.raises(PEMError, match="one"):
        diagonal(model, parameters_of(attachment), evaluator(4, size=2))


def test_rows_without_answers_have_no_fisher():
    blocks = LanguageEvaluator(LANGUAGE, evaluator(2).batches)
    with pytest.raises(DataError, match="has no fixed set of answers"):
        blocks.class_scores(torch.zeros(1, 2))


# --- Gram ---


def test_gram_is_the_second_moment_of_what_enters_the_layer():
    """Inputs of the first layer's query are the embeddings; deeper ones see the module's effect."""
    model, (module, _) = model_and_modules()
    found = evaluator(5)
    with attach(model, module):
        computed = gram(model, check_layers(model, module), found)
        hidden = [
            model(input_ids=ids, output_hidden_states=True).hidden_states
            for ids in rows(found.size)
        ]
    assert computed.keys() == {f"{layer}.gram" for layer in module.layers}
    for depth in (0, 1):
        X = torch.cat([h[depth][0] for h in hidden]).detach().numpy()
        for part in ("query", "value"):
            value = computed[f"roberta.encoder.layer.{depth}.attention.self.{part}.gram"]
            np.testing.assert_allclose(value, X.T @ X / found.size, rtol=1e-9)


ASKED = {
    "gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_fc"),
    "llama": ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"),
    "t5": (
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.k",
    ),
}


@pytest.mark.parametrize("answers", [((5,), (6, 7, 8, 9)), ((5,), (6,))])
@pytest.mark.parametrize("name", list(ASKED))
def test_gram_of_answers_counts_each_token_that_leads_to_a_score_once(name, answers):
    """By hand without a cache: what is read before the answers once, then each answer's tokens but
    the last one, after which nothing is scored."""
    model = tiny(name).double()
    prompts = [[11, 12, 13], [14, 15, 16, 17, 18]]
    data = padded.batches(causal_rows([(row, []) for row in prompts]), batch_size=1)
    start = (0,) if name == "t5" else ()
    prompt = Prompt("own", "{sentence}", ("no", "yes"))
    asked = PromptedRows(TASKS["sst2"], prompt, answers, Writing(start, 2, 1), [0, 1], data)
    layers = {layer: layer for layer in ASKED[name]}
    found = ScoringEvaluator(asked)
    computed = gram(model, layers, found)
    spaces = {n: row_space(torch.randn(2, len(computed[f"{n}.gram"]))) for n in layers}
    with NullSpace(model, spaces) as watched, torch.no_grad():
        for batch in found.batches:
            found.forward(model, batch.inputs)
    outside = []
    for layer in layers:
        tokens: list[torch.Tensor] = []
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(layer).register_forward_pre_hook(
            lambda _layer, arguments, seen=seen: seen.append(arguments[0].detach()[0])
        )
        expected = torch.zeros(1)
        for row in prompts:
            for number, answer in enumerate(answers):
                before = [*start] if start else row
                read = torch.tensor([[*before, *answer[:-1]]])
                if start:
                    model(input_ids=torch.tensor([row]), decoder_input_ids=read, use_cache=False)
                else:
                    model(input_ids=read, use_cache=False)
                x = seen.pop()
                known = 0 if number == 0 else len(before)
                if layer.startswith("encoder.") or "EncDec" in layer:
                    known = 0 if number == 0 else len(x)
                expected = expected + x[known:].mT @ x[known:]
                tokens.append(x[known:])
        handle.remove()
        torch.testing.assert_close(computed[f"{layer}.gram"], expected / 2)
        outside.append(shares(torch.cat(tokens), spaces[layer]).mean())
    torch.testing.assert_close(watched.loss, torch.stack(outside).mean())


def test_gram_leaves_no_hook_behind():
    model, (module, _) = model_and_modules()
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    gram(model, check_layers(model, module), evaluator(2))
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before
