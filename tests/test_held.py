"""A base that stays loaded: where modules go when the model computes in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_models as tiny
from torch import nn

from pem_composition.adapters import attach
from pem_composition.evaluation.precision import reduced
from pem_composition.module import PEM, negate
from pem_composition.sweep.loaded import LoadedModel


def on_grid(name: str) -> nn.Module:
    """A model whose weights bfloat16 represents exactly, as those of most published decoders."""
    model = tiny.tiny(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def held(model: nn.Module, **options: Any) -> LoadedModel:
    return LoadedModel(lambda: (model, None), lambda model, tokenizer: None, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), reduced(model):
        return tiny.logits_of(model)


def small(model: nn.Module, kind: str = "lora") -> PEM:
    """An update below half a step of bfloat16 in most entries."""
    return negate(tiny.random_module(model, kind), 0.001)


@pytest.mark.parametrize("name", ["llama", "t5", "roberta", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_module_stands_beside_weights_that_are_rounded(name: str, kind: str) -> None:
    model = on_grid(name)
    base = {n: p.clone() for n, p in model.named_parameters()}
    module, other = small(model, kind), small(tiny.tiny(name, seed=1), kind)
    with attach(on_grid(name), module) as one:
        expected = logits(one.model)
    with attach(on_grid(name), other) as two:
        swapped = logits(two.model)
    ours = held(model, beside=True)
    ours.put(module)
    assert logits(model).equal(expected)
    ours.put(other)
    assert logits(model).equal(swapped)
    ours.close()
    assert all(p.equal(base[n]) for n, p in model.named_parameters())


def test_a_small_update_folded_into_weights_is_rounded_away() -> None:
    """The fault that standing beside them avoids: half of the update is lost, or more."""
    model = on_grid("llama")
    base = {n: p.clone() for n, p in model.named_parameters()}
    folded = held(model)
    folded.put(small(model))
    changed = [(p, base[n]) for n, p in model.named_parameters() if not p.equal(base[n])]
    assert changed
    for weight, before in changed:
        update = weight - before
        arrived = weight.to(torch.bfloat16).float() - before
        assert (arrived - update).norm() > 0.5 * update.norm()
    folded.close()


def test_a_base_in_half_precision_keeps_its_weights() -> None:
    model = on_grid("llama").to(torch.bfloat16)
    base = {n: p.clone() for n, p in model.named_parameters()}
    ours = held(model)
    ours.put(small(tiny.tiny("llama")))
    here = dict(model.named_parameters())
    kept = [n for n in base if n in here or n.replace(".weight", ".base.weight") in here]
    assert len(kept) == len(base)
    for name in base:
        now = here.get(name, here.get(name.replace(".weight", ".base.weight")))
        assert now is not None and now.equal(base[name])
