"""Which of how many processes this is, and those that ``accelerate launch --cpu`` leaves out."""

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
from pem_composition.signals import SIGNALS

# As accelerate reads them: torchrun first, then the MPI launchers.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def world_size() -> int:
    """Number of processes that train together."""
    return _first(WORLD, 1)


def rank() -> int:
    """Number of this process, from 0."""
    return _first(RANK, 0)


def is_main() -> bool:
    """True on the process that prints and writes."""
    return rank() == 0


def _first(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)


def leave_group() -> None:
    """End the group of processes, if there is one: its threads may abort an interpreter that exits.

    (Seen once under load: the run was done, and a worker ended with "terminate called".)
    """
    torch = sys.modules.get("torch")
    group = torch.distributed if torch is not None and torch.distributed.is_available() else None
    if group is not None and group.is_initialized():
        group.destroy_process_group()


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
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
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
