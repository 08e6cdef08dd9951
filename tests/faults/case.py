"""One entry of the catalogue of bad input: what is damaged, what is run, what must come of it.

A refusal is one line on stderr, exit code 2 and an untouched folder. ``says`` is that line without
the program's name, or for a result its line on stdout; ``...`` stands for any text.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pem_composition as library
from pem_composition import cli
from pem_composition.errors import PEMError

REPOSITORY = Path(__file__).resolve().parents[2]
Words = tuple[str, ...]

# Every program that reads modules; the culprit is always ``bad``.
READERS: tuple[Words, ...] = (
    ("merge", "-a", "good", "bad", "-p", "out"),
    ("merge", "-a", "bad", "-p", "out", "--space", "delta"),
    ("negation", "-a", "bad", "-p", "out"),
    ("analogy", "-a", "good", "good", "bad", "-p", "out"),
    ("compose", "a - b", "--module", "a=good", "--module", "b=bad", "-p", "out"),
)
INSPECT: Words = ("inspect", "-a", "bad")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        id: as in docs/bad_input.md.
        input: what is wrong, in a few words.
        says: the message, or the line that reports the result.
        damage: makes the input bad; None where the request itself is.
        run: command lines that must all end so; or a function of the folder.
        code: 2 refused, 0 a right result.
        check: of the folder after a result: compares it with an oracle.
        header: inspect, which reads no values, notices it too.
        memory: bytes of address space; the program is then run as a process.
    """

    id: str
    input: str
    says: str
    damage: Callable[[Path], object] | None = None
    run: tuple[Words, ...] | Callable[[Path], object] = READERS
    code: int = 2
    check: Callable[[Path], object] | None = None
    header: bool = True
    memory: int | None = None

    def commands(self) -> Iterator[Words]:
        """The command lines, inspect included where all programs that read modules are run."""
        if isinstance(self.run, tuple):
            yield from self.run
            if self.run is READERS and self.header:
                yield INSPECT


def verify(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the case in its folder (the working directory) and compare what comes of it."""
    if case.damage:
        case.damage(folder)
    before = sorted(folder.rglob("*"))
    if callable(case.run):
        _call(case, case.run, folder)
    for words in case.commands():
        code, out, err = _run(words, case.memory, capsys)
        assert code == case.code, (words, err)
        assert "Traceback" not in err
        if code:
            assert err.count("\n") == 1, (words, err)
            program, _, message = err.strip().partition(": error: ")
            assert program == f"pem {words[0]}"
            expect(case.says, message)
        else:
            expect(case.says, out.strip())
    if case.run is READERS and case.code:
        _call(case, lambda here: library.load("bad"), folder)
    if case.check:
        case.check(folder)
    after = [p for p in sorted(folder.rglob("*")) if folder / "out" not in (p, *p.parents)]
    assert after == before, "something else was written, or run"
    assert (folder / "out").exists() <= (case.code == 0)


def _call(case: Case, run: Callable[[Path], object], folder: Path) -> None:
    if not case.code:
        run(folder)
        return
    with pytest.raises(PEMError) as error:
        run(folder)
    assert error.value.exit_code == case.code
    assert "\n" not in str(error.value)
    expect(case.says, str(error.value))


def expect(pattern: str, text: str) -> None:
    """The text is the pattern, with anything in place of ``...``."""
    parts = [re.escape(part) for part in pattern.split("...")]
    assert re.fullmatch(".*".join(parts), text, re.DOTALL), f"\n{text}\nis not\n{pattern}"


def _run(
    words: Words, memory: int | None, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    if memory is None:
        code = cli.main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return _forks().run(words, memory)


class Forks:
    """A process that has imported what the programs import before torch, and forks for each run."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, words: Words, memory: int) -> tuple[int, str, str]:
        """Exit code, output and errors in an address space of so many bytes."""
        request, answer = self._process.stdin, self._process.stdout
        assert request and answer
        request.write(json.dumps([str(Path.cwd()), memory, words]) + "\n")
        request.flush()
        code, out, err = json.loads(answer.readline())
        return code, out, err


_forks = functools.cache(Forks)
FORKS = """
import json, os, resource, sys, tempfile
from pem_composition.cli import load, main
for name in ("merge", "negation", "analogy", "compose", "inspect"):
    load(name)
for line in sys.stdin:
    folder, limit, words = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = main(words)
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""
