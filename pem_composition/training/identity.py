"""What a run is: flags, data, base model, initial module, number of processes. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pem_composition import checkpoint
from pem_composition.checkpoint import files
from pem_composition.errors import CheckpointError
from pem_composition.evaluation.models import resolve
from pem_composition.tasks.data import Example, TaskData
from pem_composition.training.config import TrainConfig
from pem_composition.training.processes import world_size

WEIGHT_FILES = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def describe_run(config: TrainConfig, data: TaskData, content: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result of a run: equal descriptions, the same run.

    Args:
        content: what the objective reads besides the rows, such as a prompt.
    """
    base = checkpoint.base_identity(resolve(config.model_name_or_path))
    return {
        "flags": config.result_fields(),
        "base": base.fingerprint or config.model_name_or_path,
        "init_from": module_digest(Path(config.init_from)) if config.init_from else None,
        "processes": world_size(),
        **content,
        **{f"{split} rows": data_digest(examples) for split, examples in data.splits.items()},
    }


def data_digest(examples: Sequence[Example]) -> str:
    """sha256 over texts and labels in order, whatever the format of the file."""
    digest = sha256()
    for e in examples:
        digest.update(json.dumps([e.text, e.text_pair, e.label]).encode() + b"\n")
    return digest.hexdigest()


def module_digest(folder: Path) -> str:
    """sha256 of the weights of a module or model directory.

    Raises:
        CheckpointError: there are none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return files.sha256_file(folder / name)
    raise CheckpointError.build(
        f"--init_from {folder}",
        "no module",
        found="no weights file" if folder.is_dir() else "no such directory",
        expected=" or ".join(WEIGHT_FILES),
        do="make one with pem init",
    )
