"""Modules written by other libraries give the logits those libraries computed, to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from pem_composition.adapters import attach, fold
from pem_composition.checkpoint import load

CLASSES = {
    "roberta": AutoModelForSequenceClassification,
    "t5": AutoModelForSeq2SeqLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}
REFERENCE = [
    (m, k, i) for m in ("roberta", "t5", "gpt2") for k in ("lora", "ia3") for i in (1, 2, 3)
]
PEFT = [(m, k, i) for m in CLASSES for k in ("lora", "rslora", "ia3") for i in (1, 2, 3)]


def base(folder: Path, name: str, **options: object) -> nn.Module:
    return CLASSES[name].from_pretrained(folder / f"base_{name}", **options).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    decoder = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder).logits


def check(folder: Path, name: str, module_dir: Path, key: str) -> None:
    """Logits are up to about 5, and the records carry float32 rounding of another machine.

    PEFT itself, run here, is up to 3e-5 from its own records (rsLoRA: large updates); hence a bound
    relative to the largest logit, which float64 meets exactly and float32 within a factor of two.
    """
    recorded = load_file(folder / "logits.safetensors")
    expected, module, ids = recorded[f"{key}.logits"], load(module_dir), recorded["input_ids"]
    options = {"num_labels": expected.shape[-1]} if name == "roberta" else {}
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    for dtype, hold, slack in (
        (torch.float32, attach, 2),
        (torch.float64, attach, 1),
        (torch.float64, fold, 1),
    ):
        model = base(folder, name, **options).to(dtype)
        plain = logits(model, ids)
        with hold(model, module):
            assert (logits(model, ids) - expected).abs().max() <= slack * bound
        assert torch.equal(logits(model, ids), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "i"), REFERENCE)
def test_modules_of_the_reference_code(shared: Path, name: str, kind: str, i: int) -> None:
    folder = shared / "golden" / "adapter_transformers"
    check(folder, name, folder / f"{name}_{kind}_{i}" / f"task{i}", f"{name}_{kind}_{i}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "i"), PEFT)
def test_modules_of_peft(shared: Path, name: str, kind: str, i: int) -> None:
    folder = shared / "golden" / "peft"
    check(folder, name, folder / f"{name}_{kind}_{i}", f"{name}_{kind}_{i}")
