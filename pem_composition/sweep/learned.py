"""A merge whose coefficients are learned by gradient on rows: learn, write, and how to redo it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pem_composition import launch
from pem_composition.checkpoint import save
from pem_composition.composition import compose
from pem_composition.errors import UsageError
from pem_composition.merging import learning
from pem_composition.merging.learning import (
    ENTROPY,
    NULL_SPACE,
    Learned,
    LearningRule,
    Lesson,
    learn,
)
from pem_composition.merging.null_space import row_spaces
from pem_composition.module import PEM, combine
from pem_composition.sweep.runner import Say
from pem_composition.sweep.setup import MergeSetup
from pem_composition.tasks.data import VALIDATION

__all__ = ["learning", "run"]

LEARNED = "learned.json"
RECIPE = "recipe.yaml"
BATCH = 16


def run(
    setup: MergeSetup, rule: LearningRule, method: str, *, allow_base_mismatch: bool, say: Say
) -> tuple[PEM, Learned]:
    """Learn, and write the module with ``learned.json`` and a recipe for pem compose beside it.

    The processes of a launch share the batches, and the first one writes.

    Raises:
        PEMError: modules or rows that cannot be used.
    """
    modules = [i.pem for i in setup.inputs()[: setup.count]]
    if rule.loss == NULL_SPACE:
        if len(setup.tasks) != len(modules):
            raise UsageError.build(
                "--task_name", "each task's rows are seen through the A of its own module",
                found=f"{len(setup.tasks)} tasks for {len(modules)} modules",
                expected="one task per module, in the same order",
            )  # fmt: skip
        rule = replace(rule, batches=setup.scoring.batch_size or BATCH)
    launch.join_group()
    model, tokenizer = setup.load()
    lessons = _lessons(setup, rule, modules, model, tokenizer, say)
    every = max(1, rule.steps // 10)

    def progress(step: int, loss: float) -> None:
        if step % every == 0:
            say(f"step {step} of {rule.steps}: loss {loss:.4f}")

    learned = learn(model, modules, lessons, rule, progress)
    launch.leave_group()
    recipe = _recipe(setup, modules, learned)
    merged = compose(
        recipe["expression"], dict(zip(recipe["modules"], modules, strict=True)), space="delta",
        rank=setup.rank, dtype=setup.dtype, head=recipe["head"], layers=recipe["layers"],
        allow_base_mismatch=allow_base_mismatch,
    )  # fmt: skip
    if not launch.is_main():
        return merged, learned
    record = {
        "method": method,
        "rule": vars(rule),
        "modules": list(setup.names[: setup.count]),
        "layers": list(learned.layers),
        "coefficients": [list(row) for row in learned.coefficients],
        "loss_before": learned.before,
        "loss_after": learned.after,
        "history": list(learned.history),
    }
    beside = {
        name: (json.dumps(content, indent=1) + "\n").encode()
        for name, content in ((LEARNED, record), (RECIPE, recipe))  # JSON is YAML
    }
    save(
        merged, setup.out, format=setup.format, dtype=setup.dtype, overwrite=setup.overwrite,
        beside=beside,
    )  # fmt: skip
    return merged, learned


def _lessons(
    setup: MergeSetup,
    rule: LearningRule,
    modules: Sequence[PEM],
    model: Any,
    tokenizer: Any,
    say: Say,
) -> list[Lesson]:
    """The validation rows of every task that the loss is defined for, with their heads."""
    common_head = None
    if not setup.own_heads and setup.scoring.by_head:
        equal = [1.0 / len(modules)] * len(modules)
        whole = combine(modules, equal, space="delta", head=setup.head, certify=False)
        common_head = whole.head_tensors() or None
    found, alone = [], rule.loss == NULL_SPACE
    for place, task in enumerate(setup.tasks):
        if rule.loss == ENTROPY and task.data.task.regression and task.prompt is None:
            say(f"note: {task.name} is a regression, which has no entropy; left out")
            continue
        rows = task.rows(VALIDATION)
        assert rows is not None, "required when the tasks were read"
        evaluator = task.objective.evaluator(
            task.data.task, rows, tokenizer, model.config,
            batch_size=1 if alone else setup.scoring.batch_size or BATCH,
            device=next(model.parameters()).device,
        )  # fmt: skip
        head = modules[place].head_tensors() if setup.own_heads else common_head
        own = row_spaces(model, modules[place]) if alone else None
        found.append(Lesson(task.name, evaluator, head, own))
    if not found:
        raise UsageError.build("--task_name", "no task to learn on", do="use --method cat or nsc")
    return found


def _recipe(setup: MergeSetup, modules: Sequence[PEM], learned: Learned) -> dict[str, Any]:
    """What pem compose --config reads: the same module from the same inputs."""
    names = [f"m{i}" for i in range(len(modules))]
    paths = {n: str(Path(p).absolute()) for n, p in zip(names, setup.paths, strict=False)}
    layers = {
        name: {k: v for k, v in learned.of(i).items() if k in modules[i].layers}
        for i, name in enumerate(names)
    }
    options = {"rank": setup.rank, "dtype": setup.dtype}
    return {
        "expression": " + ".join(names), "modules": paths, "space": "delta",
        "head": "none" if setup.own_heads else setup.head, "layers": layers,
        **{name: value for name, value in options.items() if value is not None},
    }  # fmt: skip
