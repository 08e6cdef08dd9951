"""Every bad input of docs/bad_input.md ends in its one line, or in the right result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import case as cases
from faults import world
from faults.catalogue import CASES


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every case starts from."""
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the working directory."""
    shutil.copytree(modules, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def params() -> Iterator[object]:
    """A case with a bound on memory starts a process, which takes seconds."""
    for case in CASES:
        yield pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.memory else [])


@pytest.mark.parametrize("case", params())
def test_bad_input_ends_in_its_line_or_in_the_right_result(case, folder, capsys):
    cases.verify(case, folder, capsys)
