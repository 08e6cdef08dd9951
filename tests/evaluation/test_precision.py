"""Evaluation in bfloat16: bit-equal to autocast, weights put back, tied embeddings untouched."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models as tiny

from pem_composition.adapters import attach
from pem_composition.evaluation.precision import reduced


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", tiny.EACH)
def test_reduced_computes_what_autocast_computes(name: str, adapted: bool) -> None:
    model = tiny.tiny(name)
    if adapted:
        attach(model, tiny.random_module(model))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        exact = tiny.logits_of(model)
        with torch.autocast("cpu", torch.bfloat16):
            expected = tiny.logits_of(model)
        with reduced(model):
            found = tiny.logits_of(model)
        again = tiny.logits_of(model)
    assert found.dtype == expected.dtype
    assert found.equal(expected)
    assert not found.float().equal(exact)
    assert again.equal(exact)
    assert all(p is weights[n] for n, p in model.named_parameters())


def test_an_error_inside_gives_the_weights_back() -> None:
    model = tiny.tiny("llama")
    weights = dict(model.named_parameters())
    with pytest.raises(KeyError), reduced(model):
        raise KeyError
    assert all(p is weights[n] for n, p in model.named_parameters())


def test_not_enabled_changes_nothing() -> None:
    model = tiny.tiny("roberta")
    with torch.no_grad(), reduced(model, enabled=False):
        found = tiny.logits_of(model)
        assert found.dtype == torch.float32
        assert found.equal(tiny.logits_of(model))
