"""Named members of zips and tars, and nothing else: no path of an archive becomes a path here."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pem_composition.errors import DataError


def extract(archive: Path, folder: str, names: Sequence[str], out: Path) -> None:
    """Copy ``folder/name`` of a zip to ``out/name``: the names are ours, never the archive's."""
    with zipfile.ZipFile(archive) as bundle:
        for name in names:
            with bundle.open(f"{folder}/{name}") as source, (out / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def tar_member(archive: Path | bytes, name: str, limit: int) -> bytes:
    """The bytes of one regular file of a gzipped tar, given as a path or as its content.

    Raises:
        DataError: it is absent, a link or another special file, or larger than ``limit`` bytes.
    """
    where = archive.name if isinstance(archive, Path) else "the inner archive"
    stream = archive.open("rb") if isinstance(archive, Path) else io.BytesIO(archive)
    with stream, tarfile.open(fileobj=stream, mode="r:gz") as bundle:
        for entry in bundle:
            if entry.name != name:
                continue
            if not entry.isreg():
                raise DataError.build(f"{where}: {name}", "not a regular file")
            if entry.size > limit:
                raise DataError.build(
                    f"{where}: {name}", "too large", found=entry.size, expected=f"at most {limit}"
                )
            content = bundle.extractfile(entry)
            assert content is not None  # a regular file
            return content.read()
    raise DataError.build(where, "member missing", expected=name)
