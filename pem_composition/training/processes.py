"""What is asked of a launch, and the workers that ``accelerate launch --cpu`` leaves out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pem_composition.errors import EXIT_PREEMPTED, UsageError
from pem_composition.launch import WORLD, world_size
from pem_composition.signals import SIGNALS


def check_sharding(environment: Mapping[str, str], *, fsdp: bool) -> None:
    """What is trained is saved whole by one process, which only --fsdp allows.

    Raises:
        UsageError: accelerate was told to shard it, too; or there is one process to shard among.
    """
    if fsdp and world_size() == 1:
        raise UsageError.build(
            "--fsdp", "shares the base out among processes", found="one process",
            do="start several: torchrun --nproc-per-node N -m pem_composition train ...",
        )  # fmt: skip
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environment.get(name, "").lower() in ("true", "1", "yes"):
            raise UsageError.build(
                "accelerate launch", f"{what} shards what pem train saves whole",
                found=f"{name}=true",
                do="launch without it and add --fsdp, which shards the base and leaves the module "
                "whole; or keep one copy of the base per GPU, in 4 bits (--load_in_4bit)",
            )  # fmt: skip


def missing_workers(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """The N of ``accelerate launch --cpu --num_processes N``, which starts one process only.

    Without MPI, accelerate then runs the program once and says nothing: the batch would be N times
    smaller than meant. It leaves MASTER_ADDR set and no world size. 0 where nothing is missing.

    Args:
        parent: command line of the launching process.

    Raises:
        UsageError: several processes were asked for, but their number is not on the command line.
    """
    launched = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    alone = not any(name in environment for name in WORLD)
    if not (launched and alone and "MASTER_ADDR" in environment and _is_accelerate(parent)):
        return 0
    words = [part for word in parent for part in word.split("=", 1)]
    for flag in ("--num_processes", "--num-processes"):
        if flag in words[:-1] and words[words.index(flag) + 1].isdigit():
            return int(words[words.index(flag) + 1])
    raise UsageError.build(
        "accelerate launch --cpu",
        "started one process where several were asked for",
        expected="--num_processes N on its command line",
        do="add it, or use torchrun --nproc-per-node N",
    )


def _is_accelerate(command: Sequence[str]) -> bool:
    return any("accelerate" in Path(word).name or "accelerate" in word for word in command[:4])


def parent_command() -> list[str]:
    """Command line of the parent process; empty where the system does not tell."""
    with suppress(OSError):
        return os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")
    return []


def run_workers(count: int, command: Sequence[str]) -> int:
    """Run ``count`` copies of a command as one group of workers, passing signals on to them.

    Returns:
        The exit code of the first worker that failed, 0 if none did; the others are then stopped.
    """
    shared = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    workers: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for worker in workers:
            worker.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    for i in range(count):
        place = {"RANK": str(i), "LOCAL_RANK": str(i)}
        workers.append(subprocess.Popen(list(command), env=shared | place))
    for worker in workers if received else ():  # some may have been started after it
        worker.send_signal(received[0])
    code = _wait(workers)
    return EXIT_PREEMPTED if -code in received else code  # one died before it could note it


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    running, code = list(workers), 0
    while running:
        for worker in list(running):
            with suppress(subprocess.TimeoutExpired):
                worker.wait(timeout=0.1)
                running.remove(worker)
                if worker.returncode and not code:
                    code = worker.returncode
                    _stop_after_failure(code, running)
    return code


def _stop_after_failure(code: int, running: Sequence[subprocess.Popen[bytes]]) -> None:
    """A worker that is gone leaves the others waiting for it; preempted ones end by themselves."""
    for worker in running if code != EXIT_PREEMPTED else ():
        worker.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main_command() -> list[str]:
    """The command line that this program was started with."""
    return [sys.executable, *sys.orig_argv[1:]]
