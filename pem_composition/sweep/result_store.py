"""results.jsonl: every result once, however many processes work on one output. No torch.

A result is kept under the key of everything that it depends on (``evaluation/keys.py``). Who
computes one holds a lock that ends with the process, on whatever machine it runs, so that others
leave it to him, and take it over if he dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pem_composition import json_lines, launch
from pem_composition.evaluation.keys import VERSION, complete, key_of

Record = Mapping[str, Any]
WRITER: ContextVar[str] = ContextVar("WRITER", default="")  # of results, where not the first one
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
ACCIDENTS = ("command", "paths", "costs", "peak_memory")
BUSY = {errno.EACCES, errno.EAGAIN}


class ResultStore:
    """The lines of results.jsonl, shared by any number of processes.

    A line torn by a crash is no line. ``fresh`` looks at no line that was there before, so that
    everything is computed again. Every process of a launch but the first writes a file of its own,
    which the first one gathers in the end.

    Attributes:
        records: results by key, those of other processes as of the last look.
        trials: lines of a search, by study and number.
        computed: how many results this process has added.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.trials: dict[tuple[str, int], Record] = {}
        self.last: Record | None = None
        self.computed = 0
        rank = launch.rank()
        writer = WRITER.get() or (str(rank) if rank else "")
        self._written = json_lines.writer_path(path, writer) if writer else path
        self._seen: dict[Path, tuple[int, int]] = {}  # bytes and lines of each file
        self.read_again()
        if fresh:
            self.records, self.trials, self.last = {}, {}, None
        self._before = set(self.records)
        self._asked: set[str] = set()
        self._own: set[str] = set()

    @property
    def known(self) -> int:
        """Results that were asked for and were there at the beginning."""
        return len((self._asked & self._before) - self._own)

    @property
    def shared(self) -> int:
        """Results that were asked for and that other processes have added meanwhile."""
        return len(self._asked - self._before - self._own)

    @property
    def undescribed(self) -> int:
        """Results of earlier releases, which do not say everything that they depend on."""
        return sum("code" in r and VERSION not in r for r in self.records.values())

    def read_again(self) -> list[Record]:
        """Take over what other processes have appended since the last look; the new lines.

        Raises:
            DataError: a damaged line.
        """
        found = []
        for path in json_lines.parts(self.path):
            new = self._read_on(path)
            for record in new:
                self._take(record)
            if new and path == self.path:
                self.last = new[-1]
            found += new
        return found

    def _read_on(self, path: Path) -> list[Record]:
        offset, lines = self._seen.get(path, (0, 0))
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:  # none yet, or gathered since
            return []
        whole = data[: data.rfind(b"\n") + 1]
        found: list[Record] = list(json_lines.parse(data, path, lines + 1))
        self._seen[path] = offset + len(whole), lines + whole.count(b"\n")
        return found

    def append(self, record: Record) -> None:
        """Add one line."""
        json_lines.append(self._written, record)
        self.read_again()

    def once(
        self,
        identity: Mapping[str, Any],
        compute: Callable[[str], Mapping[str, Any]],
        *,
        ready: Callable[[], object] = lambda: None,
        usable: Callable[[Record], bool] = lambda _record: True,
        wait: bool = True,
    ) -> Record | None:
        """The result of an identity: known, or computed and appended by one process.

        Args:
            compute: key -> what the line holds besides the identity.
            ready: called before anything is written; what it refuses leaves no trace.
            usable: whether a known result can be trusted; else it is computed again.
            wait: for another process that is at it; otherwise None is returned then.
        """
        identity = complete(identity)
        key = key_of(identity)

        def trusted(record: Record) -> bool:
            return all(record.get(k) == v for k, v in identity.items()) and usable(record)

        found = self.records.get(key)
        if found is not None and trusted(found):
            self._asked.add(key)
            return found
        ready()
        with self.claim(key, wait=wait) as mine:
            if not mine:
                return None
            self.read_again()
            other = self.records.get(key)
            self._asked.add(key)
            if other is not None and other is not found and trusted(other):
                return other
            began = time.perf_counter()
            result = compute(key)
            seconds = round(time.perf_counter() - began, 4)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.append({"key": key, **identity, **result, "seconds": seconds, "time": now})
            self.computed += 1
            self._own.add(key)
        return self.records[key]

    def conclude(self, summary: Record) -> None:
        """Make the summary the last line, if it is not, whatever command and folders led to it.

        The first process of a launch does it, for all.
        """
        if not launch.is_main():
            return
        self.gather()
        with self.claim("summary"):
            self.read_again()
            if _said(self.last or {}) != _said(json.loads(json.dumps(summary))):
                self.append(summary)

    @contextmanager
    def finish(self, summary: Record) -> Iterator[None]:
        """Hold the right to write what stands beside the results; they end with the summary then,
        whatever other processes that share the folder have concluded meanwhile."""
        with self.claim("finish"):
            self.conclude(summary)
            yield

    def gather(self) -> None:
        """Make one file of those of all processes of a launch; its first process does it."""
        if launch.is_main():
            with self.claim("gather"):
                json_lines.gather(self.path)

    @contextmanager
    def claim(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the right to do something; it ends with the block, or with the process.

        Args:
            wait: until another process gives it back; otherwise False is given then.
        """
        with locked(self.path, name, wait=wait) as mine:
            yield mine

    def _take(self, record: Record) -> None:
        if "key" in record:
            self.records[record["key"]] = record
        elif "trial" in record:
            self.trials[record["trial"], record["number"]] = record


def _said(summary: Record) -> dict[str, Any]:
    """A summary without how it was called and what it cost, which decides no number."""
    return {name: value for name, value in summary.items() if name not in ACCIDENTS}


def finite(record: Record, *names: str) -> bool:
    """True if these fields of a record are finite numbers."""
    values = [record.get(name) for name in names]
    return all(type(v) in (int, float) and math.isfinite(v) for v in values)  # type: ignore[arg-type]


_open: dict[Path, tuple[int, int]] = {}  # lock file -> descriptor, how many blocks use it


@contextmanager
def locked(path: Path, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Lock one byte of a file beside another one, whose place is the name's: one file for any
    number of locks. It is taken away, with the folders that it needed, if it guards nothing then.

    Record locks end with the process and hold between machines that share the folder. A process
    loses them all when it closes the file anywhere, so it opens it once. Where a file system has no
    locks everybody is told that he holds them: work is then done twice, and no result is wrong.
    """
    lock = path.with_name(f".{path.name}.lock")
    made = [folder for folder in lock.parents if not folder.exists()]
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    while True:
        descriptor, users = _open.get(lock) or (_opened(lock), 0)
        _open[lock] = descriptor, users + 1
        try:
            mine = _lock(descriptor, place, wait=wait)
            if users or not mine or _is(lock, descriptor):
                yield mine
                return
        finally:
            with suppress(OSError):
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)
            descriptor, users = _open.pop(lock)
            if users > 1:
                _open[lock] = descriptor, users - 1
            else:
                if not any(part.exists() for part in json_lines.parts(path)):
                    _remove(lock, descriptor, made)
                os.close(descriptor)


def _opened(lock: Path) -> int:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process took the folder away
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(descriptor: int, place: int, *, wait: bool) -> bool:
    """False where another process holds it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
    except OSError as error:
        if error.errno not in BUSY | NO_LOCKS:
            raise
        return error.errno in NO_LOCKS
    return True


def _is(lock: Path, descriptor: int) -> bool:
    """False where another process took the file away before it was locked."""
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(lock: Path, descriptor: int, made: Sequence[Path]) -> None:
    """Remove the file unless anybody holds a lock of it, and the folders if they are empty."""
    with suppress(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(lock, descriptor):
            lock.unlink()
            for folder in made:
                folder.rmdir()
