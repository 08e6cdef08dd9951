"""What a folder says about its vocabulary: tokens of its tokenizer, rows of its embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pem_composition.checkpoint.files import TensorInfo, is_file, read_json, sha256_file
from pem_composition.errors import CheckpointError

TOKENIZER = "tokenizer.json"
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "shared", "lm_head")


def embedding_rows(folder: Path, infos: Mapping[str, TensorInfo]) -> int | None:
    """Rows of the embeddings among a module's canonical tensors, else what config.json names."""
    for name, info in infos.items():
        parameter = name.rpartition(".")[0]
        if parameter.endswith(".weight") and parameter.split(".")[-2] in EMBEDDINGS:
            return info.shape[0]
    if not is_file(folder / "config.json"):
        return None
    size = read_json(folder / "config.json", folder).get("vocab_size")
    return size if type(size) is int else None


def tokenizers(folders: Mapping[str, Path]) -> dict[str, str]:
    """Name -> tokens and digest of the folder's tokenizer.json, where it has one.

    Large files are parsed only if they differ; two that only pad or cut otherwise are the same.
    """
    files = {n: f / TOKENIZER for n, f in folders.items() if is_file(f / TOKENIZER)}
    marks = {n: sha256_file(f, folders[n]) for n, f in files.items()}
    if len(set(marks.values())) < 2:
        return marks
    return {n: _tokens(f, folders[n]) for n, f in files.items()}


def _tokens(path: Path, folder: Path) -> str:
    """Number of tokens and a digest over them.

    Raises:
        CheckpointError: not a tokenizer.
    """
    raw = read_json(path, folder)
    try:
        vocabulary = raw["model"]["vocab"]
        added = sorted((t["id"], t["content"]) for t in raw.get("added_tokens") or ())
    except (TypeError, KeyError):
        raise CheckpointError.build(
            path, "not a tokenizer", do="restore the file, or remove it"
        ) from None
    content = json.dumps([vocabulary, added], sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()[:12]
    return f"{len(vocabulary)} tokens, {len(added)} added ({digest})"
