"""``pem`` in processes of their own, to be killed or signalled at will, without seconds of imports.

A fork server imports torch and transformers once; each ``pem`` is then a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pem_composition.training.preparation",
        "pem_composition.training.trainer",
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
    words = [str(word) for word in argv]
    process = CONTEXT.Process(target=_run, args=(words, str(log), file_limit, variables or {}))
    process.start()
    return Child(process, log)


def _run(argv: list[str], log: str, file_limit: int | None, variables: Mapping[str, str]) -> None:
    import resource

    import torch

    from pem_composition.cli import main

    os.environ.update(variables)
    torch.set_num_threads(1)
    for descriptor, path in ((1, log), (2, Path(log).with_suffix(".err"))):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(argv))
