"""Who recognises, reads and writes each layout, and which files of a folder are a module's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pem_composition.checkpoint import (
    adapter_transformers,
    adapter_transformers_write,
    mlx,
    peft,
)
from pem_composition.checkpoint.content import HEADS, MLX, MODULE_FILES, PEFT, REFERENCE
from pem_composition.checkpoint.content import REFERENCE_WEIGHTS as WEIGHTS
from pem_composition.checkpoint.header import ModuleHeader, Record
from pem_composition.checkpoint.model_folder import is_model_file
from pem_composition.safe_files import SmallFiles, is_file

if TYPE_CHECKING:
    from pem_composition.module import PEM

Config = Mapping[str, Any]  # the content of adapter_config.json


class Codec(NamedTuple):
    """Functions of a layout.

    Attributes:
        read: the module's header under a label.
        write: a module into a folder, for a final name of it, in a dtype.
    """

    read: Callable[[SmallFiles, Config, str, Record | None], ModuleHeader]
    write: Callable[[PEM, Path, str, str | None], None]


CODECS: Mapping[str, Codec] = {
    REFERENCE.name: Codec(
        adapter_transformers.read,
        lambda pem, folder, name, dtype: adapter_transformers_write.write(
            pem, folder, name, dtype=dtype
        ),
    ),
    MLX.name: Codec(
        lambda small, raw, label, record: mlx.read(small.folder, raw, label, record),
        lambda pem, folder, _name, dtype: mlx.write(pem, folder, dtype=dtype),
    ),
    PEFT.name: Codec(
        lambda small, raw, label, record: peft.read(small.folder, raw, label, record),
        lambda pem, folder, _name, dtype: peft.write(pem, folder, dtype=dtype),
    ),
}


def layout_of(small: SmallFiles, raw: Config) -> str:
    """The layout of a folder with an adapter_config.json: whose keys are in it, PEFT's where nobody
    else's are. One with PEFT's keys, too, is PEFT's unless the weights are adapter-transformers'.
    """
    plain = "peft_type" not in raw
    if {"model_type", "config"} <= raw.keys() and (plain or is_file(small.folder / WEIGHTS)):
        return REFERENCE.name
    return MLX.name if plain and raw.keys() & {"fine_tune_type", "lora_parameters"} else PEFT.name


def is_foreign(entry: str) -> bool:
    """True for logs and results beside a module, which survive when it is overwritten.

    A module of another layout does not: two of them in one folder cannot be told apart.
    """
    return entry not in (*MODULE_FILES, HEADS) and not is_model_file(entry)
