"""Fisher and Gram files: one safetensors file whose metadata says what it belongs to.

    fisher.safetensors    <tensor name>    diagonal Fisher, the tensor's shape
    gram.safetensors      <layer>.gram     X^T X / n, (d_in, d_in)
    subspace.safetensors  <layer>.subspace A X^T X A^T / n, (sum r, sum r), A of all modules

The metadata's key ``pem`` holds JSON: what, module (fingerprint), n, facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.statistics import COMMANDS, FISHER, GRAM, SUBSPACE, Statistics
from pem_composition.checkpoint.files import SafetensorsFile
from pem_composition.checkpoint.tensors import cast, read_float, write_tensors
from pem_composition.errors import CheckpointError
from pem_composition.safe_files import atomic_directory, parse_json

if TYPE_CHECKING:
    from torch import Tensor

KEY = "pem"
NAMES = {
    FISHER: "fisher.safetensors", GRAM: "gram.safetensors", SUBSPACE: "subspace.safetensors",
}  # fmt: skip


def write(statistics: Statistics, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the file into a new directory; returns its path.

    Raises:
        CheckpointError: the directory exists, or a value is not finite.
    """
    name = NAMES[statistics.what]
    tensors = {n: cast(t, n, None, name) for n, t in statistics.tensors.items()}
    record = {
        "what": statistics.what,
        "module": statistics.module,
        "n": statistics.n,
        "facts": dict(statistics.facts),
    }
    with atomic_directory(folder, overwrite) as temporary:
        write_tensors(temporary / name, tensors, {KEY: json.dumps(record)})
    return Path(folder) / name


def find(path: str | PathLike[str], what: str) -> Path:
    """The file, or the one in a directory.

    Raises:
        CheckpointError: neither; says which program makes it.
    """
    place = Path(path)
    file = place / NAMES[what] if place.is_dir() else place
    if not file.is_file():
        raise CheckpointError.build(
            file, f"no {what} file", expected=f"the output of {COMMANDS[what]}", do="check the path"
        )
    return file


def read(path: str | PathLike[str], what: str) -> Statistics:
    """The statistics in a file or directory, finite and not negative where they must be.

    Raises:
        CheckpointError: not such a file, of another kind, or with wrong values.
    """
    file = find(path, what)
    with SafetensorsFile(file, file.parent) as stored:
        record = record_of(stored.metadata, file)
        if record["what"] != what:
            raise CheckpointError.build(
                file, "statistics of another kind", found=record["what"], expected=what,
                do=f"compute them with {COMMANDS[what]}",
            )  # fmt: skip
        tensors = {name: read_float(stored, name) for name in stored.infos}
    for name, tensor in tensors.items():
        _check_values(file, name, tensor, what)
    return Statistics(what, tensors, record["module"], record["n"], record["facts"], name=str(path))


def _check_values(file: Path, name: str, tensor: Tensor, what: str) -> None:
    negative = tensor if what == FISHER else tensor.diagonal()
    if bool((negative < 0).any()):
        raise CheckpointError.build(
            file, f"{name!r} has negative entries, which a {what} cannot have",
            do=f"compute it again with {COMMANDS[what]}",
        )  # fmt: skip


def record_of(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What the metadata says, checked.

    Raises:
        CheckpointError: no such record, or a value of the wrong type.
    """
    if KEY not in metadata:
        raise CheckpointError.build(
            file, "says not which module it belongs to",
            expected=f"a file written by {' or '.join(COMMANDS.values())}",
        )  # fmt: skip
    record = parse_json(metadata[KEY].encode(), file)
    types = {"what": str, "module": str, "n": int, "facts": dict}
    for key, kind in types.items():
        if not isinstance(record.get(key), kind):
            raise CheckpointError.build(file, f"its record has no valid {key!r}")
    return record
