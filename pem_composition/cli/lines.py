"""Files of JSON lines that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pem_composition.errors import UsageError


def check_free(path: Path, overwrite: bool) -> None:
    """Before the work: the output must not be there yet.

    Raises:
        UsageError: it is, and may not be replaced.
    """
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError.build(path, "the output exists", do="choose another or add --overwrite")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line and say how many there are.

    Raises:
        PEMError: whatever the rows raise; the path is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count
