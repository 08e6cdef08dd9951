"""Which of how many processes of torchrun, accelerate or MPI this is. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
# As accelerate reads them: torchrun first, then the MPI launchers.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
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


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return _first(LOCAL, 0)


def own_first(work: Sequence[T]) -> list[T]:
    """Every n-th piece of work from this process's own number on, then what may be left of others.

    >>> own_first("abc")
    ['a', 'b', 'c']
    """
    world, own = world_size(), rank()
    return [piece for i in range(world) for piece in work[(own + i) % world :: world]]


def _first(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)


def join_group() -> None:
    """Join the processes of the launch, if there are several, to tell each other of rows.

    torch has been imported.
    """
    group = sys.modules["torch"].distributed
    if world_size() > 1 and not group.is_initialized():
        group.init_process_group("gloo")


def leave_group() -> None:
    """End the group of processes, if there is one: its threads may abort an interpreter that exits.

    (Seen once under load: the run was done, and a worker ended with "terminate called".)
    """
    torch = sys.modules.get("torch")
    group = torch.distributed if torch is not None and torch.distributed.is_available() else None
    if group is not None and group.is_initialized():
        group.destroy_process_group()
