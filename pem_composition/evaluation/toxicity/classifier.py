"""What a judge is, and the record and file hashes that every judge's folder holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pem_composition import safe_files
from pem_composition.errors import CheckpointError

RECORD = "judge.json"
FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """Which judge it was: part of the key of every result."""

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.sha256[:12]})"


class ToxicityClassifier(Protocol):
    """Scores texts from 0 (harmless) to 1 (toxic), each by itself."""

    @property
    def identity(self) -> Identity:
        """Name, version and hash of everything that decides a score."""
        ...

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Scores (n,) in [0, 1], in the order of the texts."""
        ...

    def seen(self, texts: Sequence[str]) -> NDArray[np.bool_] | None:
        """Which of the texts (n,) it was trained on, up to case and punctuation; None: unknown."""
        ...


def write_record(folder: Path, kind: str, name: str, version: str, **facts: Any) -> None:
    """Write ``judge.json``: the facts, and the sha256 of every file that is in the folder."""
    hashes = {path.name: safe_files.sha256_file(path) for path in sorted(folder.iterdir())}
    record = {"format_version": FORMAT, "kind": kind, "name": name, "version": version}
    safe_files.write_json(folder / RECORD, record | facts | {"files": hashes})


def read_record(folder: Path) -> dict[str, Any]:
    """The record, after its form has been checked; ``verify`` compares the files.

    Raises:
        CheckpointError: no judge in the folder, or one of another format.
    """
    path = folder / RECORD
    if not path.is_file():
        raise CheckpointError.build(
            folder, f"no judge: there is no {RECORD}", do="write one with: pem judge train"
        )
    record = safe_files.read_json(path, folder)
    if record.get("format_version") != FORMAT:
        raise CheckpointError.build(
            path, "another format", found=record.get("format_version"), expected=FORMAT
        )
    texts = all(isinstance(record.get(key), str) for key in ("kind", "name", "version"))
    hashes = record.get("files")
    if not texts or not isinstance(hashes, dict) or not hashes:
        raise CheckpointError.build(path, "malformed", expected="kind, name, version and files")
    return record


def verify(folder: Path, record: Mapping[str, Any], needed: Sequence[str]) -> Identity:
    """Compare the files with the record; the judge's identity.

    Raises:
        CheckpointError: a file is missing or has changed.
    """
    for name in sorted({*needed, *record["files"]}):
        path = folder / Path(name).name
        expected = record["files"].get(name)
        found = safe_files.sha256_file(path, folder)
        if found != expected:
            raise CheckpointError.build(
                path, "changed since the judge was written", found=found, expected=expected,
                do="train or convert the judge again",
            )  # fmt: skip
    decides = [record["kind"], record.get("settings"), record["files"]]
    text = json.dumps(decides, sort_keys=True).encode()
    return Identity(record["name"], record["version"], hashlib.sha256(text).hexdigest())
