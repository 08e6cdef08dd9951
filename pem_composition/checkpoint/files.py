"""Files of weights, standard library only: safetensors, snapshots of the hub's cache, outputs apart
from what is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pem_composition import progress
from pem_composition.checkpoint.content import CONFIG, MODEL_CONFIG
from pem_composition.errors import CheckpointError, PEMError, near
from pem_composition.safe_files import (
    is_file,
    leads_nowhere,
    open_regular,
    parse_json,
    real_path,
    sha256_stream,
    size_in_memory,
)

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 200_000
MAX_NAME = 1000  # characters of a tensor's name
MAX_DIMENSIONS = 64  # torch's own limit
MAX_PROPOSALS = 32  # folders that are looked into for a proposal

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class TensorInfo(NamedTuple):
    """What a tensor file says about one tensor: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def snapshot_of(folder: Path) -> Path:
    """The folder itself; of a model's folder in the hub's cache (models--ORG--NAME) the snapshot
    that refs/main names, or the only one where nothing is named.

    Raises:
        CheckpointError: several snapshots and no word of which, or the named one is not there.
    """
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if not snapshots.is_dir():
        return folder
    names = sorted(d.name for d in snapshots.iterdir() if d.is_dir())
    named = main.read_text(encoding="utf-8").strip() if is_file(main) else None
    if named is None and len(names) == 1:
        named = names[0]
    if named not in names:
        raise CheckpointError.build(
            folder, "a folder of the hub's cache that does not say which snapshot to read",
            found=", ".join(names) or "no snapshot", expected="the one that refs/main names",
            do=f"give one of {snapshots}" if names else "fetch the model again",
        )  # fmt: skip
    return snapshots / str(named)


def modules_inside(folder: Path) -> list[Path]:
    """Subfolders that hold a module, else those that hold a model; checkpoint-1000 stands after
    checkpoint-500. The only one stands for the folder."""

    def holding(file: str) -> list[Path]:
        found = (d for d in folder.iterdir() if d.is_dir() and is_file(d / file))
        return sorted(found, key=lambda d: (len(d.name), d.name))

    return holding(CONFIG) or holding(MODEL_CONFIG)


def meant(path: Path) -> str:
    """``did you mean X?`` for the first part of a path that is not there, X a module's folder.

    Names are compared before folders are opened, and few are opened: there may be thousands.
    """
    with suppress(OSError):  # what cannot be listed proposes nothing
        missing = [p for p in (path, *path.parents) if not p.exists()]
        if missing and not leads_nowhere(wrong := missing[-1]):
            beside = {other.name: other for other in wrong.parent.iterdir()}
            for name in near(wrong.name, beside, share=0.6, most=MAX_PROPOSALS):  # all can be meant
                for place in (beside[name] / path.relative_to(wrong), beside[name]):
                    if _holds_module(place):
                        return f"did you mean {place}?"
    return ""


def _holds_module(folder: Path) -> bool:
    with suppress(OSError):  # a folder that may not be read is none to propose
        own = any(is_file(folder / file) for file in (CONFIG, MODEL_CONFIG))
        return folder.is_dir() and (own or len(modules_inside(folder)) == 1)
    return False


# --- safetensors --------------------------------------------------------------------------------


class SafetensorsFile(AbstractContextManager["SafetensorsFile"]):
    """One open safetensors file: its checked header (``infos``: dtypes and shapes by name), and
    values that are read by name.

    Raises:
        CheckpointError: header too large or damaged, duplicate keys, unknown dtype, or offsets
            that do not cover the file exactly.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self._root = path, root
        self._file = open_regular(path, root)
        self._data: memoryview | None = None
        try:
            self._opened = state_of(self._file)
            self.infos, self._starts, self.metadata = _read_header(
                self._bytes, self._opened.size, path
            )
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a later read opens it again, and refuses it if it was written to."""
        self._file.close()
        self._data = None

    def hold(self) -> None:
        """Read the whole file at once: ``sha256`` and values are of the same bytes.

        Raises:
            CheckpointError: it is larger than the memory, or has changed since its header was read.
        """
        file = self._open()
        data = memoryview(bytearray(size_in_memory(file, self.path)))
        file.seek(0)
        file.readinto(data)  # type: ignore[attr-defined]
        self._check_unchanged()
        self._data = data

    def _open(self) -> BinaryIO:
        if self._file.closed:
            self._file = open_regular(self.path, self._root)
            self._check_unchanged()
        return self._file

    def read(self, name: str) -> bytearray | memoryview:
        """Raw little-endian values of one tensor, writable and aligned.

        Of a file in memory they are its own bytes, not a copy.
        """
        part = self.read_part(name, 0, self.infos[name].nbytes)
        aligned = self._starts[name] % DTYPE_BYTES[self.infos[name].dtype] == 0
        return part if aligned else bytearray(part)

    def read_part(self, name: str, start: int, size: int) -> bytearray | memoryview:
        """``size`` bytes of one tensor from byte ``start``."""
        part = self._bytes(self._starts[name] + start, size)
        self._check_read(name, len(part), size)
        return part

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of one tensor from byte ``start``."""
        if self._data is not None:
            buffer[:] = self.read_part(name, start, len(buffer))
            return
        file = self._open()
        file.seek(self._starts[name] + start)
        self._check_read(name, file.readinto(buffer), len(buffer))  # type: ignore[attr-defined]

    def _check_read(self, name: str, found: int, wanted: int) -> None:
        """Refuse a file that ends too early, or was written to since its header was read."""
        if found != wanted:
            raise CheckpointError.build(
                self.path, f"ends inside tensor {name!r}", do="restore the file"
            )
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self._data is None and state_of(self._file) != self._opened:
            raise changed(self.path)

    def check_size(self) -> None:
        """Refuse a file that this machine could not hold."""
        size_in_memory(self._open(), self.path)

    def sha256(self) -> str:
        """Hexadecimal sha256 of the whole file."""
        if self._data is not None:
            return hashlib.sha256(self._data).hexdigest()
        return sha256_stream(self._open())

    def _bytes(self, start: int, size: int) -> bytearray | memoryview:
        """Bytes of the file; fewer where it ends."""
        if self._data is not None:
            return self._data[start : start + size]
        buffer = bytearray(size)
        file = self._open()
        file.seek(start)
        del buffer[file.readinto(buffer) :]  # type: ignore[attr-defined]
        return buffer


class _FileState(NamedTuple):
    """What writing to a file changes."""

    size: int
    modified_ns: int


def state_of(file: BinaryIO) -> _FileState:
    """Size and time of an open file."""
    found = os.fstat(file.fileno())
    return _FileState(found.st_size, found.st_mtime_ns)


def changed(path: Path) -> PEMError:
    """The error for a file that was written to between two reads."""
    return CheckpointError.build(
        path, "changed while it was read", do="run again when its writer is done"
    )


Header = tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]


def _read_header(
    read: Callable[[int, int], bytearray | memoryview], size: int, path: Path
) -> Header:
    """The checked header of a file of ``size`` bytes; ``read`` gives bytes by start and number."""
    prefix = read(0, 8)
    if len(prefix) < 8:
        raise _damaged(path, "too short for a safetensors file", f"{size} bytes", "at least 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            path, "safetensors header too large", f"{length} bytes", f"<= {MAX_HEADER_BYTES}"
        )
    if length > size - 8:
        raise _damaged(
            path, "safetensors header cut off", f"{size - 8} bytes after its length", f"{length}"
        )
    raw = parse_json(bytes(read(8, length)), path)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "safetensors __metadata__ malformed", metadata, "text values")
    if len(raw) > MAX_TENSORS:
        raise _damaged(path, "too many tensors", len(raw), f"<= {MAX_TENSORS}")
    spans = sorted((*_entry(path, name, entry), name) for name, entry in raw.items())
    position = 0
    for start, stop, name in spans:
        if start != position:
            raise _damaged(path, f"tensor {name!r} has a wrong offset", start, position)
        position = stop
    if position != size - 8 - length:
        raise _damaged(
            path,
            "the tensors do not cover the file exactly (truncated or with trailing bytes)",
            f"{size - 8 - length} bytes of values",
            position,
        )
    infos = {name: TensorInfo(e["dtype"], tuple(e["shape"])) for name, e in raw.items()}
    return infos, {name: 8 + length + start for start, _, name in spans}, metadata


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Byte span of one header entry after checking dtype, shape and size."""
    if len(name) > MAX_NAME:
        raise _damaged(path, f"name of tensor {name!r}", f"{len(name)} characters", MAX_NAME)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(
            path, f"header entry of {name!r} malformed", entry, "dtype, shape, data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _damaged(path, f"tensor {name!r} has an unknown dtype", dtype, ", ".join(DTYPE_BYTES))
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not is_shape(numbers):
            raise _damaged(
                path, f"tensor {name!r} has a malformed {what}", numbers, "whole numbers >= 0"
            )
    if len(offsets) != 2 or offsets[1] - offsets[0] != TensorInfo(dtype, tuple(shape)).nbytes:
        raise _damaged(
            path,
            f"tensor {name!r}: data_offsets {offsets} do not fit its shape",
            shape,
            "equal sizes",
        )
    return offsets[0], offsets[1]


def is_shape(numbers: object) -> bool:
    """True for a list or tuple of at most 64 whole numbers from 0 that fit in 63 bits."""
    return (
        isinstance(numbers, list | tuple)
        and len(numbers) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
    )


def _damaged(path: Path, what: str, found: object, expected: object) -> CheckpointError:
    error = CheckpointError.build(
        path,
        what,
        found=found,
        expected=expected,
        do="restore the file from its source",
    )
    assert isinstance(error, CheckpointError)
    return error


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    values: Callable[[str], Iterable[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor; see ``write_values``."""
    with path.open("wb") as file:
        write_values(file.write, infos, values, metadata)


def write_values(
    write: Callable[[Any], object],
    infos: Mapping[str, TensorInfo],
    values: Callable[[str], Iterable[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Give a safetensors file to ``write`` in order, widest dtype first (every value aligned).

    Args:
        values: name -> the tensor's bytes, as one or more buffers.
        metadata: further text values of the header.
    """
    order = sorted(infos, key=lambda n: (-DTYPE_BYTES[infos[n].dtype], n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        dtype, shape = infos[name]
        stop = position + infos[name].nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(struct.pack("<Q", len(text)) + text)
    for name in progress.over(order, "writing", "tensors"):
        for buffer in values(name):
            write(buffer)


# --- outputs and inputs --------------------------------------------------------------------------


def check_apart(
    out: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]],
    *,
    rows: Iterable[str | os.PathLike[str]] = (),
    do: str = "choose another output path",
    inside: bool = True,
) -> None:
    """Refuse an output that is, or holds, or lies in something that is read.

    Files and folders are told by device and inode, so that another spelling, a link, a mount or a
    system that folds case changes nothing. Of folders that are read an output may lie only in those
    that are no module or model (rows beside their results).

    Args:
        inputs: a folder that stands for a module inside counts as that module, too.
        rows: folders that are read for their own files; modules inside are results.
        do: the remedy.
        inside: False where the output is one more file beside a module's own.

    Raises:
        CheckpointError: naming the output and the input.
    """
    target = _identity(real_path(Path(out)))
    above = _above(Path(out))
    read = [(path, [Path(path), *_stood_for(Path(path))]) for path in inputs]
    for path, folders in [*read, *((path, [Path(path)]) for path in rows)]:
        places = [place for folder in folders for place in (folder, *_linked(folder))]
        what = None
        if target is not None and any(target in _above(p, itself=True) for p in places):
            what = "the output would replace an input"
        elif inside and any(_identity(f) in above and _holds_weights(f) for f in folders):
            what = "the output would lie in an input"
        if what is not None:
            raise CheckpointError.build(out, what, found=path, do=do)


def _holds_weights(folder: Path) -> bool:
    return any(is_file(folder / name) for name in (MODEL_CONFIG, CONFIG))


def _stood_for(folder: Path) -> list[Path]:
    """The folders that are read where a folder stands for them, see ``modules_inside``."""
    with suppress(OSError, CheckpointError):
        snapshot = snapshot_of(folder)
        inner = [] if _holds_weights(snapshot) else modules_inside(snapshot)
        return [*([snapshot] if snapshot != folder else []), *inner]
    return []


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None where nothing is there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _above(path: Path, *, itself: bool = False) -> set[tuple[int, int] | None]:
    """Identities of the folders that hold a path, where it leads and where its name stands."""
    places: list[Path] = []
    for place in (real_path(path), real_path(path.parent) / path.name):
        places += [*([place] if itself else []), *place.parents]
    if ".." not in path.parts:
        places += path.absolute().parents
    return {identity for place in places if (identity := _identity(place)) is not None}


def _linked(folder: Path) -> list[Path]:
    """Files that the links in a folder lead to, as in the snapshots of a hub's cache."""
    if not folder.is_dir():
        return []
    with suppress(OSError):
        return [real_path(entry) for entry in folder.iterdir() if entry.is_symlink()]
    return []
