"""A Llama folder as Hugging Face reads it: what the conversions of other formats share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pem_composition.offline.encoders import write_json

Tensors = Mapping[str, np.ndarray[Any, Any]]


def write_folder(
    out: Path,
    *,
    tensors: Tensors,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
) -> None:
    """Write weights, configuration and tokenizer."""
    # Not save_file, which creates files that only their owner can read.
    (out / "model.safetensors").write_bytes(save(dict(tensors), {"format": "pt"}))
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation_config)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    write_json(out / "tokenizer_config.json", tokenizer_config)


def halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of query or key (heads x size, in): rotated pairs side by side -> in two halves.

    GGUF and llama2.c rotate the rows 2i and 2i + 1 of a head, Hugging Face i and i + size / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def config(
    *,
    vocabulary: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    head_size: int,
    length: int,
    rope_theta: float,
    rms_norm_eps: float,
) -> dict[str, Any]:
    """``config.json`` of a float32 Llama whose output layer is the embedding."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_size,
        "max_position_embeddings": length,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rms_norm_eps": rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }


def bpe_tokenizer(
    *,
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    special: Mapping[int, str],
    decoder: Mapping[str, Any],
    normalizer: Mapping[str, Any] | None = None,
    pre_tokenizer: Mapping[str, Any] | None = None,
    post_processor: Mapping[str, Any] | None = None,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    """``tokenizer.json`` of byte pairs merged in the order given, with ``special`` by its id."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **plain, "special": True} for i, token in special.items()
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": byte_fallback,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
