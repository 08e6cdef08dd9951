"""Processes that write outputs at once, without space, or until they are killed.

Every writer is a fork that runs ``pem merge`` in a folder of ``world.build``.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pem_composition import checkpoint, cli, safe_files
from pem_composition.errors import CheckpointError

MODULES, MODELS = ("-a", "good", "bad"), ("-a", "m1", "m2", "--full_merge")
SHARES = (0.25, 0.75)


def merge(inputs: tuple[str, ...], out: str, t: float, *words: str) -> int:
    """One run of the program."""
    return cli.main(["merge", *inputs, "-p", out, "--coefficients", f"{t}", f"{1 - t}", *words])


def forked(action: Callable[[], int]) -> int:
    """Start a process that exits with the action's code; its output goes to PID.err."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{os.getpid()}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(action())


def ended(pid: int) -> tuple[int, str]:
    """Exit code and output of such a process."""
    _, status = os.waitpid(pid, 0)
    path = Path(f"{pid}.err")
    text = path.read_text()
    path.unlink()
    return os.waitstatus_to_exitcode(status), text


def kill(kind: str, times: int) -> None:
    """Writers of new outputs, and of one that is replaced again and again, are killed."""
    inputs = MODULES if kind == "module" else MODELS
    for t in SHARES:
        start = time.monotonic()
        merge(inputs, f"{kind}-{t}", t)
        seconds = time.monotonic() - start
    merge(inputs, f"{kind}-over", SHARES[0])  # a writer killed early leaves this one
    for n in range(times):

        def write(n: int = n) -> int:
            for i in itertools.count():
                if n % 2:
                    merge(inputs, f"{kind}-new-{n}-{i}", SHARES[0])
                else:
                    merge(inputs, f"{kind}-over", SHARES[i // 2 % 2], "--overwrite")

        pid = forked(write)
        time.sleep(random.uniform(0.5, 4) * seconds)
        os.kill(pid, signal.SIGKILL)
        code, _ = ended(pid)
        assert code == -signal.SIGKILL
        if not n % 2:
            visit(f"{kind}-over")
            assert weights(f"{kind}-over") in [weights(f"{kind}-{t}") for t in SHARES]


def visit(out: str) -> None:
    """What the next writer does first: put right what a killed one left."""
    with suppress(CheckpointError, KeyboardInterrupt), safe_files.atomic_directory(out):
        raise KeyboardInterrupt


def weights(out: str) -> bytes | None:
    """The written weights, None where there is no output; an incomplete one is an error."""
    if not Path(out).exists():
        return None
    return checkpoint.inspect_header(out).weights.read_bytes()


def race(how: str) -> None:
    """Four writers, fifteen outputs, each written by all four at the same moment."""
    start = time.time() + 0.5

    def write(t: float) -> int:
        time.sleep(start - time.time())
        for i in range(15):
            words = ["--overwrite"] if how == "over" else []
            code = merge(MODULES, "race" if how == "over" else f"race-{i}", t, *words)
            sys.stdout.write(f"exit code {code}\n")
        return 0

    pids = [forked(lambda t=t: write(t)) for t in (0.2, 0.4, 0.6, 0.8)]
    for pid in pids:
        code, text = ended(pid)
        assert code == 0
        sys.stdout.write(text)


def space(inputs: tuple[str, ...]) -> None:
    """Files of at most 4 kB stand for a full disk: a new output, and one over an old one."""
    merge(inputs, "out", SHARES[0])
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}

    def limited(out: str, *words: str) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return merge(inputs, out, SHARES[1], *words)

    for out, *words in (("new",), ("out", "--overwrite")):
        code, text = ended(forked(lambda out=out, words=words: limited(out, *words)))
        assert code == 3, text
        assert text.count("\n") == 1 and "File too large" in text, text
    assert not Path("new").exists()
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


def main(words: list[str]) -> int:
    """FOLDER, then: kill module|model TIMES, race over|new, or space -a good bad."""
    folder, scenario, *rest = words
    os.chdir(folder)
    random.seed(0)
    if scenario == "kill":
        kill(rest[0], int(rest[1]))
    elif scenario == "race":
        race(rest[0])
    else:
        space(tuple(rest))
    return 0
