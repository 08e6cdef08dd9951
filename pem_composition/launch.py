"""Which of how many processes of torchrun, accelerate or MPI this is. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

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


def share(work: Sequence[T]) -> tuple[Sequence[T], Callable[[Tensor], None]]:
    """This process's part of the work, and what makes a tensor the sum of those of all processes.

    Of processes that have joined (``join_group``); where there is less work than processes, each
    does all of it.
    """
    torch = sys.modules["torch"]
    group = torch.distributed
    world = world_size()
    if world == 1 or len(work) < world or not group.is_initialized():
        return work, lambda tensor: None

    def add_up(tensor: Tensor) -> None:
        here = tensor.cpu()  # the group is gloo's
        group.all_reduce(here)
        if here is not tensor:
            tensor.copy_(here)

    return work[rank() :: world], add_up


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
