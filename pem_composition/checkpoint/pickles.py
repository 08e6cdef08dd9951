"""Restricted reader of torch zip files (``.bin``): names, shapes and values, and no code.

The pickle stream is first checked opcode by opcode, then run by an unpickler that knows six
globals, all replaced by inert stand-ins. torch is not needed: a tensor is a storage entry of the
zip plus offset, shape and strides, and every size is compared with the entry before it is read.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import reprlib
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pem_composition.checkpoint.files import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    MAX_NAME,
    MAX_TENSORS,
    TensorInfo,
    changed,
    is_shape,
    state_of,
)
from pem_composition.errors import CheckpointError
from pem_composition.safe_files import open_regular, sha256_stream, size_in_memory

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
OPCODES = frozenset(
    (
        *(
            "PROTO",
            "FRAME",
            "STOP",
            "MARK",
            "GLOBAL",
            "STACK_GLOBAL",
            "REDUCE",
            "BINPERSID",
            "BUILD",
        ),
        *(
            "MEMOIZE",
            "BINPUT",
            "LONG_BINPUT",
            "BINGET",
            "LONG_BINGET",
            "NONE",
            "NEWTRUE",
            "NEWFALSE",
        ),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "EMPTY_LIST"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    )
)
# Whole numbers of a value's size, to copy it by.
WORDS: Mapping[int, str] = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
KEYS = (pickletools.pyunicode, pickletools.pyint)
MAX_OPCODES = 8_000_000
MAX_DIRECTORY_BYTES = 2 * MAX_HEADER_BYTES  # a name and 46 bytes per entry
REMEDY = "load it where you trust it and save it again as safetensors"


BRIEF = reprlib.Repr()  # a nested tuple can have a repr longer than any memory
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother = 2, 100, 100


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: str


class TorchZipFile(AbstractContextManager["TorchZipFile"]):
    """One open torch zip file; the same reading interface as ``SafetensorsFile``.

    Args:
        inside: key of the dict of tensors in a dict of other values, which are then in ``beside``.

    Raises:
        CheckpointError: not a torch zip file, a global or opcode that is not allowed, a compressed
            or overlapping entry, a tensor that its storage does not hold, a content checksum error.
    """

    def __init__(
        self,
        path: Path,
        root: Path | None = None,
        *,
        inside: str | None = None,
    ) -> None:
        self.path, self._root = path, root
        self._inside = inside
        self.beside: dict[str, Any] = {}
        self._file: BinaryIO = open_regular(path, root)
        self._opened = state_of(self._file)
        try:
            self._zip, self._prefix = _open_zip(self._file, path)
            self._tensors = self._tensor_table()
        except BaseException:
            self._file.close()
            raise
        self._last: tuple[str | None, bytearray] = (None, bytearray())
        self.infos = {
            name: TensorInfo(t.storage.dtype, t.shape) for name, t in self._tensors.items()
        }

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a later read opens it again, and refuses it if it was written to."""
        self._file.close()
        self._last = (None, bytearray())

    def hold(self) -> None:
        """Read the whole file at once: ``sha256`` and values are of the same bytes.

        Raises:
            CheckpointError: it is larger than the memory, or has changed since its header was read.
        """
        with self._open() as file:
            size = size_in_memory(file, self.path)
            file.seek(0)
            self._zip.fp = self._file = io.BytesIO(file.read(size))
            if state_of(file) != self._opened:
                raise changed(self.path)

    def _open(self) -> BinaryIO:
        if self._file.closed:
            self._zip.fp = self._file = open_regular(self.path, self._root)
            if state_of(self._file) != self._opened:
                raise changed(self.path)
        return self._file

    def sha256(self) -> str:
        """Hexadecimal sha256 of the whole file."""
        return sha256_stream(self._open())

    def read(self, name: str) -> bytearray:
        """Raw little-endian values of one tensor in row-major order."""
        tensor = self._tensors[name]
        size = DTYPE_BYTES[tensor.storage.dtype]
        data = self._entry(f"data/{tensor.storage.key}")
        count = math.prod(tensor.shape)
        if not count or _is_contiguous(tensor):
            start = tensor.offset * size
            return bytearray(data[start : start + count * size])
        import torch  # transposed, sliced or expanded: what asks for such values computes with them

        words = torch.frombuffer(bytearray(data), dtype=getattr(torch, WORDS[size]))
        rows = words.as_strided(tensor.shape, tensor.strides, tensor.offset).contiguous()
        return bytearray(rows.numpy().data.cast("B"))

    def shared(self) -> list[list[str]]:
        """Groups of names that are the same view of the same storage (tied weights)."""
        groups: dict[_Tensor, list[str]] = {}
        for name, tensor in self._tensors.items():
            groups.setdefault(tensor, []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def read_part(self, name: str, start: int, size: int) -> bytearray:
        """``size`` bytes of one tensor from byte ``start``."""
        if self._last[0] != name:
            self._last = (name, self.read(name))
        return self._last[1][start : start + size]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of one tensor from byte ``start``."""
        buffer[:] = self.read_part(name, start, len(buffer))

    def _tensor_table(self) -> dict[str, _Tensor]:
        if self._has("byteorder") and self._entry("byteorder") != b"little":
            raise CheckpointError.build(
                self.path, "wrong byte order", found="big", expected="little"
            )
        stream = self._entry("data.pkl")
        _check_opcodes(stream, self.path)
        try:
            value = _Unpickler(stream, self.path).load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged stream can raise anything; none of it is ours
            raise CheckpointError.build(
                self.path, f"damaged pickle ({type(error).__name__})", do=REMEDY
            ) from None
        if self._inside is not None and isinstance(value, dict):
            self.beside = {k: v for k, v in value.items() if k != self._inside}
            value = value.get(self._inside)
        if not isinstance(value, dict):
            raise _bad(self.path, "wrong content", f"a {type(value).__name__}", "a dict of tensors")
        for name, tensor in value.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor) or len(name) > MAX_NAME:
                raise _bad(
                    self.path,
                    f"entry {BRIEF.repr(name)}",
                    f"a {type(tensor).__name__}",
                    "a tensor under a text name",
                )
            self._check_tensor(name, tensor)
        return dict(value)

    def _check_tensor(self, name: str, tensor: _Tensor) -> None:
        sizes = (tensor.shape, tensor.strides, (tensor.offset, tensor.storage.numel))
        if not all(map(is_shape, sizes)) or len(tensor.shape) != len(tensor.strides):
            raise _bad(
                self.path,
                f"tensor {name!r} malformed",
                f"shape {BRIEF.repr(tensor.shape)}",
                "whole numbers >= 0",
            )
        entry = f"data/{tensor.storage.key}"
        need = tensor.storage.numel * DTYPE_BYTES[tensor.storage.dtype]
        if not self._has(entry) or self._zip.getinfo(self._prefix + entry).file_size != need:
            size = (
                self._zip.getinfo(self._prefix + entry).file_size
                if self._has(entry)
                else "no entry"
            )
            raise _bad(self.path, f"storage of tensor {name!r}", f"{size} (bytes)", f"{need} bytes")
        count = math.prod(tensor.shape)
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        if count and (
            tensor.offset + reach >= tensor.storage.numel or count > tensor.storage.numel
        ):
            raise _bad(
                self.path,
                f"tensor {name!r} reaches out of its storage",
                f"shape {tensor.shape}, strides {tensor.strides}, offset {tensor.offset}",
                f"at most {tensor.storage.numel} values",
            )

    def _has(self, entry: str) -> bool:
        return self._prefix + entry in self._zip.NameToInfo

    def _entry(self, entry: str) -> bytes:
        self._open()
        try:
            return self._zip.read(self._prefix + entry)  # zipfile checks the entry's crc
        except Exception as error:  # zipfile raises whatever a damaged record makes it raise
            raise CheckpointError.build(
                self.path, f"damaged: {error}", do="restore the file from its source"
            ) from None


def _bad(path: Path, what: str, found: object, expected: object) -> CheckpointError:
    error = CheckpointError.build(path, what, found=found, expected=expected, do=REMEDY)
    assert isinstance(error, CheckpointError)
    return error


def _open_zip(file: BinaryIO, path: Path) -> tuple[zipfile.ZipFile, str]:
    """Open the archive, refuse anything torch.save does not write, and find its common folder."""
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError.build(
            path,
            "not a torch zip file",
            found="a pickle of torch < 1.6 or another format",
            expected="the zip format of torch.save",
            do=REMEDY,
        )
    _check_directory(file, path)
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:
        raise CheckpointError.build(
            path, f"damaged zip file ({error})", do="restore the file from its source"
        ) from None
    _check_entries(archive, file.seek(0, io.SEEK_END), path)
    pickles = [
        e
        for e in archive.infolist()
        if e.filename.count("/") == 1 and e.filename.endswith("/data.pkl")
    ]
    if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER_BYTES:
        raise _bad(
            path, "zip content", f"{len(pickles)} data.pkl entries", "one data.pkl of at most 16 MB"
        )
    return archive, pickles[0].filename.removesuffix("data.pkl")


def _check_directory(file: BinaryIO, path: Path) -> None:
    """Refuse a list of entries that would take more memory than the file is large.

    A zip file ends in a zip64 record (56 bytes), its locator (20) and the end record (22, no
    comment); the first two are there in large files, and then hold.
    """
    file.seek(max(0, file.seek(0, io.SEEK_END) - 98))
    tail = file.read().rjust(98)
    if tail[76:80] != b"PK\5\6":
        raise CheckpointError.build(
            path, "damaged zip file (no end record)", do="restore the file from its source"
        )
    length = tail[40:48] if tail[56:60] == b"PK\6\7" else tail[88:92]
    if int.from_bytes(length, "little") > MAX_DIRECTORY_BYTES:
        raise _bad(
            path, "zip directory", f"{int.from_bytes(length, 'little')} bytes", MAX_DIRECTORY_BYTES
        )


def _check_entries(archive: zipfile.ZipFile, size: int, path: Path) -> None:
    """Refuse what makes a small file large: compression, overlapping or repeated entries."""
    entries = archive.infolist()
    if len(entries) > MAX_TENSORS + 16 or len(archive.NameToInfo) != len(entries):
        raise _bad(
            path, "zip entries", f"{len(entries)}, some twice", f"<= {MAX_TENSORS}, each once"
        )
    for entry in entries:
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.flag_bits & 1
            or entry.file_size != entry.compress_size
        ):
            raise _bad(
                path,
                f"zip entry {entry.filename!r}",
                "compressed or encrypted",
                "stored as torch.save does",
            )
    if sum(e.file_size for e in entries) > size:
        raise _bad(
            path, "zip entries overlap", f"{sum(e.file_size for e in entries)} bytes", f"<= {size}"
        )


def _check_opcodes(stream: bytes, path: Path) -> None:
    """Refuse, before anything is run, opcodes and keys that a dict of tensors does not need."""
    types = _Types()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name not in OPCODES or count == MAX_OPCODES:
                raise _bad(path, "pickle", f"opcode {opcode.name}", "a plain dict of tensors")
            # a huge memo index makes an unpickler allocate memory for all indices below it
            if opcode.name in ("LONG_BINPUT", "LONG_BINGET") and int(argument or 0) > count:
                raise _bad(path, "pickle", f"memo index {argument}", f"<= {count}")
            for key in types.apply(opcode, argument):
                # tuples of tuples of one tuple, 50 deep, take 2^50 steps to hash
                if key not in KEYS:
                    raise _bad(path, "pickle", f"a {key} as a key", "text or a number")
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises whatever a damaged argument makes it raise
        raise CheckpointError.build(
            path, f"damaged pickle ({error})", do="restore the file from its source"
        ) from None


class _Types:
    """The unpickler's stack and memo with types for objects: what a stream would do, undone."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def apply(self, opcode: Any, argument: Any) -> list[Any]:
        """Follow one opcode; returns the types of the keys it sets in a dict."""
        name, pop, push = opcode.name, len(opcode.stack_before), list(opcode.stack_after)
        if name == "MARK":
            self.marks.append(len(self.stack))
            return []
        keys = [self.stack[-2]] if name == "SETITEM" else []
        if pickletools.markobject in opcode.stack_before:
            start = self.marks.pop()
            keys = self.stack[start::2] if name == "SETITEMS" else []
            del self.stack[start:]
            pop = opcode.stack_before.index(pickletools.markobject)
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            return []
        if name in ("BINGET", "LONG_BINGET"):
            push = [self.memo[argument]]
        left = len(self.stack) - pop
        if left < (self.marks[-1] if self.marks else 0):
            raise ValueError("too few values on the stack")
        self.stack[left:] = push
        return keys


class _Dict(dict[Any, Any]):
    """Stands in for OrderedDict: made empty, and deaf to attributes that a pickle sets on it."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(stream))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        found = _ALLOWED.get((module, name))
        if found is None:
            raise _bad(
                self._path,
                "refused: the pickle names a global that a file of tensors does not need",
                f"{module}.{name}",
                "tensors only",
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(numel)) if key.isdigit():
                return _Storage(dtype, key, numel)
        raise _bad(
            self._path, "storage reference malformed", BRIEF.repr(pid), "one written by torch.save"
        )


# Builtin constructors are immutable, so that a BUILD opcode cannot change them for later files;
# a NamedTuple has no __dict__ to write to, and a class with __setstate__ is asked before its own.
class _Rebuild(NamedTuple):
    arity: int

    def __call__(self, *args: Any) -> _Tensor:
        if self.arity == 3:
            tensor = args[0]
            if not isinstance(tensor, _Tensor):
                raise ValueError("a parameter without a tensor")
            return tensor
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(6),
    ("torch._utils", "_rebuild_parameter"): _Rebuild(3),
}


def _is_contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True
