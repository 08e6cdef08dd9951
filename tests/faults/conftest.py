"""The modules and models that bad input is made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import world


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, the working directory."""
    shutil.copytree(modules, tmp_path / "here", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
