"""Safe file work, standard library only: bounded reads, strict JSON, directories that appear whole.

Reads accept regular files only, so a FIFO never blocks and a link never leads out of the folder it
lies in; every error names the file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pem_composition.errors import CheckpointError, PEMError, wrong_type
from pem_composition.signals import finished_first, named

MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_NESTING = 50
PARTIAL = "partial"  # what a file is called that is being written
LONGEST_STEM = 160  # bytes of a name beside which a temporary name of its own fits into 255


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


def is_file(path: Path) -> bool:
    """True if the path exists and is no directory (a FIFO counts, to be refused by name).

    Asked once: between two questions another process may rename a directory away.
    """
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):  # nothing there, or a name with a null character
        return False


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
            object_pairs_hook=unique_keys,
            parse_constant=refuse_constant,
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object that a JSON reader found; ValueError where a key stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def refuse_constant(word: str) -> float:
    """ValueError: NaN and Infinity, which Python reads, are not JSON."""
    raise ValueError(f"{word} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def as_path(path: str | os.PathLike[str], expected: str = "a path") -> Path:
    """The path that an argument is.

    Raises:
        PEMError: neither text nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise wrong_type("path", path, expected)
    return Path(path)


def listing(folder: Path) -> str:
    """The first twelve names in a folder, for errors; a link that leads nowhere is marked."""
    found = sorted(folder.iterdir())[:12]
    lost = " (a link to nothing)"
    return ", ".join(f"{p.name}{'/' * p.is_dir()}{lost * leads_nowhere(p)}" for p in found)


def real_path(path: Path) -> Path:
    """``Path.resolve``, of links in a circle too."""
    return Path(os.path.realpath(path))


def leads_nowhere(path: Path) -> bool:
    """True for a symbolic link to what is not there, or to itself."""
    return path.is_symlink() and not path.exists()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as ``json_bytes`` gives it."""
    path.write_bytes(json_bytes(value))


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` in UTF-8; undecodable bytes of a path are written as escapes."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; see ``whole_file``."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file beside the path, which takes its place once it is on disk; on error what was
    there stays. What processes that died on this machine left beside it is removed. Of a link the
    file that it leads to is replaced. A file that is replaced leaves its mode to the new one.

    Raises:
        OSError: no space, or no right to write there.
    """
    target = real_path(path) if path.is_symlink() else path
    partial = _sibling(target, PARTIAL)
    try:
        for leftover in _stale(target, PARTIAL):
            leftover.unlink(missing_ok=True)
        with partial.open("wb") as file:
            with suppress(OSError):  # nothing there, or a file system without modes
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        if error.filename in (None, os.fspath(partial)):  # a full disk is said of no file
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be; another process that wants it waits.

    Where the file system has no locks nobody waits.
    """
    with open_folder(folder) as descriptor:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A descriptor to lock a folder by, so that no file is left; the lock ends with the process.

    The folder is made if need be; one that was made for it and is empty in the end goes.
    """
    made = _make_parents(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        with suppress(OSError):
            for directory in reversed(made):
                directory.rmdir()


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


# --- whole directories --------------------------------------------------------------------------


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
    target = _check_target(as_path(path))
    temporary = _sibling(target, "tmp")
    with _folder_for(temporary, os.fspath(path)):
        _clean_stale(target, keep)
        check_free(target, overwrite)
        try:
            _make(temporary, target)
            yield temporary
            _settle(temporary)
            with finished_first():  # a signal must not part the two renames
                _swap(temporary, target, overwrite, keep)
                named(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def files_added(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files then stand in ``folder``, beside what else is there; on
    error nothing changes.

    Raises:
        CheckpointError, OSError: as ``atomic_directory``.
    """
    added = folder / "files"
    temporary = _sibling(added, "tmp")
    with _folder_for(temporary, os.fspath(folder)):
        for leftover in _stale(added, "tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            _make(temporary, folder)
            yield temporary
            _settle(temporary)
            with finished_first():  # all of them, or none
                for file in temporary.iterdir():
                    file.replace(folder / file.name)
                fsync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _folder_for(temporary: Path, output: str) -> Iterator[None]:
    """Make the folder that something temporary lies in; on error what was made goes, and a full
    disk, which is said of no file or of a temporary one, is said of the output."""
    created = _make_parents(temporary.parent)
    try:
        yield
    except BaseException as error:
        for parent in reversed(created):
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and (
            error.filename is None or str(error.filename).startswith(os.fspath(temporary))
        ):
            error.filename = output
        raise


def _check_target(path: Path) -> Path:
    if path.name in ("", "..") or "\0" in str(path):
        raise CheckpointError.build(
            path, "not a name for an output directory", do="name the directory to be written"
        )
    if leads_nowhere(path):
        raise _taken(path, "a link to nothing")
    target = path.absolute()
    resolved = real_path(target)
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
        raise CheckpointError.build(
            parent, "not a directory", found="a file", do="choose another output path"
        )
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


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse an output that exists; each question is asked once, others may be writing there. A
    link stands for the directory that it leads to.

    Raises:
        CheckpointError: a file, or, without ``overwrite``, a directory with files.
    """
    try:
        directory = stat.S_ISDIR(target.stat().st_mode)
        filled = directory and not overwrite and any(target.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    if not directory:
        raise _taken(target)
    if filled:
        raise CheckpointError.build(
            target,
            "the output exists",
            found="a directory with files",
            expected="no such directory",
            do="choose another path or overwrite it (--overwrite)",
        )


def check_makeable(path: Path, *, file: bool = False) -> None:
    """Refuse an output folder (or file) where something else stands, there or on the way to it.

    Raises:
        CheckpointError: a file, a link to nothing, or a folder that may not be written to.
    """
    way = path.parents if file else (path, *path.parents)
    place = next(p for p in way if os.path.lexists(p))
    do = "choose another output path"
    found = "a link to nothing" if leads_nowhere(place) else "a file"
    if not place.is_dir() and place == path:
        raise _taken(path, found)
    if not place.is_dir():
        raise CheckpointError.build(place, "not a directory", found=found, do=do)
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError.build(place, "no right to write there", do=do)


def _taken(path: Path, found: str = "a file") -> PEMError:
    return CheckpointError.build(
        path, "the output exists", found=found, expected="no such path",
        do="choose another output path",
    )  # fmt: skip


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{stem(target)}.{role}-{os.getpid()}-{_host()}{secrets.token_hex(4)}")


def stem(target: Path) -> str:
    """The target's name, or as much of a long one as leaves room for more, and its digest."""
    name = os.fsencode(target.name)
    if len(name) <= LONGEST_STEM:
        return target.name
    return f"{target.name[: LONGEST_STEM // 8]}-{hashlib.sha256(name).hexdigest()[:32]}"


def _clean_stale(target: Path, keep: Callable[[str], bool] | None) -> None:
    """Remove what dead processes of this machine left beside the target."""
    for role in ("old", "tmp"):
        for entry in _stale(target, role):
            with suppress(FileNotFoundError):  # another process cleans, too
                if role == "old" and not target.exists():
                    entry.rename(target)
                else:
                    _carry_over(entry, target, keep if role == "old" else None)


def _stale(target: Path, role: str) -> list[Path]:
    """What ``_sibling`` named for processes that have died on this machine."""
    start, found = f".{stem(target)}.{role}-", []
    for entry in target.parent.iterdir():
        pid, _, tail = entry.name.removeprefix(start).partition("-")
        ours = entry.name.startswith(start) and tail.startswith(_host())
        if ours and pid.isdecimal() and len(pid) < 10 and not _alive(int(pid)):
            found.append(entry)
    return found


def _carry_over(aside: Path, target: Path, keep: Callable[[str], bool] | None) -> None:
    """Move the entries to keep from a replaced directory into the new one, then remove the rest."""
    for entry in list(aside.iterdir()) if keep else []:
        if keep is not None and keep(entry.name) and not (target / entry.name).exists():
            try:
                entry.rename(target / entry.name)
            except FileNotFoundError:  # another process has put it aside: what is kept stays here
                return
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
    placed = False
    try:
        while not placed:
            check_free(target, overwrite)
            if overwrite:
                old = _sibling(target, "old")
                with suppress(FileNotFoundError):  # another process was faster
                    target.rename(old)
                    aside.append(old)
            try:
                temporary.rename(target)  # replaces an empty directory
                placed = True
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
            if old.exists() and (placed or target.exists()):
                _carry_over(old, target, keep)
    fsync(target.parent)
