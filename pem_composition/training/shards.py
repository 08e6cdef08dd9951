"""Checkpoints of a model that is trained while it is shared out among processes.

Every process writes its parts (torch.distributed.checkpoint, in safetensors: nothing to unpickle),
and any number of processes reads them, one included: each its own slices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as parts
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pem_composition.evaluation.sharding import part, stored_tensors

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

MODEL, OPTIMIZER = "model_shards", "optimizer_shards"  # folders of a checkpoint
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def hold(checkpoint: Path) -> bool:
    """True for a checkpoint that is in parts."""
    return (checkpoint / MODEL).is_dir()


def write_model(model: PreTrainedModel, checkpoint: Path) -> None:
    """Write this process's parts of a model; every process does it."""
    _write(stored_tensors(model), checkpoint / MODEL)


def read_model(model: PreTrainedModel, checkpoint: Path) -> None:
    """Put the numbers of a checkpoint into a model, shared out or not."""
    _read({n: t.detach() for n, t in stored_tensors(model).items()}, checkpoint / MODEL)


def write_optimizer(model: PreTrainedModel, optimizer: Optimizer, checkpoint: Path) -> None:
    """Write this process's parts of the optimizer's state; every process does it."""
    _write(_state(get_optimizer_state_dict(model, optimizer, options=FLAT)), checkpoint / OPTIMIZER)


def read_optimizer(model: PreTrainedModel, optimizer: Optimizer, checkpoint: Path) -> None:
    """Put the state of a checkpoint into an optimizer; rates and decays stay as they are."""
    known = get_optimizer_state_dict(model, optimizer, options=FLAT)
    found = _state(known)
    _read(found, checkpoint / OPTIMIZER)
    numbers = {n: type(known[n])(v) for n, v in found.items() if not isinstance(known[n], Tensor)}
    set_optimizer_state_dict(model, optimizer, known | numbers, options=FLAT)


@contextmanager
def taken_apart(optimizer: Optimizer) -> Iterator[None]:
    """Within, an optimizer of parts takes what one process saved: each process its own of it."""

    def own_parts(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {
                name: part(v, parameters[number])
                if getattr(v, "shape", None) == parameters[number].shape
                else v
                for name, v in values.items()
            }
            for number, values in saved["state"].items()
        }
        return saved | {"state": state}

    handle = optimizer.register_load_state_dict_pre_hook(own_parts)
    try:
        yield
    finally:
        handle.remove()


def _state(flat: dict[str, Any]) -> dict[str, Tensor]:
    """The state's values as tensors; the settings of the groups, which are flags, stay out."""
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in flat.items()
        if name.startswith("state.")
    }


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    with _as_error():
        parts.save(
            {n: t.detach() for n, t in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            no_dist=not torch.distributed.is_initialized(),
        )


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    with _as_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        parts.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not torch.distributed.is_initialized(),
        )


@contextmanager
def _as_error() -> Iterator[None]:
    """The first process's failure as an error, which theirs is not one of (a BaseException)."""
    try:
        yield
    except CheckpointException as failure:
        rank, (error, _) = next(iter(failure.failures.items()))
        raise RuntimeError(f"process {rank}: {error}") from failure
