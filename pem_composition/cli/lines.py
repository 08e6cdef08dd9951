"""Files that programs write."""

from __future__ import annotations

from pathlib import Path

from pem_composition.errors import UsageError


def check_free(path: Path, overwrite: bool) -> None:
    """Before the work: the output must not be there yet.

    Raises:
        UsageError: it is, and may not be replaced.
    """
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError.build(path, "the output exists", do="choose another or add --overwrite")
