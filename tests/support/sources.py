"""The package's own source as syntax trees, for tests of what it says."""

from __future__ import annotations

import ast
import functools
import gc
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "pem_composition"
SOURCES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """Parsed when the first test asks, not when tests are collected."""
    gc.disable()  # a third of the time: hundreds of thousands of nodes are made, and none is freed
    try:
        return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    finally:
        gc.enable()
