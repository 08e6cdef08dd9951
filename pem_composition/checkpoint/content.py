"""What identifies a module's content: one sha256 over the files that decide what it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pem_composition.checkpoint.files import sha256_file
from pem_composition.checkpoint.heads import FOLDER

CONFIGS = ("adapter_config.json", "head_config.json", "config.json")
WEIGHTS = (".safetensors", ".bin")
NO_WEIGHTS = "training_args.bin"


def content_files(folder: Path) -> list[str]:
    """Weights and configuration, relative to the folder; provenance and cards do not count."""
    names = [f.name for f in folder.iterdir() if f.suffix in WEIGHTS or f.name in CONFIGS]
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
