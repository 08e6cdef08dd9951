"""sha256 of the files of whole models, taken by a thread of their own while the tensors are read.

They are compared with the model's pem.json, where it has one, before a result gets its name, and
are what the result records of its inputs: a sharded model by all of its shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread

from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.card import license_of
from pem_composition.checkpoint.content import MODEL_WEIGHTS, content_digest, content_files
from pem_composition.checkpoint.header import Record, check_sha256
from pem_composition.record import Source
from pem_composition.safe_files import open_regular

BLOCK = 2**20


class Checksums:
    """The checksums of model folders; ``with`` starts to take them.

    Args:
        sources: folders that are recorded as inputs.
        bases: folders that are compared with their own pem.json, and not read without one.
    """

    def __init__(self, sources: list[Path], bases: list[Path] | None = None) -> None:
        records = {folder: provenance.read(folder) for folder in (*sources, *(bases or []))}
        self._records: dict[Path, Record | None] = {
            folder: record
            for folder, record in records.items()
            if folder in sources or (record is not None and record.files)
        }
        self._found: dict[Path, dict[str, str]] = {folder: {} for folder in self._records}
        self._error: Exception | None = None
        self._left = Event()
        self._thread = Thread(target=self._take, daemon=True)

    def __enter__(self) -> Checksums:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        self._thread.join()

    def _take(self) -> None:
        try:
            for folder, found in self._found.items():
                for name in content_files(folder):
                    found[name] = self._sha256(folder, name)
        except Exception as error:  # raised in the caller's thread
            self._error = error

    def _sha256(self, folder: Path, name: str) -> str:
        digest = hashlib.sha256()
        with open_regular(folder / name, folder) as file:
            while (block := file.read(BLOCK)) and not self._left.is_set():
                digest.update(block)
        return digest.hexdigest()

    def check(self) -> None:
        """Wait for them all, and compare the weights with what was recorded when they were written.

        Raises:
            CheckpointError: a file that has changed since.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        for folder, found in self._found.items():
            for name, sha256 in found.items():
                if name.endswith(MODEL_WEIGHTS):
                    check_sha256(folder, name, sha256, self._records[folder])

    def of(self, folder: Path) -> Mapping[str, str]:
        """File -> sha256 of one folder, checked."""
        self.check()
        return self._found[folder]

    def source(self, label: str, folder: Path, sha256: str) -> Source:
        """What is recorded of an input; ``sha256`` is that of its weights file, or of its index."""
        content = content_digest(folder, self.of(folder))
        return Source(label, str(folder), sha256, content=content, license=license_of(folder))
