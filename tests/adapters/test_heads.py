"""Heads: which parameters they are, loading them, and giving the model its own back."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import inputs_for, logits_of, random_module, tiny
from transformers import AutoModelForSequenceClassification

from pem_composition.adapters import attach, fold, head_parameter_names
from pem_composition.adapters.heads import head_info
from pem_composition.errors import IncompatibleModules
from pem_composition.module import PEM


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", ["classifier.weight", "classifier.bias"]),
        (
            "distilbert",
            [
                "pre_classifier.weight",
                "pre_classifier.bias",
                "classifier.weight",
                "classifier.bias",
            ],
        ),
        (
            "deberta-v3",
            ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"],
        ),
        ("gpt2", []),
        ("t5", []),
        ("bart", []),
        ("llama", []),
    ],
)
def test_heads_are_what_lies_outside_the_base_model(name: str, expected: list[str]) -> None:
    assert list(head_parameter_names(tiny(name))) == expected


def test_newly_initialised_parameters_inside_the_base_belong_to_the_head(tmp_path) -> None:
    whole = tiny("bert")
    state = {n: t for n, t in whole.bert.state_dict().items() if not n.startswith("pooler")}
    whole.bert.save_pretrained(tmp_path, state_dict=state)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    names = [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    assert list(head_parameter_names(model, info)) == names


def test_head_info_reads_labels_and_regression() -> None:
    model = tiny("roberta")
    names = head_parameter_names(model)
    info = head_info(model, names)
    assert info is not None and info.problem == "classification" and len(info.labels) == 3
    model.config.problem_type = "regression"
    info = head_info(model, names)
    assert info is not None and info.problem == "regression" and info.labels == ()
    assert head_info(tiny("gpt2"), ()) is None


def test_a_head_of_another_shape_or_name_is_refused_unless_ignored() -> None:
    model = tiny("roberta")
    module = random_module(model, seed=1)
    binary = PEM(
        {n: t[:2] if "out_proj" in n else t for n, t in module.tensors.items()}, module.config
    )
    with pytest.raises(
        IncompatibleModules, match=r"\(2, 32\) in the module, expected \(3, 32\) in Roberta"
    ):
        attach(model, binary)
    tensors = {n.replace("classifier.dense", "score"): t for n, t in module.tensors.items()}
    renamed = PEM(tensors, module.config)
    message = (
        r"no such parameter; found head parameters classifier\.dense\.weight \(32, 32\).*'ignore'"
    )
    with pytest.raises(IncompatibleModules, match=message):
        fold(model, renamed)
    with pytest.raises(IncompatibleModules, match=r"head classifier.*no such parameter"):
        attach(model.roberta, module)
    with attach(model, binary, head="ignore"):
        ignored = logits_of(model)
    with attach(model, module, head="ignore"):
        assert torch.equal(logits_of(model), ignored)


@pytest.mark.parametrize("hold", [attach, fold])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_language_model_head_is_untied_from_the_embedding_and_tied_again(name: str, hold) -> None:
    model = tiny(name)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before, base = embedding.clone(), logits_of(model)
    own = torch.randn(96, 32, generator=torch.Generator().manual_seed(3))
    module = random_module(model, seed=1)
    with_head = PEM({**module.tensors, "lm_head.weight.head": own}, module.config)
    batch = inputs_for(model)
    with attach(model, module):
        hidden = _last_hidden(model, batch)
    scale = 32**-0.5 if name == "t5" else 1.0
    with hold(model, with_head) as held:
        torch.testing.assert_close(logits_of(model), scale * hidden @ own.T, rtol=1e-4, atol=1e-4)
        assert torch.equal(embedding, before) and model.lm_head.weight is not embedding
        held.swap(PEM({**module.tensors, "lm_head.weight.head": 2 * own}, module.config))
        torch.testing.assert_close(
            logits_of(model), 2 * scale * hidden @ own.T, rtol=1e-4, atol=1e-4
        )
        held.swap(module)
        assert model.lm_head.weight is embedding
    assert model.lm_head.weight is embedding and torch.equal(logits_of(model), base)


def _last_hidden(model, batch):
    out = model(**batch, output_hidden_states=True)
    return (out.decoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states)[-1]
