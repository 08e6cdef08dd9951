"""Modules made by PEFT with options of all kinds: read, combined and written as PEFT means them."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_modules import updates
from support.tiny_models import tiny
from torch import nn

from pem_composition.adapters import attach, attach_fresh, extract
from pem_composition.checkpoint import load
from pem_composition.checkpoint.regular import RegularExpression
from pem_composition.config import IA3Config, LoraConfig, pattern_keys
from pem_composition.module import combine

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.q_proj = nn.Linear(6, 6), nn.Linear(6, 6)


class Nested(nn.Module):
    """Layers ``fc`` and ``block.fc``: one name is the end of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.block = nn.Linear(6, 6), Block()

    def forward(self, x):
        return self.fc(self.block.fc(self.block.q_proj(x)))


class Rooted(nn.Module):
    """Layers ``proj`` and ``wproj``, and ``block.proj`` that is none but holds some."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.wproj = nn.Linear(6, 6), nn.Linear(6, 6)
        self.block = nn.ModuleDict({"proj": Block()})

    def forward(self, x):
        inner = self.block["proj"]
        return self.wproj(self.proj(inner.fc(inner.q_proj(x))))


OWN = {"nested": Nested, "rooted": Rooted}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (OWN[kind]() if kind in OWN else tiny(kind)).double().eval()


def made(folder: Path, kind: str, seed: int = 1, **options: object) -> dict[str, np.ndarray]:
    """Save a module of PEFT; what it adds to each weight, folded by PEFT in float64."""
    model = model_of(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    adapted.save_pretrained(folder)
    after = dict(adapted.merge_and_unload().named_parameters())
    changes = {n: (after[n] - p).detach().numpy() for n, p in before.items() if n in after}
    return {n.removesuffix(".weight"): d for n, d in changes.items() if np.abs(d).max() > 1e-9}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


MADE = {
    "alpha of one layer": ("llama", {"alpha_pattern": {"layers.0.self_attn.q_proj": 40}}),
    "rank of one target": (
        "llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 3}},
    ),
    "whole name only": (
        "nested", {"target_modules": ["fc", "q_proj"], "alpha_pattern": {"^fc": 64}},
    ),
    "rank of a whole name": ("nested", {"target_modules": ["fc"], "rank_pattern": {"^fc": 2}}),
    "a root's name ends a container's": ("rooted", {"target_modules": r"proj|block\.proj\.fc"}),
    "a root alone": ("rooted", {"target_modules": "proj"}),
    "an excluded container": (
        "rooted", {"target_modules": ["proj", "fc"], "exclude_modules": ["block.proj"]},
    ),
    "layers by number": ("llama", {"layers_to_transform": [0, 2]}),
    "an excluded layer": ("llama", {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "a regular expression": ("llama", {"target_modules": r".*layers\.[02]\..*q_proj"}),
    "one target by number": ("llama", {"target_modules": ["layers.1.self_attn.k_proj", "q_proj"]}),
    "a norm saved": ("llama", {"modules_to_save": ["norm"]}),
    "all linear layers and a head": (
        "roberta", {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
    "rsLoRA": ("llama", {"use_rslora": True, "rank_pattern": {"k_proj": 6}}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_what_peft_makes_is_read_scaled_and_written_back(tmp_path, case, deep):
    kind, options = MADE[case]
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **options}
    expected = made(tmp_path / "a", kind, **options)
    module = load(tmp_path / "a")
    same(updates(module), expected)
    for space in ("parameter", "delta"):
        half = combine([module], [0.5], space=space)
        effect = 0.25 if space == "parameter" else 0.5  # both factors carry the coefficient there
        same(updates(half), {n: effect * d for n, d in expected.items()})
        half.save(tmp_path / space)
        same(updates(load(tmp_path / space)), updates(half))
    other = made(tmp_path / "b", kind, seed=2, **{**options, "r": 3})
    total = combine([module, load(tmp_path / "b")], [1.0, -0.5], space="delta", head="first")
    same(updates(total), {n: d - 0.5 * other[n] for n, d in expected.items()})
    total.save(tmp_path / "sum")
    same(updates(load(tmp_path / "sum")), updates(total))
    reopened = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "sum")
    merged = dict(reopened.merge_and_unload().named_parameters())
    base = dict(model_of(kind).named_parameters())
    for name, change in updates(total).items():
        there = (merged[f"{name}.weight"] - base[f"{name}.weight"]).detach().numpy()
        np.testing.assert_allclose(there, change, rtol=1e-4, atol=1e-5)


VECTORS = {
    "a root": {"target_modules": r"proj|block\.proj\.fc", "feedforward_modules": "proj"},
    "the end of a word": {"target_modules": "proj|wproj", "feedforward_modules": "proj"},
}


@torch.no_grad()
@pytest.mark.parametrize("case", VECTORS)
def test_vectors_are_read_and_written_for_the_side_that_peft_scales(tmp_path, case):
    adapted = peft.get_peft_model(model_of("rooted"), peft.IA3Config(**VECTORS[case]))
    g = torch.Generator().manual_seed(1)
    for name, p in adapted.named_parameters():
        if "ia3_l" in name:
            p.copy_(1 + 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    x = torch.randn(3, 6, generator=g, dtype=torch.float64)
    want = adapted(x)
    adapted.save_pretrained(tmp_path / "a")
    module = load(tmp_path / "a")
    module.save(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        base = model_of("rooted")
        torch.testing.assert_close(peft.PeftModel.from_pretrained(base, folder)(x), want)
    with attach(base := model_of("rooted"), module):
        torch.testing.assert_close(base(x), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_opens_what_is_trained_on_layers_whose_name_a_container_has(tmp_path, kind):
    model, names = model_of("rooted"), ("proj", "fc")
    lora = LoraConfig(r=2, alpha=4, target_modules=names)
    attach_fresh(model, lora if kind == "lora" else IA3Config(names), seed=1)
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    x = torch.randn(3, 6, generator=g, dtype=torch.float64)
    extract(model).save(tmp_path / "a")
    opened = peft.PeftModel.from_pretrained(model_of("rooted"), tmp_path / "a")
    torch.testing.assert_close(opened(x), model(x))


@pytest.fixture
def deep(monkeypatch):
    """Three layers, so that one in the middle can be left out."""
    from support import tiny_models as builders

    llama = builders._causal("Llama", num_hidden_layers=3)
    monkeypatch.setitem(builders.BUILDERS, "llama", llama)
    builders._built.cache_clear()
    yield
    builders._built.cache_clear()  # a later test's Llama has two


@pytest.mark.parametrize(
    "key",
    [
        *("._proj", "block..fc", ".fc", "b.ock.q_proj", "block_q_proj$|x", "q.proj"),
        *(r"(block\.)?fc", r".*\.(fc|q_proj)", r"bl[a-p]*k\.[^f].*", r"\w+\.fc|\d{2,}", "^fc"),
    ],
)
def test_patterns_that_are_regular_expressions_mean_what_they_mean_to_peft(tmp_path, key):
    options = {"r": 4, "target_modules": ["q_proj", "fc"], "lora_alpha": 8}
    patterns = {"alpha_pattern": {key: 3}, "rank_pattern": {key: 2}}
    expected = made(tmp_path / "a", "nested", **options, **patterns)
    module = load(tmp_path / "a")
    same(updates(module), expected)
    module.save(tmp_path / "b")
    same(updates(load(tmp_path / "b")), expected)
    reopened = peft.PeftModel.from_pretrained(model_of("nested"), tmp_path / "b")
    base = dict(model_of("nested").named_parameters())
    for name, p in reopened.merge_and_unload().named_parameters():
        if name.endswith("weight"):
            change = (p - base[name]).detach().numpy()
            np.testing.assert_allclose(change, expected[name.removesuffix(".weight")], atol=1e-6)


@given(
    st.text("ab._", max_size=12),
    st.recursive(
        st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^.]", r"\w", "_", "^", "$", r"[\d_]"]),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda x: f"({'|'.join(x)})"),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(
                lambda x: f"(?:{x[0]}){x[1]}"
            ),
        ),
        max_leaves=8,
    ),
)
@settings(deadline=None)
def test_expressions_match_as_pythons_do(name, text):
    assert RegularExpression(text).ends(name) == bool(re.match(rf"(.*\.)?({text})$", name))


@pytest.mark.parametrize(
    "text",
    ["(a+)+" * 30 + "$", "^(.*(a|a.)*)*x(.+)+.*", "(a*)*b", "((a{999}){999}){999}", "(" * 99],
)
def test_no_expression_takes_long(text):
    before = time.process_time()
    with contextlib.suppress(ValueError):
        RegularExpression(text).ends("a" * 200)
    assert time.process_time() - before < 5  # Python's own matcher would not end


def test_keys_of_patterns_name_one_layer_each():
    layers = ["fc", "block.fc", "a.block.fc", "x.q"]
    assert pattern_keys(layers) == {
        "fc": "^fc", "block.fc": "^block.fc", "a.block.fc": "a.block.fc", "x.q": "x.q",
    }  # fmt: skip
