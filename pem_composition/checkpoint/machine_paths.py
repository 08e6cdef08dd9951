"""Paths of a machine in a record: cut to their last names before the record is published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# Inside a text: two names or more from the root, a home or a parent folder on. No address.
PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:(?:~[\w.-]*|\.\.)/|/(?=[^/\s]+/)|[A-Za-z]:[\\/])[^\s'\"`,;|()\[\]]+"
)


def without_paths(value: Any) -> Any:
    """A JSON value in which every path of a machine is its last name; relative paths stay.

    Examples:
        >>> without_paths({"path": "/home/me/my runs/a", "notes": ["a was read from ~/runs/a"]})
        {'path': 'a', 'notes': ['a was read from a']}
        >>> without_paths(["runs/a", "hf://org/name", "0.5*a + b", "https://a.org/b/c"])
        ['runs/a', 'hf://org/name', '0.5*a + b', 'https://a.org/b/c']
    """
    if isinstance(value, str):
        return _name(value) if _is_path(value) else PATH.sub(lambda m: _name(m[0]), value)
    if isinstance(value, Mapping):
        return {without_paths(k): without_paths(v) for k, v in value.items()}
    return [without_paths(v) for v in value] if isinstance(value, list) else value


def _is_path(text: str) -> bool:
    begins = ("/", "~", "../", "..\\")
    return "\n" not in text and (text.startswith(begins) or PureWindowsPath(text).is_absolute())


def _name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name
