"""Statistics of a module on the rows of its task: Fisher information, Gram matrices; one file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pem_composition import launch
from pem_composition.adapters import attach
from pem_composition.adapters.plan import check_layers, refuse_experts
from pem_composition.arithmetic.statistics import (
    BLOCKS,
    FISHER,
    SUBSPACE,
    Statistics,
    fingerprint,
)
from pem_composition.checkpoint import load
from pem_composition.checkpoint import statistics_files as files
from pem_composition.errors import PEMError
from pem_composition.evaluation.attached import device_of
from pem_composition.evaluation.keys import base_digest, complete, rows_digest
from pem_composition.evaluation.model_names import resolve
from pem_composition.merging.fisher_information import diagonal, parameters_of
from pem_composition.merging.gram_matrices import gram
from pem_composition.training.evaluation import load_asked, module_asked
from pem_composition.training.task_model import TaskModel

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM
    from pem_composition.tasks.data import Example, TaskData


def run(
    asked: TaskModel,
    data: TaskData,
    split: str,
    what: str,
    facts: dict[str, Any],
    output_dir: Path,
    *,
    merge_with: Sequence[str] = (),
    use_cpu: bool = False,
    overwrite: bool = False,
) -> str:
    """Compute and write the statistics of one module; what was done, in one line.

    The processes of a launch share the rows, and the first one writes.

    Args:
        what: fisher, gram or subspace.
        facts: what decides the numbers besides module, rows and base; of fisher its expectation.
        merge_with: of a subspace, the modules whose A is stacked below the module's own.

    Raises:
        PEMError: a module, model or rows that cannot be used.
    """
    launch.join_group()
    module = module_asked(asked, data.task, one_head=False)
    assert module is not None, "statistics are of a module"
    began = time.perf_counter()
    rows = data.splits[split]
    together = [module, *map(load, merge_with)] if what == SUBSPACE else []
    tensors = _computed(asked, data, module, rows, what, together, facts, use_cpu)
    launch.leave_group()
    if not launch.is_main():
        return ""
    if together:
        facts = {**facts, BLOCKS: [fingerprint(m) for m in together]}
    identity = {
        "task": data.task.name,
        "rows": rows_digest(rows),
        "split": split,
        "base": base_digest(resolve(asked.model)),
        "objective": asked.objective,
        "max_seq_length": asked.max_seq_length,
        "module": module.name,
        **facts,
    }
    found = Statistics(what, tensors, fingerprint(module), len(rows), complete(identity))
    path = files.write(found, output_dir, overwrite=overwrite)
    return (
        f"{path}: {what} of {module.name} on {len(rows)} rows of {data.task.name}, "
        f"{len(tensors)} tensors ({time.perf_counter() - began:.1f} s)"
    )


def _computed(
    asked: TaskModel,
    data: TaskData,
    module: PEM,
    rows: Sequence[Example],
    what: str,
    together: Sequence[PEM],
    facts: dict[str, Any],
    use_cpu: bool,
) -> dict[str, Tensor]:
    other = next((m for m in (module, *together) if m.kind != "lora"), None)
    if what != FISHER and other is not None:
        raise PEMError.build(
            other.name, "RegMean and SSR merge LoRA modules", found=f"kind {other.kind}"
        )
    device = device_of(use_cpu)
    objective = asked.objective_of(data.task)
    model, tokenizer, _ = load_asked(asked, data.task)
    evaluator = objective.evaluator(
        data.task, rows, tokenizer, model.config, batch_size=1, device=device
    )
    model = model.to(device)
    with attach(model, module, trainable=True) as attachment:
        if what == FISHER:
            return diagonal(model, parameters_of(attachment), evaluator, **facts)
        refuse_experts(attachment.pem, "the inputs of a stack's experts are not recorded")
        layers = check_layers(model, attachment.pem)
        stacked = _stacked(together, layers) if together else None
        return gram(model, layers, evaluator, rows=stacked)


def _stacked(modules: Sequence[PEM], layers: Iterable[str]) -> dict[str, Tensor]:
    """The A of the modules one below the other, of every layer."""
    names = {layer: f"{layer}.lora_A" for layer in layers}
    return {
        layer: torch.cat([m.tensors[n] for m in modules if n in m.tensors])
        for layer, n in names.items()
    }
