"""Heads kept beside a module: heads/<name>.safetensors, described in pem.json under ``heads``.

Plain PEFT does not look there, so the module opens without them. The name is checked before it
becomes that of a file, on writing and on reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.head_policies import NAME, check_name, tasks_of
from pem_composition.arithmetic.updates import save_dtype
from pem_composition.checkpoint.content import HEADS
from pem_composition.checkpoint.header import Record, check_sha256
from pem_composition.checkpoint.tensors import (
    cast,
    check_float,
    open_tensors,
    read_float,
    write_tensors,
)
from pem_composition.config import Head, HeadInfo

if TYPE_CHECKING:
    from pem_composition.module import PEM


def file_of(name: str) -> str:
    """Where a head lies, relative to the module's folder."""
    return f"{HEADS}/{name}.safetensors"


def write(pem: PEM, folder: Path, *, dtype: str | None) -> None:
    """Write every head beside the module, if there are any.

    Raises:
        PEMError: a name that is no plain file name, or a value that the dtype cannot hold.
    """
    target = save_dtype(dtype)
    for name, head in pem.heads.items():
        check_name(name)
        path = folder / file_of(name)
        path.parent.mkdir(exist_ok=True)
        where = f"{pem.name}, head {name}"
        write_tensors(path, {n: cast(t, n, target, where) for n, t in head.tensors.items()})


def read(folder: Path, record: Record | None) -> dict[str, Head]:
    """The heads that the record names, their checksums compared.

    Raises:
        CheckpointError: a file that is missing, changed or no safetensors file.
    """
    out = {}
    for name, info in (record.heads if record else {}).items():
        path = folder / file_of(name)
        with open_tensors(path, folder) as file:
            file.hold()
            check_sha256(folder, file_of(name), file.sha256(), record)
            check_float(file.infos, path)
            out[name] = Head({n: read_float(file, n) for n in sorted(file.infos)}, info)
    return out


def describe(info: HeadInfo) -> dict[str, Any]:
    """A head's entry in pem.json."""
    return {"labels": list(info.labels), "problem": info.problem, "extra": dict(info.extra)}


def parse(raw: Mapping[str, Any]) -> HeadInfo:
    """The inverse of ``describe``.

    Raises:
        TypeError, KeyError, ValueError: not what ``describe`` writes.
    """
    problem, labels = raw["problem"], raw["labels"]
    if problem is not None and not isinstance(problem, str):
        raise TypeError(f"problem must be text, found {problem!r}")
    if not isinstance(labels, list) or not all(isinstance(w, str) for w in labels):
        raise TypeError(f"labels must be texts, found {labels!r}")
    info = HeadInfo(tuple(labels), problem, dict(raw.get("extra") or {}))
    end = 0
    for name, part in tasks_of(info).items():
        width = len(part["labels"]) or 1
        if (part["start"], part["stop"]) != (end, end + width) or end + width > len(labels):
            raise ValueError(f"outputs of task {name!r} must be {width} from {end}, found {part!r}")
        end += width
    return info


def parse_all(raw: Mapping[str, Any]) -> dict[str, HeadInfo]:
    """The ``heads`` of a pem.json.

    Raises:
        TypeError, KeyError, ValueError: malformed, or a name that is no plain file name.
    """
    for name in raw:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a head")
    return {name: parse(entry) for name, entry in raw.items()}
