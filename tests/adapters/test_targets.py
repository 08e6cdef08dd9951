"""The target table: right layers on every model, and helpful refusals."""

from __future__ import annotations

import re

import pytest
import torch
from support.tiny_models import NAMES, logits_of, random_module, tiny
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from pem_composition.adapters import TARGETS, resolve_targets
from pem_composition.adapters.layer import features
from pem_composition.adapters.locate import linear_layers, matching_layers
from pem_composition.adapters.targets import fused_rows
from pem_composition.config import matches
from pem_composition.errors import IncompatibleModules, PEMError, UsageError

ATTENTIONS = {"bart": 6, "t5": 6, "t5-gated": 6}  # encoder, decoder and cross, two layers each
BLOCKS = {"bart": 4, "t5": 4, "t5-gated": 4}


def test_the_table_holds_every_promised_architecture() -> None:
    assert {tiny(n).config.model_type for n in NAMES} | {"gemma3"} == set(TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_two_projections_per_attention_and_one_layer_per_block(name: str) -> None:
    model = tiny(name)
    attentions, blocks = ATTENTIONS.get(name, 2), BLOCKS.get(name, 2)
    per_attention = 1 if name == "gpt2" else 2
    lora = matching_layers(model, resolve_targets(model).target_modules)
    assert len(lora) == attentions * per_attention
    for placement in ("peft", "reference"):
        targets = resolve_targets(model, "ia3", placement=placement)
        layers = matching_layers(model, targets.target_modules)
        assert len(layers) == attentions * per_attention + blocks
        feedforward = [n for n in layers if any(matches(n, t) for t in targets.feedforward_modules)]
        assert len(feedforward) == (blocks if placement == "peft" else 0)
        width = 128 if name == "gpt2" else 48
        assert {features(layers[n]) for n in feedforward} <= {(width, 32)}


def test_roberta_names_only_the_feed_forward_output_and_peft_agrees_on_the_meaning() -> None:
    targets = resolve_targets(tiny("roberta"), "ia3")
    assert targets.feedforward_modules == tuple(
        f"roberta.encoder.layer.{i}.output.dense" for i in (0, 1)
    )


@pytest.mark.parametrize("name", ["t5-gated", "llama", "gemma2"])
def test_in_a_gated_block_both_placements_are_one_function(name: str) -> None:
    """Scaling the second layer's input = scaling the output of the factor without activation."""
    from pem_composition.adapters import attach
    from pem_composition.module import PEM

    model = tiny(name)
    peft, reference = (random_module(model, "ia3", placement=p) for p in ("peft", "reference"))
    first, second = ("wi_1", "wo") if name == "t5-gated" else ("up_proj", "down_proj")
    tensors = {n.replace(f".{second}.", f".{first}."): t for n, t in peft.tensors.items()}
    assert tensors.keys() == reference.tensors.keys()
    with attach(model, peft):
        expected = logits_of(model)
    with attach(model, PEM(tensors, reference.config)):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_explicit_targets_are_kept_and_checked() -> None:
    model = tiny("bert")
    targets = resolve_targets(
        model, "ia3", ["key", "output.dense"], feedforward_modules=["output.dense"]
    )
    assert targets.target_modules == ("key", "output.dense")
    message = r"'wq' did not match any linear layer of Bert.*self\.key.*name some of these"
    with pytest.raises(IncompatibleModules, match=message.replace("'wq' ", "'wq': ")):
        resolve_targets(model, "lora", ["query", "wq"])
    with pytest.raises(
        IncompatibleModules, match=r"names a BertAttention, which is no nn\.Linear or Conv1D"
    ):
        resolve_targets(model, "lora", ["attention"])
    with pytest.raises(UsageError, match="names layers that are no target modules"):
        resolve_targets(model, "ia3", ["key"], feedforward_modules=["value"])
    with pytest.raises(UsageError, match="expected peft or reference"):
        resolve_targets(model, placement="paper")
    with pytest.raises(UsageError, match="is empty"):
        resolve_targets(model, "lora", [])


def test_head_layers_are_not_adapted() -> None:
    model = tiny("roberta")
    layers = random_module(model, target_modules=("dense",)).layers
    assert len(layers) == 6 and not any("classifier" in n for n in layers)


def neox() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
        )
    )


def test_an_unknown_architecture_needs_target_modules_and_is_told_which_there_are() -> None:
    model = neox()
    with pytest.raises(
        PEMError, match=r"'gpt_neox': has no default.*query_key_value.*--target_modules"
    ):
        resolve_targets(model)
    assert resolve_targets(model, "lora", ["query_key_value"]).target_modules == (
        "query_key_value",
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom"])
def test_fused_rows_are_the_ones_the_model_reads_query_key_and_value_from(name: str) -> None:
    """Changing value rows leaves attention weights alone; changing query or key rows does not."""
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: tiny("gpt2"),
        "gpt_neox": neox,
        "bloom": lambda: BloomForCausalLM(
            BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
        ),
    }[name]()
    model.eval().set_attn_implementation("eager")
    (layer,) = [n for n in linear_layers(model) if re.search(r"0.*(c_attn|query_key_value)$", n)]
    bias = model.get_submodule(layer).bias
    ids = torch.arange(6)[None] + 5

    def attention() -> torch.Tensor:
        return model(ids, output_attentions=True).attentions[0].detach()

    rows = fused_rows(model, layer, ("q", "k", "v"))
    assert torch.stack(rows).sum(0).eq(1).all()
    noise = torch.randn(96)
    changes = []
    for owned in rows:
        before = attention()
        with torch.no_grad():
            bias.add_(noise * owned)
        changes.append(not torch.allclose(attention(), before, atol=1e-6))
        with torch.no_grad():
            bias.sub_(noise * owned)
    assert changes[0] and not changes[2]
    # A key bias alone shifts every score of a query equally, so it takes a query that differs.
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(5)
        before = attention()
        weight = model.get_submodule(layer).weight
        weight.mul_(
            torch.where(rows[1], 2.0, 1.0)
            if name == "gpt2"
            else torch.where(rows[1], 2.0, 1.0)[:, None]
        )
    assert not torch.allclose(attention(), before, atol=1e-6)


def test_an_unknown_fused_layout_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(PEMError, match=r"order of query, key and value .* is not known"):
        fused_rows(model, "model.layers.0.self_attn.q_proj", ("q",))


def test_the_vision_tower_of_gemma3_is_left_alone() -> None:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 96,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    layers = matching_layers(model, resolve_targets(model).target_modules)
    assert len(layers) == 4 and all("language_model" in n for n in layers)
