"""Layers that a class never calls: found by their names, and refused wherever a module acts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support import one_meaning as om
from torch import Tensor, nn

import pem_composition as pem
from pem_composition.adapters.fresh import fresh_module
from pem_composition.adapters.locate import linear_layers, plain_tensors
from pem_composition.checkpoint import fold_checkpoint, load
from pem_composition.checkpoint.extraction import extract_lora
from pem_composition.checkpoint.stored_names import is_uncalled
from pem_composition.config import LoraConfig
from pem_composition.errors import IncompatibleModules

IMAGE = {
    "hidden_size": om.D, "intermediate_size": om.F, "num_hidden_layers": 1, "patch_size": 4,
    "num_attention_heads": om.H, "image_size": 8,
}  # fmt: skip
SPEECH = {
    **IMAGE, "conv_dim": [8], "conv_stride": [2], "conv_kernel": [3], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_buckets": 8, "max_bucket_distance": 16,
    "tdnn_dim": [8, 8], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1], "xvector_output_dim": 8,
}  # fmt: skip
PAGE = {
    **om.ENCODER, "num_hidden_layers": 1, "coordinate_size": 2, "shape_size": 4,
    "input_size": 8, "patch_size": 4,
}  # fmt: skip


def _of(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    cls = getattr(hf, name)
    return lambda: cls(cls.config_class(**sizes))


def _inputs(kind: str) -> dict[str, Tensor]:
    if kind == "sound":
        return {"input_values": torch.randn(1, 60, generator=torch.Generator().manual_seed(1))}
    if kind == "page":
        boxes = torch.tensor([[i, i, i + 2, i + 3] for i in range(7)]).expand(2, -1, -1)
        return {**om.inputs("text"), "bbox": boxes, **om.inputs("image")}
    return om.inputs(kind)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{n: (m.build, m.inputs) for n, m in om.BY_NAME.items()},
    "siglip": (_of("SiglipVisionModel", **IMAGE), "image"),
    "wavlm": (_of("WavLMForXVector", **SPEECH), "sound"),
    "mobilebert": (_of("MobileBertForMaskedLM", **{**om.ENCODER, "embedding_size": 8}), "text"),
    "layoutlmv3": (_of("LayoutLMv3Model", **PAGE), "page"),
    "jamba": (
        _of(
            "JambaForCausalLM",
            **om.DECODER,
            num_experts=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
        ),
        "text",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_that_a_forward_pass_does_not_call(name: str) -> None:
    build, kind = MODELS[name]
    model, called = build().eval(), set[str]()
    layers = linear_layers(model)
    for layer, module in layers.items():
        module.register_forward_hook(lambda *_, layer=layer: called.add(layer))
    with torch.no_grad():
        model(**_inputs(kind))
    known = plain_tensors(model)
    assert {n for n in layers if is_uncalled(n, known)} == layers.keys() - called


def test_a_change_of_such_a_layer_is_refused_wherever_it_would_act(tmp_path: Path) -> None:
    """Live PEFT computes nothing there, so what it trains is neutral there: that is taken."""
    peft = pytest.importorskip("peft")
    build, kind = MODELS["siglip"]
    base, layer = build().eval(), "head.attention.out_proj"
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = base(**_inputs(kind)).pooler_output
        for start in (True, False):  # B = 0, and what arithmetic alone could make of it
            config = peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=start)
            live = peft.get_peft_model(build(), config)
            live.base_model.model.load_state_dict(base.state_dict(), strict=False)
            live.save_pretrained(tmp_path / str(start))
    config = LoraConfig(r=2, alpha=2.0, target_modules=("out_proj",))
    neutral, other = (load(tmp_path / str(start)) for start in (True, False))
    with pem.attach(base, neutral, allow_base_mismatch=True), torch.no_grad():
        assert base(**_inputs(kind)).pooler_output.equal(before)
    options = {"allow_base_mismatch": True}
    fold_checkpoint("a", {"a": tmp_path / "True"}, tmp_path / "base", tmp_path / "same", **options)
    for way in (
        lambda: pem.attach(base, other, **options),
        lambda: pem.fold(base, other, **options),
        lambda: fold_checkpoint(
            "a", {"a": tmp_path / "False"}, tmp_path / "base", tmp_path / "f", **options
        ),
        lambda: fresh_module(base, config),
    ):
        with pytest.raises(IncompatibleModules, match=rf"layer {layer}: .*never calls the layer"):
            way()
    with torch.no_grad():
        base.get_submodule(layer).weight.add_(1.0)
    base.save_pretrained(tmp_path / "tuned")
    with pytest.raises(IncompatibleModules, match=r"others differ: .*; keep the whole model"):
        extract_lora(tmp_path / "base", tmp_path / "tuned", rank=2)
