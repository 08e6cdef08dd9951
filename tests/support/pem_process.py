"""``pem`` in processes of their own, to be killed or signalled at will, without seconds of imports.

A fork server imports torch and transformers once; each ``pem`` is then a fork of it. It renders no
figures: nobody looks at them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pem_composition.training.preparation",
        "pem_composition.training.trainer",
        "pem_composition.report.plot",
        "sklearn.metrics",
        "scipy.stats",
    ]
)


@dataclass
class Child:
    """A running ``pem``; what it prints goes to a file, its errors to another one."""

    process: Any
    log: Path

    @property
    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()

    def text(self) -> str:
        """What it printed, then its errors."""
        return self.log.read_text() + self.errors

    def wait(self) -> int:
        """Its exit code."""
        self.process.join(240)
        code = self.process.exitcode
        assert code is not None, f"still running after 240 s: {self.text()[-2000:]}"
        return int(code)

    def wait_for(self, path: Path, lines: int = 0) -> None:
        """Return as soon as the path exists and has so many lines, while it still runs."""
        deadline = time.monotonic() + 240
        while not path.exists() or (lines and path.read_bytes().count(b"\n") < lines):
            assert self.process.is_alive(), self.text()[-2000:]
            assert time.monotonic() < deadline, f"no {path.name}"
            time.sleep(0.002)

    def send(self, number: int) -> int:
        """Its exit code after a signal."""
        os.kill(self.process.pid, number)
        return self.wait()


def start(
    argv: Iterable[object],
    log: Path,
    *,
    file_limit: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Child:
    """Start ``pem`` with one thread; it may write no file above ``file_limit`` bytes."""
    return call(_pem, argv, log, file_limit=file_limit, variables=variables)


def call(
    function: Callable[[list[str]], int],
    words: Iterable[object],
    log: Path,
    *,
    file_limit: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Child:
    """Start a function of a module in such a process; it gives the exit code."""
    arguments = (function, [str(word) for word in words], str(log), file_limit, variables or {})
    process = CONTEXT.Process(target=_run, args=arguments)
    process.start()
    return Child(process, log)


def _pem(words: list[str]) -> int:
    from pem_composition.cli import main

    return main(words)


def _run(
    function: Callable[[list[str]], int],
    words: list[str],
    log: str,
    file_limit: int | None,
    variables: Mapping[str, str],
) -> None:
    import gc
    import resource

    import torch

    from pem_composition.report import plot

    plot.FORMATS = ()
    gc.freeze()  # what the fork server has imported stays: trainers collect garbage at their end
    os.environ.update(variables)
    torch.set_num_threads(1)
    for descriptor, path in ((1, log), (2, Path(log).with_suffix(".err"))):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(function(words))
