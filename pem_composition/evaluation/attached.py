"""Which device computes, and which modules go with a base model and a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pem_composition import checkpoint
from pem_composition.arithmetic.head_policies import tasks_of
from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.evaluation.model_names import resolve
from pem_composition.evaluation.own_classes import answer, in_order_of, of_loaded
from pem_composition.launch import local_rank
from pem_composition.module import PEM
from pem_composition.tasks.glue import Task

Model = TypeVar("Model", bound=Any)


def device_of(use_cpu: bool) -> str:
    """cuda where there is one, unless the CPU is asked for; process i takes device i mod n."""
    if use_cpu or not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    return "cuda"


def device_key(use_cpu: bool) -> str:
    """The kind of device as part of a result's identity: a CPU is not named."""
    return device_of(use_cpu).removeprefix("cpu")


def on_device(model: Model, *, use_cpu: bool, bf16: bool = False) -> Model:
    """The model there; a line says where bfloat16 is slow."""
    device = device_of(use_cpu)
    say_slow(device, bf16=bf16)
    return model.to(device)  # type: ignore[no-any-return]


def bfloat16_note(device: str) -> str | None:
    """What to tell a user who asked for bfloat16 where it is emulated; None where it is not.

    Processors without the instructions convert every number and multiply one by one: measured 8
    times slower than float32 forwards and 40 times backwards (2 cores with AVX2).
    """
    if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "note: this processor has no bfloat16 arithmetic; --bf16 is far slower than float32 here"


def say_slow(device: str, *, bf16: bool, say: Callable[[str], None] = print) -> None:
    """Say where bfloat16 is asked for and emulated."""
    note = bfloat16_note(device) if bf16 else None
    if note:
        say(note)


def load_module(
    path: str,
    model: str,
    task: Task,
    *,
    head: str | None = None,
    needs_head: bool = False,
    allow_base_mismatch: bool = False,
) -> PEM:
    """The module to attach, checked against task and base.

    Args:
        model: folder or name of the base.
        head: which of its heads; None: its own.
        needs_head: refuse a module of several heads if none is named.

    Raises:
        IncompatibleModules: it was trained on another base model, or its head is for another task.
    """
    base = resolve(model)
    module = checkpoint.load(path, base=base)
    if head is not None:
        module = module.with_head(head)
    elif needs_head:
        _check_one_head(path, module)
    _check_labels(path, module, task)
    here, there = checkpoint.base_identity(base).fingerprint, module.base.fingerprint
    if here and there and here != there and not allow_base_mismatch:
        raise IncompatibleModules.build(
            f"--adapter {path}",
            "belongs to another base model",
            found=f"{module.base.name} ({there[:12]})",
            expected=f"{model} ({here[:12]})",
            do="give its own base, or add --allow_base_mismatch",
        )
    return module


def _check_one_head(where: str, module: PEM) -> None:
    """Refuse a module whose heads are for several tasks."""
    named = list(tasks_of(module.head)) if module.head_names else list(module.heads)
    if named:
        raise UsageError.build(
            f"--adapter {where}",
            "has heads for several tasks",
            found=", ".join(named),
            do="name one (--head NAME)",
        )


def _check_labels(where: str, module: PEM, task: Task) -> None:
    """Refuse a module whose head answers other classes than the task's."""
    own = of_loaded(module)
    if not answer(own, in_order_of(task, own).labels):
        raise IncompatibleModules.build(
            f"--adapter {where}",
            f"its head does not answer task {task.name}",
            found=" ".join(own or ()) or "a score",
            expected=" ".join(task.labels) or "a score",
            do="evaluate it on the task it was trained on, in rows that have every class",
        )
