"""Fixtures shared by all tests: real data and golden files where they are at hand."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.examples import FEW

# An example has no time limit: a slow or busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=FEW)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """``-m "not slow"`` tries laws on fewer examples."""
    quick = config.getoption("markexpr") == "not slow"
    settings.load_profile("quick" if quick else "untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays: Python need not look again and again for what goes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of golden files and real data beside the repository; absent on most machines."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder `shared` (golden files, data) beside the repository")
    return path


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so none in this process waits until its files reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def templates_are_read_once() -> Iterator[None]:
    """PEFT writes a card beside every module: compiling its template takes longest of all."""
    import jinja2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(scope="session", autouse=True)
def advice_is_possible() -> Iterator[None]:
    """Whatever a test has refused: the flags that the message names are flags of the program."""
    from support import advice

    from pem_composition.cli import parser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "guarded", advice.checked(parser.guarded))
        yield


@pytest.fixture(scope="session", autouse=True)
def formats() -> Iterator[tuple[str, ...]]:
    """Programs make figures of results, too; who looks at their files asks for ``plots``."""
    from pem_composition.report import plot

    with pytest.MonkeyPatch.context() as patch:
        before = plot.FORMATS
        patch.setattr(plot, "FORMATS", ())
        yield before


@pytest.fixture
def plots(formats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are rendered, which takes most of their time."""
    monkeypatch.setattr("pem_composition.report.plot.FORMATS", formats)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are faster so, and batched sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
