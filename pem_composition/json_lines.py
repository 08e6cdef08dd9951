"""Files of JSON lines: the one reader and the one writer. No torch.

Programs on several machines that share a folder write a file each beside the one that they all mean
(``writer_path``), as appends from several machines are not safe everywhere; readers take all of
them, and ``gather`` makes one of them.

A line is complete when its line break is there. What a kill left behind the last one is no line: it
is left out when reading and taken away by the next append. A line in the middle that cannot be read
is damage that nobody explains, so it is refused by its number.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError
from pem_composition.safe_files import whole_file

Record = dict[str, Any]
SHOWN = 40  # characters of a damaged line


def read(path: Path) -> list[Record]:
    """The objects of a file in order; none where there is no file.

    Raises:
        DataError: a line that is no JSON object, or holds NaN or infinity; its number is named.
    """
    return list(parse(path.read_bytes(), path)) if path.exists() else []


def writer_path(path: Path, writer: str) -> Path:
    """Where one of several writers appends what belongs into a file."""
    return path.with_name(f".{path.name}.writer-{writer}")


def parts(path: Path) -> list[Path]:
    """The files that hold the lines of one: those of other writers, then the file itself."""
    return [*sorted(path.parent.glob(f".{path.name}.writer-*")), path]


def read_all(path: Path) -> list[Record]:
    """The objects of a file, after those that other writers have for it."""
    return [record for part in parts(path) for record in read(part)]


def gather(path: Path) -> None:
    """Move what other writers have into the file; a line that is moved twice is the same line."""
    for part in parts(path)[:-1]:
        with part.open("r+b") as file:  # some file systems lock only what may be written
            fcntl.flock(file, fcntl.LOCK_EX)
            for record in parse(file.read(), part):
                append(path, record)
            part.unlink()


def parse(data: bytes, path: Path, first: int = 1) -> Iterator[Record]:
    """The objects of the bytes of a file; ``first`` is the number of their first line.

    Raises:
        DataError: as ``read``.
    """
    *lines, rest = data.split(b"\n")
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        found = _object(line)
        if found is None:
            shown = line[:SHOWN].decode(errors="replace")
            raise DataError.build(
                f"{path}, line {number}", "not a line of JSON with finite numbers",
                found=repr(shown), expected="one JSON object",
                do=f"delete the line (sed -i {number}d {shlex.quote(str(path))}); what it held is "
                "computed again",
            )  # fmt: skip
        yield found
    if (last := _object(rest)) is not None:
        yield last


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, whole and on disk; several processes may append at once.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    data = (json.dumps(record, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_locked(path)
    try:
        size = os.fstat(descriptor).st_size
        torn = _tail(descriptor, size)
        if torn and _object(torn) is None:
            size -= len(torn)
            os.ftruncate(descriptor, size)
        elif torn:  # a whole object that lacks its line break
            data = b"\n" + data
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError as error:
        error.filename = os.fspath(path)  # it is said of no file
        raise
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """The file, held alone; one that was gathered meanwhile is made anew."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a file that appears whole, on disk, or not at all; says how many lines it has.

    Raises:
        PEMError: whatever the rows raise; the path is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole_file(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(line.encode())
            count += 1
    return count


def _object(line: bytes) -> Record | None:
    """The object of a line; None where it is none, or has a number that is not finite."""
    try:
        found = json.loads(line, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not finite")


def _tail(descriptor: int, size: int, block: int = 1 << 16) -> bytes:
    """What stands behind the last line break."""
    found = b""
    while size > 0 and b"\n" not in found:
        start = max(0, size - block)
        found = os.pread(descriptor, size - start, start) + found
        size = start
    return found.rpartition(b"\n")[2]
