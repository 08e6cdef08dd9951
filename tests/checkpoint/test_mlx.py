"""mlx-lm's layout: bit for bit in both directions, as its layers compute, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import random_module, tiny

from pem_composition.checkpoint import load
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.errors import PEMError
from pem_composition.module import combine

LAYER = "model.layers.1.self_attn.v_proj"


def saved(folder: Path, name: str = "llama", **options) -> Path:
    random_module(tiny(name), seed=1, **options).save(folder / "a")
    return folder / "a"


@pytest.mark.parametrize("rank, alpha", [(7, 10), (20, 16)])  # 16 / sqrt(20) is no alpha / 20
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_there_and_back_is_the_module_bit_for_bit(dtype, rank, alpha, tmp_path: Path) -> None:
    folder = saved(tmp_path, r=rank, alpha=alpha, use_rslora=True)
    convert(folder, tmp_path / "m", format="mlx", dtype=dtype)
    convert(tmp_path / "m", tmp_path / "back")
    a, m, back = load(folder), load(tmp_path / "m"), load(tmp_path / "back")
    assert a.layers == m.layers == back.layers
    assert {a.config.scaling(n) for n in a.layers} == {back.config.scaling(n) for n in a.layers}
    for n, t in a.tensors.items():
        expected = t if dtype is None else t.to(torch.bfloat16).float()
        assert torch.equal(m.tensors[n], expected)
        assert torch.equal(back.tensors[n], expected)
    assert rebuild(tmp_path / "m").equal
    assert combine([m, m], [0.5, 0.5], space="delta").layers == a.layers


def test_it_computes_what_mlx_lm_computes(tmp_path: Path) -> None:
    """y + scale (x lora_a) lora_b, with the names that mlx-lm looks for in its model."""
    a = load(saved(tmp_path))
    convert(tmp_path / "a", tmp_path / "m", format="mlx")
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "m" / "adapters.safetensors")
    given = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    assert given["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert tensors.keys() == {f"{n}.lora_{side}" for n in a.layers for side in "ab"}
    lora_a, lora_b = (tensors[f"{LAYER}.lora_{side}"].double().numpy() for side in "ab")
    assert (lora_a.shape[1], lora_b.shape[0]) == (given["rank"], given["rank"])
    x = np.random.default_rng(0).normal(size=(3, lora_a.shape[0]))
    A, B = (a.tensors[f"{LAYER}.lora_{side}"].double().numpy() for side in "AB")
    expected = a.config.scaling(LAYER) * x @ A.T @ B.T
    np.testing.assert_allclose(given["scale"] * (x @ lora_a) @ lora_b, expected, rtol=1e-12)


def test_what_mlx_lm_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    llama = tiny("llama")
    uneven = random_module(llama, seed=1, rank_pattern={"q_proj": 2})
    scaled = random_module(llama, seed=1, alpha_pattern={"q_proj": 2})
    headed = random_module(tiny("roberta"), seed=1, head_seed=2)
    for module, words in (
        (uneven, r"found ranks \[2, 4\]"),
        (scaled, r"found scalings \[0.5, 1.5\]"),
        (headed, "found classifier.dense.bias"),
        (random_module(tiny("gpt2"), seed=1), r"found layer transformer.h.0.attn.c_attn"),
        (
            random_module(llama.model, seed=1),
            r"found layer layers.0.self_attn.q_proj, .*--prefix model",
        ),
        (random_module(llama, "ia3", seed=1), "a module of kind ia3"),
    ):
        with pytest.raises(PEMError, match=f"mlx-lm's layout cannot .*{words}"):
            module.save(tmp_path / "no", format="mlx")
        assert not (tmp_path / "no").exists()


def test_a_damaged_or_other_adapter_is_refused_by_name(tmp_path: Path) -> None:
    convert(saved(tmp_path), tmp_path / "m", format="mlx")
    (tmp_path / "m" / "pem.json").unlink()
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "m" / "adapters.safetensors")
    given = config["lora_parameters"]

    def refused(words: str, config=config, tensors=tensors) -> None:
        (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "m" / "adapters.safetensors")
        with pytest.raises(PEMError, match=words):
            load(tmp_path / "m")

    for change, words in (
        ({"fine_tune_type": "dora"}, "found 'dora', expected 'lora'"),
        ({"fine_tune_type": "full"}, "found 'full', expected 'lora'"),
        ({"lora_parameters": given | {"rank": 3}}, r"lora_a \(32, 4\).* expected \(d_in, 3\)"),
        (
            {"lora_parameters": given | {"alpha": 16}},
            "alpha has two meanings; found alpha 16, scale",
        ),
        ({"lora_parameters": given | {"scale": None}}, "lora_parameters: scale; found None"),
        ({"lora_parameters": given | {"keys": ["self_attn.q_proj"]}}, "keys do not name"),
    ):
        refused(words, config | change)
    a = tensors[f"{LAYER}.lora_a"]
    without = {n: t for n, t in tensors.items() if n != f"{LAYER}.lora_b"}
    refused("lora_b missing", tensors=without)
    refused("no factor of LoRA", tensors=tensors | {f"{LAYER}.m": a[0].clone()})
    refused("on stacked experts", tensors=tensors | {f"{LAYER}.lora_a": torch.ones(2, 4, 32)})
    refused("on an embedding", tensors=tensors | {"model.embed_tokens.lora_a": torch.ones(9, 4)})
