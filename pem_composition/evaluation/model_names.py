"""Which model a name means, and what its configuration says. No torch, so that names are checked at
once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import offline
from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.files import snapshot_of
from pem_composition.errors import CheckpointError
from pem_composition.safe_files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def resolve(model_name_or_path: str | Path) -> str:
    """The folder or hub name to load; an offline name becomes its cache folder.

    Raises:
        CheckpointError: a path that is not a model directory.
    """
    name = str(model_name_or_path)
    source = offline.resolve(name)
    path = snapshot_of(Path(source))
    if path.is_dir():
        source = str(path)
        if not (path / MODEL_CONFIG).is_file():
            raise CheckpointError.build(
                source, "not a model directory", found="no config.json",
                expected="config.json, model.safetensors and tokenizer files",
            )  # fmt: skip
        return source
    looks_like_path = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if path.exists() or looks_like_path:
        raise CheckpointError.build(
            "--model_name_or_path", source,
            found="a file" if path.exists() else "no such directory",
            expected="a model directory, a hub name or one of " + ", ".join(offline.names("model")),
        )  # fmt: skip
    return source


def max_input_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens the model takes, None if it has no limit.

    RoBERTa and its relatives number positions from the padding index + 1, which costs that many.
    """
    positions = getattr(config, "max_position_embeddings", None)
    offset_types = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
    if positions is not None and config.model_type in offset_types:
        positions -= (config.pad_token_id or 0) + 1
    limits = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < 10**9]
    return min(limits, default=None)


def local_config(source: str) -> dict[str, Any] | None:
    """The config.json of a folder; None of a hub name."""
    folder = Path(source)
    return dict(read_json(folder / MODEL_CONFIG, folder)) if folder.is_dir() else None
