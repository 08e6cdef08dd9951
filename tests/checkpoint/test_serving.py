"""The form that vLLM serves, read as vLLM reads it: r, lora_alpha and the factors, no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.small_modules import ia3, lora, updates

from pem_composition import PEM, cli, load
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.checkpoint.serving import MAX_LORA_RANKS, max_lora_rank
from pem_composition.errors import UnsupportedModule


def mixed(seed: int = 0) -> PEM:
    """Two layers of different rank and scaling, a head, and a note of its task."""
    small, large = lora(seed, r=2), lora(seed + 1, r=5)
    second = small.layers[1]
    tensors = {n: t for n, t in small.tensors.items() if not n.startswith(second)}
    tensors |= {n: t for n, t in large.tensors.items() if n.startswith(second)}
    config = replace(
        small.config, rank_pattern={second: 5}, alpha_pattern={second: 7.0},
        extra={"task_type": "SEQ_CLS"},
    )  # fmt: skip
    return replace(small, tensors=tensors, config=config)


def served(folder: Path) -> dict[str, np.ndarray]:
    """dW of every layer by the three values of the config that vLLM reads."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and not config.get("use_dora")
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    stored = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in stored:
        assert key.endswith((".lora_A.weight", ".lora_B.weight")), key
        if key.endswith(".lora_A.weight"):
            A, B = (stored[key.replace("lora_A", side)].double() for side in ("lora_A", "lora_B"))
            assert A.shape[0] == B.shape[1] == config["r"]
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[layer] = scale * (B @ A).numpy()
    return found


@pytest.mark.parametrize("module", [mixed(), lora(3), lora(4, rslora=True)], ids=str)
def test_it_makes_the_same_updates(module, tmp_path):
    module.save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "served", format="vllm", drop_saved=True)
    expected, found = updates(module), served(tmp_path / "served")
    assert expected.keys() == found.keys()
    for layer, update in expected.items():
        np.testing.assert_allclose(found[layer], update, atol=1e-12)
    assert rebuild(tmp_path / "served").equal
    assert load(tmp_path / "served").layers == module.layers


def test_factors_of_one_rank_and_scaling_keep_their_bits(tmp_path):
    module = lora(0, rslora=True)
    module.save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "served", format="vllm", drop_saved=True)
    old, new = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("m", "served"))
    assert {k for k in old if "lora" in k} == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in new)


def test_what_vllm_does_not_load_is_refused_by_name(tmp_path, capsys):
    mixed().save(tmp_path / "m")
    ia3(0).save(tmp_path / "ia3")
    with pytest.raises(UnsupportedModule, match=r"found classifier\.weight; leave them out"):
        convert(tmp_path / "m", tmp_path / "out", format="vllm")
    with pytest.raises(UnsupportedModule, match="not those of kind ia3; fold it into its base"):
        convert(tmp_path / "ia3", tmp_path / "out", format="vllm")
    assert not (tmp_path / "out").exists()
    words = ["convert", str(tmp_path / "m"), str(tmp_path / "out")]
    assert cli.main([*words, "--drop_saved"]) == 2
    assert "--drop_saved: given without --format vllm" in capsys.readouterr().err
    assert cli.main([*words, "--drop_saved", "--format", "vllm"]) == 0
    said = capsys.readouterr().out
    assert "vllm serve BASE --enable-lora --max-lora-rank 8\n" in said
    assert "note: left out for vLLM: classifier.weight\n" in said


@given(st.integers(1, 512))
def test_the_rank_asked_for_is_the_least_that_is_enough(rank):
    found = max_lora_rank(rank, "m")
    assert found in MAX_LORA_RANKS and rank <= found
    assert not any(rank <= other < found for other in MAX_LORA_RANKS)


def test_a_rank_beyond_all_is_refused():
    with pytest.raises(UnsupportedModule, match="found rank 513, expected at most 512"):
        max_lora_rank(513, "m")
