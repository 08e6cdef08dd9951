"""results.jsonl: finished points, appended one line at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pem_composition.report.records import read_lines


class Ledger:
    """results.jsonl: one finished point per line, appended whole and flushed to disk.

    A line torn by a crash is skipped when reading and closed off when writing. ``fresh`` looks at
    no earlier line, so that every point is computed again.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        lines = [] if fresh else read_lines(path)
        self.records: dict[str, dict[str, Any]] = {r["key"]: r for r in lines if "key" in r}
        self.last = lines[-1] if lines else None

    def read_again(self) -> None:
        """Take over what other processes have appended."""
        for record in read_lines(self.path):
            if "key" in record:
                self.records.setdefault(record["key"], record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line with a single write; several processes may append at once."""
        line = json.dumps(record, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (("\n" if torn else "") + line).encode()
            if os.write(descriptor, data) != len(data):
                raise OSError(28, "No space left on device", str(self.path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.last = dict(record)
        if "key" in record:
            self.records[record["key"]] = self.last
