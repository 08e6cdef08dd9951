"""The files of a module in every layout, and what identifies its content: one sha256 over those
that decide what it computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pem_composition.safe_files import sha256_file

CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
RECORD, CARD = "pem.json", "README.md"
HEADS = "heads"  # the folder of further heads, beside a module


@dataclass(frozen=True)
class Layout:
    """One way in which an adapter stands on disk; ``layouts.CODECS`` reads and writes it.

    Attributes:
        name: what ``--format`` calls it, and the hub its library.
        program: who else reads it.
        files: beside adapter_config.json.
    """

    name: str
    program: str
    files: tuple[str, ...]


PEFT_WEIGHTS, PEFT_WEIGHTS_BIN = "adapter_model.safetensors", "adapter_model.bin"
REFERENCE_WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS = (
    "pytorch_adapter.bin", "head_config.json", "pytorch_model_head.bin",
)  # fmt: skip
MLX_WEIGHTS = "adapters.safetensors"
PEFT = Layout("peft", "PEFT", (PEFT_WEIGHTS, PEFT_WEIGHTS_BIN))
REFERENCE = Layout(
    "adapter-transformers", "adapter-transformers", (REFERENCE_WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS)
)
MLX = Layout("mlx", "mlx-lm", (MLX_WEIGHTS,))
LAYOUTS = {layout.name: layout for layout in (PEFT, REFERENCE, MLX)}
FULL = "full"  # in their place, where a folder holds a whole model
ADAPTER_FILES = frozenset({CONFIG}.union(*(layout.files for layout in LAYOUTS.values())))
MODULE_FILES = ADAPTER_FILES | {RECORD, CARD}
MODEL_WEIGHTS = (".safetensors", ".bin")  # shards may have any name
NO_WEIGHTS = "training_args.bin"


def held_in(folder: Path) -> str | None:
    """The file that makes a folder a module's or a model's; None where it is neither's."""
    return next((n for n in (CONFIG, MODEL_CONFIG, RECORD) if (folder / n).exists()), None)


def content_files(folder: Path) -> list[str]:
    """Weights and configuration, relative to the folder; records, cards and logs do not count."""
    names = [f.name for f in folder.iterdir()]
    if CONFIG in names:
        names = [n for n in names if n in ADAPTER_FILES]
    else:
        names = [n for n in names if n.endswith(MODEL_WEIGHTS) or n == MODEL_CONFIG]
    heads = folder / HEADS
    beside = sorted(heads.glob("*.safetensors")) if heads.is_dir() else []
    names += [f"{HEADS}/{f.name}" for f in beside]
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
