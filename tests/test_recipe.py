"""Recipes: what they hold, in memory and as JSON."""

from __future__ import annotations

import json

import pytest
import torch

from pem_composition.config import LoraConfig
from pem_composition.module import PEM, combine, negate
from pem_composition.record import MAX_DEPTH, Provenance, Recipe, Source, from_json, plain, to_json


def module(name: str) -> PEM:
    tensors = {"x.q.lora_A": torch.ones(2, 3), "x.q.lora_B": torch.ones(4, 2)}
    source = Source(f"folder-of-{name}", f"runs/{name}", name * 8)
    origin = Provenance(sources=(source,))
    return PEM(tensors, LoraConfig(2, 2, ("q",)), name=name, provenance=origin)


A, B = module("a"), module("b")


def test_an_input_goes_by_the_name_it_has_in_the_expression():
    recipe = combine([A, B], [1, -0.5]).provenance.recipe
    assert [s.name for s in recipe.leaves()] == ["a", "b"]
    assert recipe.operands[0] == Source("a", "runs/a", "a" * 8)
    assert recipe.settings["coefficients"] == [1.0, -0.5]


def test_nested_sums_are_recorded_flat_and_other_functions_nested():
    nested = 2 * (A - B) + negate(A, 0.5)
    recipe = nested.provenance.recipe
    assert recipe.function == "combine"
    assert recipe.settings["coefficients"] == [2.0, -2.0, 1.0]
    assert recipe.operands[2].function == "negate"
    assert recipe.operands[2].settings == {"strength": 0.5}
    assert [s.name for s in recipe.leaves()] == ["a", "b", "a"]
    assert {s.name for s in nested.provenance.sources} == {"a", "b"}


def test_json_there_and_back():
    merged = combine(
        [negate(A), combine([A, B], [0.1, 0.2], space="delta", rank=2)], [1 / 3, 1], space="delta"
    )
    recipe, sources = merged.provenance.recipe, merged.provenance.sources
    raw = json.loads(json.dumps(to_json(recipe, sources)))
    assert from_json(raw, sources) == recipe
    assert raw["operands"][0]["operands"] == [{"input": 0}]


@pytest.mark.parametrize(
    "raw",
    [
        {"function": 3, "settings": {}, "operands": []},
        {"function": "combine", "settings": [], "operands": []},
        {"function": "combine", "settings": {}, "operands": [{"input": 2}]},
        {"function": "combine", "settings": {}, "operands": [{"input": True}]},
        {"function": "combine", "settings": {}, "operands": [{"input": -1}]},
        {"function": "combine", "settings": {}},
    ],
)
def test_a_malformed_recipe_is_refused(raw):
    with pytest.raises((TypeError, ValueError, KeyError)):
        from_json(raw, A.provenance.sources)


def test_depth_is_bounded_both_ways():
    deep = A
    for _ in range(MAX_DEPTH):
        deep = negate(deep)
    assert deep.provenance.recipe.depth == MAX_DEPTH
    assert negate(deep).provenance.recipe is None
    assert combine([negate(deep), A], [1, 1]).provenance.recipe is None
    raw = {"input": 0}
    for _ in range(MAX_DEPTH + 1):
        raw = {"function": "negate", "settings": {}, "operands": [raw]}
    with pytest.raises(TypeError):
        from_json(raw, A.provenance.sources)


def test_settings_are_plain_values():
    import numpy as np

    assert plain({"x": (np.float32(0.5), np.int64(2), True, None, "y")}) == {
        "x": [0.5, 2, True, None, "y"]
    }
    with pytest.raises(TypeError, match="Tensor is no plain value"):
        plain({"fisher": torch.ones(1)})


def test_a_head_that_was_chosen_is_part_of_the_recipe():
    heads = combine([A, B], [1, 1], head="per-task")
    assert heads.provenance.recipe.settings["head"] == "per-task"
    assert isinstance(heads.provenance.recipe, Recipe)
