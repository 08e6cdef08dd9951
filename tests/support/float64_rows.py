"""Rows for tiny models in float64, without a tokenizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from support.tiny_models import VOCABULARY, random_module, tiny
from torch import Tensor, nn

from pem_composition.evaluation.evaluator import ClassificationEvaluator
from pem_composition.evaluation.padded import Batch
from pem_composition.module import PEM
from pem_composition.tasks.glue import Task, get_task


def model_and_modules(kind: str = "lora", count: int = 2, name: str = "roberta"):
    """A tiny classifier in float64 and modules of one kind, each with a head of its own."""
    model = tiny(name).double()
    modules = [random_module(tiny(name), kind, seed=s, head_seed=s) for s in range(1, count + 1)]
    return model, [wide(m) for m in modules]


def wide(module: PEM) -> PEM:
    return replace(module, tensors={n: t.double() for n, t in module.tensors.items()})


def rows(count: int, seed: int = 0) -> list[Tensor]:
    """Token ids of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=draw).tolist()
    return [torch.randint(5, VOCABULARY, (1, n), generator=draw) for n in lengths]


def evaluator(
    count: int = 6, task: str | Task = "mnli", seed: int = 0, size: int = 1
) -> ClassificationEvaluator:
    """Random rows with random labels; batches of ``size`` rows, padded on the right."""
    task = get_task(task) if isinstance(task, str) else task
    draw = np.random.default_rng(seed)
    labels = (
        draw.uniform(0, 5, count) if task.regression else draw.integers(task.num_labels, size=count)
    )
    ids = rows(count, seed)
    batches = []
    for start in range(0, count, size):
        own = list(range(start, min(start + size, count)))
        width = max(ids[i].shape[1] for i in own)
        padded = torch.ones(len(own), width, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for place, i in enumerate(own):
            padded[place, : ids[i].shape[1]] = ids[i][0]
            mask[place, : ids[i].shape[1]] = 1
        batches.append(Batch(own, {"input_ids": padded, "attention_mask": mask}))
    return ClassificationEvaluator(task, labels.tolist(), batches)


def logits(model: nn.Module, found: ClassificationEvaluator) -> list[Tensor]:
    """One row of logits per row, without padding."""
    out = []
    for batch in found.batches:
        for ids, mask in zip(*batch.inputs.values(), strict=True):
            out.append(model(input_ids=ids[mask.bool()][None]).logits[0])
    return out
