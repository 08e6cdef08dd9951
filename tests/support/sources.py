"""The package's own source as syntax trees, for tests of what it says."""

from __future__ import annotations

import ast
import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "pem_composition"
SOURCES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """Parsed when the first test asks, not when tests are collected."""
    with _no_garbage():
        return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@functools.cache
def nodes() -> dict[Path, list[ast.AST]]:
    """Every node of each file, the file itself first."""
    with _no_garbage():
        return {path: list(ast.walk(tree)) for path, tree in trees().items()}


@contextmanager
def _no_garbage() -> Iterator[None]:
    """A third of the time: hundreds of thousands of nodes are made, and none is freed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
