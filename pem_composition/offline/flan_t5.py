"""The text-to-text model: two int8 ONNX graphs back to one float32 T5 folder.

The graphs keep the module paths of the original model: a ``MatMulInteger`` node is called after its
linear layer, embeddings and layer norms after their parameters. A weight is
``(integer - zero point) * scale``, one scale per tensor. In the graphs the activations are
quantised at run time too; that is no property of the weights and is not carried over, so this
model's outputs are those of the graphs with their activations left in float32
(docs/results/offline_models.md).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx.numpy_helper import to_array
from safetensors.numpy import save

from pem_composition.errors import DataError
from pem_composition.offline.encoders import write_json

Tensors = dict[str, np.ndarray]

MEMBERS = "traceforge_title_model/data/span"


def flan_t5_small(files: Sequence[Path], out: Path) -> None:
    """Write weights, configuration and tokenizer.

    Raises:
        DataError: encoder and decoder do not share their embedding, as this architecture must.
    """
    with zipfile.ZipFile(files[0]) as bundle:
        encoder = _tensors(bundle.read(f"{MEMBERS}/encoder.onnx"), "enc.", "encoder.")
        tensors = _tensors(bundle.read(f"{MEMBERS}/decoder.onnx"), "m.", "")
        tokenizer = json.loads(bundle.read(f"{MEMBERS}/tokenizer.json"))
    embedding = encoder.pop("encoder.embed_tokens.weight")
    if (embedding != tensors["shared.weight"]).any():
        raise DataError.build(files[0].name, "two different embeddings", expected="a shared one")
    # Not save_file, which creates files that only their owner can read.
    (out / "model.safetensors").write_bytes(save(encoder | tensors, {"format": "pt"}))
    write_json(out / "config.json", CONFIG)
    # The titles' 48 tokens are no property of the model: the caller says how long a text may be.
    tokenizer |= {"truncation": None, "padding": None}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    write_json(out / "tokenizer_config.json", TOKENIZER)


def _tensors(graph_file: bytes, prefix: str, replacement: str) -> Tensors:
    """Parameters of one graph under their Hugging Face names, float32."""
    graph = onnx.load_from_string(graph_file).graph
    stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}

    def dequantised(name: str) -> np.ndarray:
        values, point = (
            stored[name + end].astype(np.float32) for end in ("_quantized", "_zero_point")
        )
        return np.asarray((values - point) * stored[name + "_scale"], np.float32)

    found = {name: stored[name] for name in stored if name.endswith("layer_norm.weight")}
    for name in stored:
        if name.endswith(".weight_quantized"):
            found[name.removesuffix("_quantized")] = dequantised(name.removesuffix("_quantized"))
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            path = node.name.strip("/").replace("/", ".").removesuffix(".MatMul_quant")
            # ONNX multiplies by (in, out), torch keeps (out, in).
            weight = dequantised(node.input[1].removesuffix("_quantized"))
            found[f"{path}.weight"] = np.ascontiguousarray(weight.T)
    return {replacement + name.removeprefix(prefix): tensor for name, tensor in found.items()}


# The output layer is a tensor of its own: it must not be tied to the embedding.
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "dropout_rate": 0.1,
    "initializer_factor": 1.0,
    "tie_word_embeddings": False,
    "scale_decoder_outputs": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "use_cache": True,
    "dtype": "float32",
}

TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "model_input_names": ["input_ids", "attention_mask"],
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
