"""Safe file work, standard library only: bounded reads, strict JSON, safetensors, directories.

Nothing here interprets a module. Reads accept regular files only, so a FIFO never blocks and a link
never leads out of the folder it lies in; every error names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pem_composition.errors import CheckpointError, PEMError
from pem_composition.signals import finished_first, named

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 200_000
MAX_NAME = 1000  # characters of a tensor's name
MAX_DIMENSIONS = 64  # torch's own limit
MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_NESTING = 50
LONGEST_STEM = 160  # bytes of a name beside which a temporary name of its own fits into 255

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


def open_regular(path: Path, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading; never blocks on a FIFO or device.

    Args:
        root: the folder the file belongs to. A symbolic link must stay inside it; links of the
            Hugging Face cache (snapshots/REV/file -> blobs/HASH) are known and followed.

    Raises:
        CheckpointError: the file is missing, unreadable, not regular, or a link out of the root.
    """
    if root is not None:
        _check_inside(path, root)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError.build(path, "no such file", do="check the path") from None
    except OSError as error:
        raise CheckpointError.build(path, f"cannot be read ({error.strerror})") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointError.build(
            path, "cannot be read", found=_kind_of(mode), expected="a regular file"
        )
    return os.fdopen(descriptor, "rb")


def _kind_of(mode: int) -> str:
    tests = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((word for test, word in tests if test(mode)), "a device")


def _check_inside(path: Path, root: Path) -> None:
    try:
        target, home = path.resolve(), root.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError.build(path, "a symbolic link that leads nowhere") from None
    caches = [p.parent for p in home.parents if p.name == "snapshots"]
    blobs = caches[0] / "blobs" if caches else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise CheckpointError.build(
            path,
            "a symbolic link leads out of its folder",
            found=target,
            expected=f"a file inside {root}",
            do="replace the link by a copy of the file",
        )


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


def is_file(path: Path) -> bool:
    """True if the path exists and is no directory (a FIFO counts, to be refused by name)."""
    return path.exists() and not path.is_dir()


def size_in_memory(file: BinaryIO, path: Path) -> int:
    """Bytes of an open file, unless they are more than this machine could hold."""
    size = os.fstat(file.fileno()).st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise CheckpointError.build(
            path, "too large", found=f"{size} bytes", expected=f"at most the memory, {memory} bytes"
        )
    return size


def sha256_file(path: Path, root: Path | None = None) -> str:
    """Hexadecimal sha256 of a regular file."""
    with open_regular(path, root) as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Hexadecimal sha256 of an open file, from its start."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


# --- JSON ---------------------------------------------------------------------------------------


def read_json(path: Path, root: Path | None = None) -> dict[str, Any]:
    """Read a JSON object strictly: no duplicate keys, no NaN or infinity, an object at the top.

    Raises:
        CheckpointError: naming the file and what is wrong.
    """
    return parse_json(read_small(path, root), path)


def read_small(path: Path, root: Path | None = None) -> bytes:
    """The bytes of a file that a JSON object fits in."""
    with open_regular(path, root) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError.build(
            path,
            "too large",
            found=f"more than {MAX_JSON_BYTES} bytes",
            expected="a small JSON file",
        )
    return data


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """Parse bytes as ``read_json`` does; ``where`` names them in errors."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if b"\\ud" in data or b"\\uD" in data:  # half a surrogate pair could not be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        _check_nesting(value)
    except UnicodeError:
        raise CheckpointError.build(
            where, "not UTF-8 text", expected="JSON", do="restore the file"
        ) from None
    except RecursionError:
        raise CheckpointError.build(where, "nested too deeply", expected="plain JSON") from None
    except ValueError as error:
        raise CheckpointError.build(
            where, f"not valid JSON: {error}", do="restore the file from its source"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError.build(
            where, "wrong content", found=f"a JSON {type(value).__name__}", expected="a JSON object"
        )
    return value


def _check_nesting(value: object) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise RecursionError


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def listing(folder: Path) -> str:
    """The first twelve names in a folder, for errors; a link that leads nowhere is marked."""
    found = sorted(folder.iterdir())[:12]
    lost = " (a link to nothing)"
    return ", ".join(f"{p.name}{'/' * p.is_dir()}{lost * leads_nowhere(p)}" for p in found)


def leads_nowhere(path: Path) -> bool:
    """True for a symbolic link to what is not there, or to itself."""
    return path.is_symlink() and not path.exists()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as ``json_bytes`` gives it."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object, indented, keys in the given order.

    Undecodable bytes of a path become question marks, since JSON has no place for them.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="replace")


class SmallFiles:
    """The JSON files of a folder: each is opened once, its sha256 is that of the bytes parsed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}  # file name -> sha256, of those that were read
        self._values: dict[str, dict[str, Any]] = {}

    def json(self, name: str) -> dict[str, Any]:
        """The object in a file, as ``read_json`` reads it."""
        if name not in self._values:
            path = self.folder / name
            data = read_small(path, self.folder)
            self.digests[name] = hashlib.sha256(data).hexdigest()
            self._values[name] = parse_json(data, path)
        return self._values[name]


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
    for name in order:
        for buffer in values(name):
            write(buffer)


# --- whole directories --------------------------------------------------------------------------


def check_apart(
    out: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]],
    *,
    do: str = "choose another output path",
    inside: bool = True,
) -> None:
    """Refuse an output that is, or holds, or lies in something that is read.

    Files and folders are told by device and inode, so that another spelling, a link, a mount or a
    system that folds case changes nothing. Of folders that are read an output may lie only in those
    that are no module or model (rows beside their results).

    Args:
        do: the remedy.
        inside: False where the output is one more file beside a module's own.

    Raises:
        CheckpointError: naming the output and the input.
    """
    target = _identity(Path(out))
    above = _above(Path(out))
    for path in inputs:
        given = Path(path)
        places = [given, *_linked(given)]
        what = None
        if target is not None and any(target in _above(p, itself=True) for p in places):
            what = "the output would replace an input"
        elif inside and _identity(given) in above and _holds_weights(given):
            what = "the output would lie in an input"
        if what is not None:
            raise CheckpointError.build(out, what, found=path, do=do)


def _holds_weights(folder: Path) -> bool:
    return any(is_file(folder / name) for name in ("config.json", "adapter_config.json"))


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
    for place in (_real(path), _real(path.parent) / path.name):
        places += [*([place] if itself else []), *place.parents]
    if ".." not in path.parts:
        places += path.absolute().parents
    return {identity for place in places if (identity := _identity(place)) is not None}


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, of links in a circle too


def _linked(folder: Path) -> list[Path]:
    """Files that the links in a folder lead to, as in the snapshots of a hub's cache."""
    if not folder.is_dir():
        return []
    with suppress(OSError):
        return [_real(entry) for entry in folder.iterdir() if entry.is_symlink()]
    return []


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    keep: Callable[[str], bool] | None = None,
) -> Iterator[Path]:
    """Yield a temporary sibling; on success it becomes ``path`` at once, on error nothing changes.

    Files are fsynced before the rename and the parent after it; modes follow the umask. An existing
    directory is renamed aside and removed only when the new one is in place. Temporaries of
    processes that died on this machine are removed, and a directory they had put aside is put back.

    Args:
        overwrite: replace an existing directory (an empty one is always replaced).
        keep: entries of the replaced directory to carry over, by name, unless written anew.

    Raises:
        CheckpointError: the path exists, is no directory, or cannot be created.
        OSError: the disk is full (the caller maps it to its exit code).
    """
    target = _check_target(Path(path))
    created = _make_parents(target.parent)
    try:
        _clean_stale(target, keep)
        _check_free(target, overwrite)
        temporary = _sibling(target, "tmp")
        try:
            _make(temporary, target)
            yield temporary
            _settle(temporary)
            with finished_first():  # a signal must not part the two renames
                _swap(temporary, target, overwrite, keep)
                named(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except BaseException as error:
        for parent in reversed(created):
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)  # a full disk is said of no file
        raise


def _check_target(path: Path) -> Path:
    if path.name in ("", "..") or "\0" in str(path):
        raise CheckpointError.build(
            path, "not a name for an output directory", do="name the directory to be written"
        )
    target = path.absolute()
    resolved = target.resolve()
    if Path.cwd().is_relative_to(resolved) or Path.home().is_relative_to(resolved):
        raise CheckpointError.build(
            path,
            "the output would replace the working or home directory",
            do="name a directory inside it",
        )
    return resolved if target.is_symlink() else target


def _make_parents(parent: Path) -> list[Path]:
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    made: list[Path] = []
    for directory in reversed(missing):
        _make(directory, directory, exist_ok=True)
        made.append(directory)
    if not parent.is_dir():
        raise CheckpointError.build(parent, "not a directory", do="choose another output path")
    return made


def _make(directory: Path, where: Path, *, exist_ok: bool = False) -> None:
    try:
        directory.mkdir(exist_ok=exist_ok)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError.build(
            where, f"cannot be created ({error.strerror})", do="choose another output path"
        ) from None


def _check_free(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError.build(
            target,
            "exists",
            found="a file",
            expected="no such path",
            do="choose another output path",
        )
    if target.exists() and not overwrite and any(target.iterdir()):
        raise CheckpointError.build(
            target,
            "the output exists",
            found="a directory with files",
            expected="no such directory",
            do="choose another path or overwrite it (--overwrite)",
        )


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(
        f".{_stem(target)}.{role}-{os.getpid()}-{_host()}{secrets.token_hex(4)}"
    )


def _stem(target: Path) -> str:
    """The target's name, or as much of a long one as leaves room for more, and its digest."""
    name = os.fsencode(target.name)
    if len(name) <= LONGEST_STEM:
        return target.name
    return f"{target.name[: LONGEST_STEM // 8]}-{hashlib.sha256(name).hexdigest()[:32]}"


def _clean_stale(target: Path, keep: Callable[[str], bool] | None) -> None:
    """Remove what dead processes of this machine left beside the target."""
    for role in ("old", "tmp"):
        start = f".{_stem(target)}.{role}-"
        for entry in list(target.parent.iterdir()):
            pid, _, tail = entry.name.removeprefix(start).partition("-")
            ours = entry.name.startswith(start) and tail.startswith(_host())
            if not (ours and pid.isdecimal() and len(pid) < 10):
                continue
            if _alive(int(pid)):
                continue
            with suppress(FileNotFoundError):  # another process cleans, too
                if role == "old" and not target.exists():
                    entry.rename(target)
                else:
                    _carry_over(entry, target, keep if role == "old" else None)


def _carry_over(aside: Path, target: Path, keep: Callable[[str], bool] | None) -> None:
    """Move the entries to keep from a replaced directory into the new one, then remove the rest."""
    for entry in list(aside.iterdir()) if keep else []:
        if keep is not None and keep(entry.name) and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(aside, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _settle(directory: Path) -> None:
    """Give files the mode the umask asks for and fsync everything."""
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for parent, _, names in os.walk(directory):
        for name in names:
            file = Path(parent, name)
            file.chmod(mode)
            fsync(file)
        fsync(Path(parent))


def fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(
    temporary: Path, target: Path, overwrite: bool, keep: Callable[[str], bool] | None
) -> None:
    """Give the directory its name; of several processes that do so at once each succeeds whole."""
    aside: list[Path] = []
    try:
        while True:
            _check_free(target, overwrite)
            aside += _put_aside(target) if overwrite else []
            try:
                temporary.rename(target)  # replaces an empty directory
                break
            except OSError as error:  # another process was faster: look again
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except BaseException:
        for old in aside[-1:]:
            with suppress(OSError):
                old.rename(target)
        raise
    finally:
        for old in aside:
            if old.exists() and target.exists():
                _carry_over(old, target, keep)
    fsync(target.parent)


def _put_aside(target: Path) -> list[Path]:
    """Rename what is there; nothing where another process was faster."""
    aside = _sibling(target, "old")
    try:
        target.rename(aside)
    except FileNotFoundError:
        return []
    return [aside]
