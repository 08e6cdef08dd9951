"""Modules by hub name: ``org/name[@revision][/subfolder]``, or the same behind ``hf://``.

A name stands for a folder of the hub's cache, see ``hub.folder_of``. The commit is part of the
module's identity: ``source_name`` writes it, and a name with a commit always means the same bytes.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from os import PathLike, fspath
from pathlib import Path

from pem_composition.errors import CheckpointError
from pem_composition.safe_files import real_path

SCHEME = "hf://"
PART = r"[A-Za-z0-9][\w.-]*"
HUB_NAME = re.compile(rf"{PART}(/{PART})?", re.ASCII)
REVISION = r"@(refs/(?:pr|convert)/[\w.-]+|[\w.-]+)"
REFERENCE = re.compile(
    rf"(?:hf:/{{1,2}})?({PART}/{PART})(?:{REVISION})?((?:/{PART})*)(?:{REVISION})?", re.ASCII
)  # a path drops one of two slashes
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})((?:/[^/]+)*)")
EXPECTED = f"{SCHEME}org/name, {SCHEME}org/name@revision or {SCHEME}org/name@revision/subfolder"


@dataclass(frozen=True)
class Reference:
    """A module on the hub: its repository, and revision and subfolder where they are named."""

    repository: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        """``hf://org/name@revision/subfolder``."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}{self.subfolder and '/' + self.subfolder}"


def parse(text: str) -> Reference | None:
    """What a text means as a name on the hub; None where it cannot be one.

    Raises:
        CheckpointError: it begins with ``hf:`` and does not go on as a name.

    Examples:
        >>> parse("org/name@v1/sub")
        Reference(repository='org/name', revision='v1', subfolder='sub')
        >>> str(parse("hf://org/name/sub@v1"))
        'hf://org/name@v1/sub'
        >>> parse("./org/name") is None
        True
    """
    found = REFERENCE.fullmatch(text)
    if found is not None and not (found[2] and found[4]):
        return Reference(found[1], found[2] or found[4], found[3].removeprefix("/"))
    if text.startswith("hf:"):
        raise CheckpointError.build(
            text, "not the name of a module on the hub", expected=EXPECTED, do="check the name"
        )
    return None


def reference(path: str | PathLike[str], root: Path = Path()) -> Reference | None:
    """The module on the hub that a path names; None where it means a folder of this machine.

    A folder wins over a module of the hub. So does a path whose first part is a folder: then the
    rest of it is mistyped. ``hf://`` always means the hub.

    Args:
        root: the folder that paths are relative to.
    """
    text = fspath(path)
    named = parse(text)
    if named is None or text.startswith("hf:"):
        return named
    if (root / text).exists():
        _say_local(text, cached(named.repository).is_dir())
        return None
    return None if (root / Path(text).parts[0]).is_dir() else named


@cache
def _say_local(text: str, shadowed: bool) -> None:
    """Tell once that a folder hides a module of the same name in the hub's cache."""
    if shadowed:
        sys.stderr.write(f"note: {text} is the folder here; {SCHEME}{text} is on the hub\n")


def label(folder: Path) -> str:
    """The name of a module by its folder: in the cache that of its repository or subfolder."""
    found = _in_cache(folder)
    if found is None:
        return real_path(folder).name
    return (found.subfolder or found.repository).rpartition("/")[2]


def parts(path: str) -> tuple[str, ...]:
    """The names in a path, the last one the module's own."""
    named = reference(path)
    if named is None:
        return real_path(Path(path)).parts
    return tuple(str(named).removeprefix(SCHEME).split("/"))


def source_name(folder: Path) -> str:
    """``hf://org/name@commit/subfolder`` for a folder of the hub's cache, else its path."""
    return str(_in_cache(folder) or folder)


def _in_cache(folder: Path) -> Reference | None:
    home, place = real_path(cache_folder()), real_path(folder)
    if not place.is_relative_to(home):
        return None
    found = SNAPSHOT.fullmatch(place.relative_to(home).as_posix())
    return found and Reference(f"{found[1]}/{found[2]}", found[3], found[4].removeprefix("/"))


def cache_folder() -> Path:
    """Where the Hugging Face libraries keep what they fetch."""
    home = Path(
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def cached(repository: str) -> Path:
    """The folder that the cache has for a model's repository, whether it is there or not."""
    return cache_folder() / f"models--{repository.replace('/', '--')}"
