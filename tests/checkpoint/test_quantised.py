"""Quantised models are refused by name in every program that adds whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny
from torch import Tensor

from pem_composition.checkpoint import (
    combine_full,
    extract_lora,
    fold_checkpoint,
    inspect_header,
    load,
)
from pem_composition.errors import PEMError

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{LAYER}.weight"
CODES = torch.arange(32 * 32, dtype=torch.int32).reshape(32, 32) % 7


def without(*names: str) -> dict[str, Tensor | None]:
    return dict.fromkeys(names)


# layout -> what a writer of it puts in place of one weight
LAYOUTS: dict[str, dict[str, Tensor | None]] = {
    "fp8": {WEIGHT: CODES.to(torch.float8_e4m3fn)},
    "fp8-e5m2": {WEIGHT: CODES.to(torch.float8_e5m2)},
    "fp8-scales": {
        WEIGHT: CODES.to(torch.float8_e4m3fn),
        f"{WEIGHT}_scale_inv": torch.ones(1, 1),
    },
    "gptq": {
        **without(WEIGHT),
        f"{LAYER}.qweight": CODES[:4],
        f"{LAYER}.qzeros": CODES[:1, :4],
        f"{LAYER}.scales": torch.ones(1, 32),
        f"{LAYER}.g_idx": torch.zeros(32, dtype=torch.int32),
    },
    "int8": {WEIGHT: CODES.to(torch.int8), f"{LAYER}.SCB": torch.ones(32)},
    "int8-codes-alone": {WEIGHT: CODES.to(torch.int8)},
    "nf4": {
        WEIGHT: torch.zeros(512, 1, dtype=torch.uint8),
        f"{WEIGHT}.absmax": torch.ones(16),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    },
    "compressed-tensors": {
        **without(WEIGHT),
        f"{LAYER}.weight_packed": CODES[:, :4],
        f"{LAYER}.weight_scale": torch.ones(32, 1),
        f"{LAYER}.weight_shape": torch.tensor([32, 32]),
    },
    "mxfp4": {
        **without(WEIGHT),
        "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(2, 4, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, 4, dtype=torch.uint8),
    },
    "scales-of-floats": {f"{WEIGHT}_scale": torch.ones(32, 1)},
}


def stored(folder: Path, changes: dict[str, Tensor | None], **config: Any) -> Path:
    """A tiny Llama with some tensors replaced."""
    tiny("llama").save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            held.pop(name)
        else:
            held[name] = tensor.contiguous().clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def fold(tuned: Path, base: Path, out: Path) -> None:
    fold_checkpoint("a", {"a": tuned}, base, out, allow_base_mismatch=True)


def refused(wrong: Path, plain: Path, out: Path, words: str) -> None:
    """Every program, with the quantised model as the tuned one and as the base."""
    for tuned, base in ((wrong, plain), (plain, wrong), (wrong, wrong)):
        for run in (
            lambda t=tuned, b=base: combine_full([t, t], [1.0, 1.0], out, base=b),
            lambda t=tuned, b=base: fold_checkpoint(
                "a", {"a": t}, b, out, allow_base_mismatch=True
            ),
            lambda t=tuned, b=base: load(t, base=b),
            lambda t=tuned, b=base: extract_lora(b, t, rank=2),
        ):
            with pytest.raises(PEMError, match=words):
                run()
            assert not out.exists()
    with pytest.raises(PEMError, match=words):
        inspect_header(wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_are_refused_by_name(layout: str, tmp_path: Path) -> None:
    plain = stored(tmp_path / "plain", {})
    wrong = stored(tmp_path / "wrong", LAYOUTS[layout])
    refused(wrong, plain, tmp_path / "out", "is a part of a quantised weight")


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"compression_config": {"format": "int-quantized"}},
    ],
)
def test_a_configuration_that_says_so_is_enough(config: dict[str, Any], tmp_path: Path) -> None:
    plain = stored(tmp_path / "plain", {})
    wrong = stored(tmp_path / "wrong", {}, **config)
    refused(wrong, plain, tmp_path / "out", "a quantised model")


def test_integers_are_compared_with_the_base(tmp_path: Path) -> None:
    counter = "model.counter"
    base = stored(tmp_path / "base", {counter: torch.tensor([3])})
    same = stored(tmp_path / "same", {counter: torch.tensor([3])})
    other = stored(tmp_path / "other", {counter: torch.tensor([4])})
    combine_full([same], [0.5], tmp_path / "sum", base=base)
    assert load_file(tmp_path / "sum" / "model.safetensors")[counter].tolist() == [3]
    for run in (
        lambda: combine_full([other], [0.5], tmp_path / "out", base=base),
        lambda: fold_checkpoint(
            "a", {"a": other}, base, tmp_path / "out", allow_base_mismatch=True
        ),
        lambda: load(other, base=base),
        lambda: extract_lora(base, other, rank=2),
    ):
        with pytest.raises(PEMError, match="integer tensor differs"):
            run()
        assert not (tmp_path / "out").exists()
