"""A Hugging Face model folder as it is written: shards with their index, config, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.files import TensorInfo, is_file, open_regular, write_json
from pem_composition.checkpoint.heads import FOLDER as HEADS_FOLDER
from pem_composition.checkpoint.stream import Output, Ring, stream_safetensors

MAX_SHARD_BYTES = 5 * 10**9
COMPANIONS = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.jinja|.*\.model|sentencepiece\.bpe\.model"
)
CONFIG = "config.json"


def is_model_file(name: str) -> bool:
    """True for files a model folder consists of (replaced, not kept, when it is overwritten)."""
    weights = name.startswith(("model.safetensors", "model-", "pytorch_model")) and name.endswith(
        (".safetensors", ".json", ".bin")
    )
    return (
        weights
        or name in (CONFIG, provenance.FILE, provenance.CARD, HEADS_FOLDER)
        or bool(COMPANIONS.fullmatch(name))
    )


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(infos):
        if shards[-1] and size + infos[name].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += infos[name].nbytes
    return shards


def write_model(
    folder: Path, outputs: Mapping[str, Output], max_shard_bytes: int | None = None
) -> dict[str, str]:
    """Write the tensors as one file or as shards with an index, in order of their names.

    Returns:
        File -> sha256.
    """
    infos = {name: output.info for name, output in outputs.items()}
    shards = _shards(infos, max_shard_bytes or MAX_SHARD_BYTES)
    table: dict[str, str] = {}
    digests: dict[str, str] = {}
    ring = Ring()
    for i, names in enumerate(shards, start=1):
        file = (
            f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        digests[file] = stream_safetensors(folder / file, {n: outputs[n] for n in names}, ring)
        table |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(i.nbytes for i in infos.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": table},
        )
    return digests


def write_companions(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """config.json, and copies of tokenizer files."""
    write_json(folder / CONFIG, config)
    for file in _companions(source):
        with open_regular(file, source) as data:
            (folder / file.name).write_bytes(data.read())


def with_dtype(config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A configuration that names the written torch dtype (None: float32)."""
    name = str(dtype or "torch.float32").removeprefix("torch.")
    return {**config, ("torch_dtype" if "torch_dtype" in config else "dtype"): name}


def _companions(source: Path) -> Iterable[Path]:
    return [f for f in sorted(source.iterdir()) if COMPANIONS.fullmatch(f.name) and is_file(f)]
