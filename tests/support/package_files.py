"""Package files made for a test: the smallest wheel and source distribution that pip accepts."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from pem_composition import offline


def build_wheel(
    folder: Path, members: dict[str, bytes], package: str = "toy-asset", metadata: str = ""
) -> Path:
    """A wheel with the given members; ``metadata`` is further lines of its METADATA."""
    stem = f"{package.replace('-', '_')}-1.0"
    meta = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        + metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    everything = members | {name: text.encode() for name, text in meta.items()}
    record = io.StringIO()
    for name, data in everything.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        csv.writer(record).writerow([name, f"sha256={digest}", len(data)])
    everything[f"{stem}.dist-info/RECORD"] = record.getvalue().encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in everything.items():
            wheel.writestr(name, data)
    return path


def build_source(folder: Path, members: dict[str, bytes]) -> Path:
    """A source distribution of the given files (names without the leading folder)."""
    path = folder / "toy_asset-1.0.tar.gz"
    path.write_bytes(tar_of({f"toy_asset-1.0/{name}": data for name, data in members.items()}))
    return path


def build_npm(folder: Path, members: dict[str, bytes], scripts: dict[str, str]) -> Path:
    """A registry of one npm package, as files that any web server can serve; the package's file.

    It holds the given files and, in package.json, the scripts. The registry's page of the package
    says ``HERE`` for the server's address.
    """
    manifest = {"name": "toy-asset", "version": "1.0.0", "scripts": scripts}
    files = members | {"package.json": json.dumps(manifest).encode()}
    path = folder / "toy-asset-1.0.0.tgz"
    path.write_bytes(tar_of({f"package/{name}": data for name, data in files.items()}))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    dist = {"tarball": f"HERE/{path.name}", "integrity": f"sha512-{digest}"}
    page = {"name": "toy-asset", "dist-tags": {"latest": "1.0.0"}}
    page["versions"] = {"1.0.0": manifest | {"dist": dist}}
    (folder / "toy-asset").write_text(json.dumps(page), encoding="utf-8")
    return path


def tar_of(members: dict[str, bytes]) -> bytes:
    """A gzipped tar of regular files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as bundle:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            bundle.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def fetched(name: str) -> Path:
    """Folder of a real asset; the test is skipped where it has not been fetched."""
    if not (offline.ASSETS[name].folder() / offline.MANIFEST).is_file():
        pytest.skip(f"not fetched on this machine: pem offline get {name}")
    return offline.get(name)
