"""A stand-in for Slurm: programs that note how they were called, jobs as processes.

What the real one does (seen in 22.05 with one node): the last task of an array has the array's
number as its job number, and ``scontrol requeue`` of that number takes back the whole array,
finished tasks too; ``NUMBER_TASK`` is the one task. A job that waits with ``afterok`` goes on
waiting while the other one is requeued. When that one fails it is cancelled, with
``--kill-on-invalid-dep=yes``.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("sbatch", "scontrol", "squeue", "scancel")
PROGRAM = """#!{python} -ES
import fcntl, json, os, shlex, sys
program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({folder!r} + "/calls", "a+") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.seek(0)
    number = 1 + sum(line.startswith("sbatch ") for line in calls)
    calls.write(shlex.join([program, *arguments]) + "\\n")
if program == "sbatch":
    if "--refuse-me" in arguments[:-2] and number > 1:
        sys.exit("sbatch: error: no such flag")
    with open({folder!r} + f"/job-{{number}}", "w") as job:
        json.dump({{"cwd": os.getcwd(), "environment": dict(os.environ)}}, job)
    print(number)
if program == "squeue" and os.path.exists({folder!r} + "/queue"):
    print(open({folder!r} + "/queue").read(), end="")
"""
SECONDS = 600  # a run that takes longer hangs


@dataclass
class Task:
    """One task of an array."""

    array: int
    index: int
    number: int
    command: list[str]
    output: str
    after: list[tuple[int, int]]
    state: str = "PENDING"
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


class Slurm:
    """The programs in ``bin`` of a folder, what they were called with, and the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._calls = folder / "calls"
        self._read = 0  # of the calls
        self.tasks: list[Task] = []
        self.signalled: list[str] = []
        for name in PROGRAMS:
            program = self.bin / name
            program.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)

    @property
    def path(self) -> str:
        """PATH with these programs first."""
        return f"{self.bin}:{os.environ['PATH']}"

    def calls(self) -> list[str]:
        """Every call so far, as a line of shell."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def forget(self) -> None:
        """Forget the calls so far."""
        self._calls.unlink(missing_ok=True)

    # --- the cluster ---

    def run(self, *, nodes: int = 2, stops: int = 0, draw: random.Random | None = None) -> None:
        """Run what was submitted until nothing more can start.

        Args:
            nodes: jobs at a time.
            stops: so many jobs are stopped at random moments: USR1 to the batch shell (the end of
                its time), TERM to all of its processes (preemption), KILL to all of them (its
                node died; Slurm requeues it by itself).
        """
        draw, deadline = draw or random.Random(0), time.monotonic() + SECONDS
        next_stop = time.monotonic() + draw.uniform(0, 0.5)
        while self._look() or any(t.state == "RUNNING" for t in self.tasks):
            assert time.monotonic() < deadline, [t for t in self.tasks if t.state == "RUNNING"]
            running = [t for t in self.tasks if t.state == "RUNNING"]
            for task in self._ready()[: nodes - len(running)]:
                self._start(task)
            if running and stops and time.monotonic() > next_stop:
                stops -= 1
                self._stop(draw.choice(running), draw.choice(["USR1", "TERM", "KILL"]))
                next_stop = time.monotonic() + draw.expovariate(2.0)
            time.sleep(0.01)

    def _look(self) -> list[Task]:
        """Take in calls and ends; the jobs that can start."""
        for line in self.calls()[self._read :]:
            self._read += 1
            program, *arguments = shlex.split(line)
            if program == "sbatch":
                self._submitted(arguments)
            if program == "scontrol" and arguments[0] == "requeue":
                for task in self._named(arguments[1]):
                    self._requeue(task)
        for task in self.tasks:
            if task.state == "RUNNING" and task.process is not None:
                code = task.process.poll()
                if code is not None and self._read == len(self.calls()):
                    self._kill(task)
                    task.state = "COMPLETED" if code == 0 else f"FAILED {code}"
        for task in self.tasks:
            states = [self._task(*one).state for one in task.after]
            if task.state == "PENDING" and any(s[0] in "FX" for s in states):
                task.state = "X"  # cancelled
        return self._ready()

    def _submitted(self, arguments: Sequence[str]) -> None:
        array = 1 + max((t.array for t in self.tasks), default=0)
        flags = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
        first, last = map(int, flags["array"].split("-"))
        after = flags.get("dependency", "afterok").split(":")[1:]
        assert not after or flags["kill-on-invalid-dep"] == "yes"
        waits = [(int(a), int(t)) for a, t in (one.split("_") for one in after)]
        script = next(i for i, word in enumerate(arguments) if word.endswith(".sh"))
        output = flags["output"].replace("%x", flags["job-name"]).replace("%A", str(array))
        for index in range(first, last + 1):
            number = array if index == last else array * 1000 + index
            command, name = list(arguments[script:]), output.replace("%a", str(index))
            self.tasks.append(Task(array, index, number, command, name, waits))

    def _named(self, name: str) -> list[Task]:
        array, _, index = name.partition("_")
        if index:
            return [self._task(int(array), int(index))]
        whole = [t for t in self.tasks if t.array == int(array)]
        return whole or [t for t in self.tasks if t.number == int(array)]

    def _task(self, array: int, index: int) -> Task:
        return next(t for t in self.tasks if (t.array, t.index) == (array, index))

    def _ready(self) -> list[Task]:
        return [
            task
            for task in self.tasks
            if task.state == "PENDING"
            and all(self._task(*one).state == "COMPLETED" for one in task.after)
        ]

    def _start(self, task: Task) -> None:
        submitted = json.loads((self.folder / f"job-{task.array}").read_text())
        spool = self.folder / f"spool-{task.array}-{task.index}" / "slurm_script"  # it runs a copy
        spool.parent.mkdir(exist_ok=True)
        shutil.copy(Path(submitted["cwd"]) / task.command[0], spool)
        environment = submitted["environment"] | {
            "SLURM_JOB_ID": str(task.number), "SLURM_ARRAY_JOB_ID": str(task.array),
            "SLURM_ARRAY_TASK_ID": str(task.index), "SLURM_SUBMIT_DIR": submitted["cwd"],
        }  # fmt: skip
        with (Path(submitted["cwd"]) / task.output).open("ab") as output:
            task.process = subprocess.Popen(
                ["bash", str(spool), *task.command[1:]], env=environment, cwd=submitted["cwd"],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        task.state = "RUNNING"

    def _stop(self, task: Task, how: str) -> None:
        if task.process is None or task.process.poll() is not None:
            return
        if how != "KILL" and not self._listens(task.process.pid):
            return  # bash has just been started; only Slurm itself could requeue the job now
        self.signalled.append(how)
        if how == "USR1":
            task.process.send_signal(signal.SIGUSR1)
        elif how == "TERM":
            os.killpg(task.process.pid, signal.SIGTERM)
        else:
            self._requeue(task)

    @staticmethod
    def _listens(process: int) -> bool:
        status = Path(f"/proc/{process}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return all(caught >> (n - 1) & 1 for n in (signal.SIGUSR1, signal.SIGTERM))

    def _requeue(self, task: Task) -> None:
        self._kill(task)
        task.state, task.restarts = "PENDING", task.restarts + 1

    @staticmethod
    def _kill(task: Task) -> None:
        if task.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(task.process.pid, signal.SIGKILL)
            task.process.wait()
            task.process = None
