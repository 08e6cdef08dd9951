"""Runs a program in this process and gives its exit code, output and error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from pem_composition import cli
from pem_composition.cli import load, parser


class Finished(NamedTuple):
    code: int
    out: str
    err: str


Program = Callable[..., Finished]


@pytest.fixture
def pem(capsys: pytest.CaptureFixture[str]) -> Program:
    """pem("merge", "-a", ...) -> what it returned and printed."""

    def run(*arguments: object) -> Finished:
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """program("merge", "-a", ...): as the program at the repository root."""

    def run(name: str, *arguments: object) -> Finished:
        code = parser.run(load(name), [str(a) for a in arguments], prog=f"{name}.py")
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run
