"""What a folder says about its vocabulary: tokens of its tokenizer, rows of its embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.safe_files import is_file, read_json, sha256_file

# Files that hold the tokens, the whole tokenizer first.
TOKENIZERS = (
    "tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "shared", "lm_head")


def embedding_rows(folder: Path, infos: Mapping[str, TensorInfo]) -> int | None:
    """Rows of the embeddings among a module's canonical tensors, else what config.json names."""
    for name, info in infos.items():
        parameter = name.rpartition(".")[0]
        if parameter.endswith(".weight") and parameter.split(".")[-2] in EMBEDDINGS:
            return info.shape[0]
    if not is_file(folder / MODEL_CONFIG):
        return None
    size = read_json(folder / MODEL_CONFIG, folder).get("vocab_size")
    return size if type(size) is int else None


def differing_tokenizers(folders: Mapping[str, Path]) -> dict[str, str]:
    """Name -> what is told of the folder's tokenizer; empty where those that are there agree.

    Two that only pad or cut otherwise are the same.
    """
    for file in TOKENIZERS:
        files = {n: f / file for n, f in folders.items() if is_file(f / file)}
        marks = {n: sha256_file(f, folders[n]) for n, f in files.items()}
        if len(set(marks.values())) > 1:
            told = {n: _tokens(f, folders[n], marks[n]) for n, f in files.items()}
            return told if len(set(told.values())) > 1 else {}
    return {}


def tokenizers_note(folders: Mapping[str, Path]) -> str:
    """Which tokenizers differ, in words; an empty string where they agree."""
    found = differing_tokenizers(folders)
    return (
        f"tokenizers differ ({', '.join(f'{n}: {t}' for n, t in found.items())})" if found else ""
    )


def _tokens(path: Path, folder: Path, sha256: str) -> str:
    """Number of tokens and a digest over them, or the file's where it has no list of tokens."""
    if path.name == TOKENIZERS[0]:
        raw = read_json(path, folder)
        try:
            vocabulary = raw["model"]["vocab"]
            added = sorted((t["id"], t["content"]) for t in raw.get("added_tokens") or ())
            content = json.dumps([vocabulary, added], sort_keys=True).encode()
            digest = hashlib.sha256(content).hexdigest()[:12]
            return f"{len(vocabulary)} tokens, {len(added)} added ({digest})"
        except (TypeError, KeyError):
            pass
    return f"{path.name} {sha256[:12]}"
