"""What identifies a module's content: one sha256 over the files that decide what it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pem_composition.checkpoint.heads import FOLDER
from pem_composition.safe_files import sha256_file

CONFIG = "adapter_config.json"
PEFT_FILES = PEFT_WEIGHTS, PEFT_WEIGHTS_BIN = ("adapter_model.safetensors", "adapter_model.bin")
REFERENCE_FILES = REFERENCE_WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS = (
    "pytorch_adapter.bin", "head_config.json", "pytorch_model_head.bin",
)  # fmt: skip
MLX_WEIGHTS = "adapters.safetensors"
ADAPTER_FILES = frozenset({CONFIG, *PEFT_FILES, *REFERENCE_FILES, MLX_WEIGHTS})
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = (".safetensors", ".bin")  # shards may have any name
NO_WEIGHTS = "training_args.bin"


def content_files(folder: Path) -> list[str]:
    """Weights and configuration, relative to the folder; records, cards and logs do not count."""
    names = [f.name for f in folder.iterdir()]
    if CONFIG in names:
        names = [n for n in names if n in ADAPTER_FILES]
    else:
        names = [n for n in names if n.endswith(MODEL_WEIGHTS) or n == MODEL_CONFIG]
    heads = folder / FOLDER
    beside = sorted(heads.glob("*.safetensors")) if heads.is_dir() else []
    names += [f"{FOLDER}/{f.name}" for f in beside]
    return sorted(n for n in names if n != NO_WEIGHTS)


def content_digest(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """sha256 over the names of these files and their sha256.

    Args:
        known: checksums at hand, by file name; the rest is read.
    """
    known = known or {}
    parts = [
        f"{name} {known.get(name) or sha256_file(folder / name, folder)}"
        for name in content_files(folder)
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
