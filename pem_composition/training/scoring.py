"""Score a model on one split, the rows shared out among the processes.

The keys are those of ``eval_results.json``.

Shapes: n rows, c outputs.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pem_composition.evaluation import metrics
from pem_composition.evaluation.classify import (
    Batch,
    EncodedDataset,
    EvalResult,
    batches,
    predict,
    score,
)
from pem_composition.tasks.glue import Task


class Scorer:
    """Metrics of a model on rows that were sorted and padded once; draws no random numbers."""

    def __init__(
        self, task: Task, data: EncodedDataset, *, batch_size: int, pad_to: int | None = None
    ) -> None:
        self.task = task
        self.labels = metrics.gold_labels(task, data.labels)
        self.batches = batches(data, batch_size=batch_size, pad_to=pad_to)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Loss, metrics, standard error, AUC, predicted shares and time."""
        start = time.perf_counter()
        logits = self._logits(model)
        result = score(self.task, logits, self.labels, seconds=time.perf_counter() - start)
        return {"loss": mean_loss(self.task, logits, self.labels), **report(result)}

    def _logits(self, model: nn.Module) -> NDArray[np.float32]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return predict(model, self.batches)
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, self._share(model, self.batches[rank::world]))
        parts = [part for part in parts if part is not None]
        out = np.empty((len(self.labels), parts[0][1].shape[1]), np.float32)
        for rows, logits in parts:
            out[rows] = logits
        return out

    @staticmethod
    def _share(
        model: nn.Module, own: tuple[Batch, ...]
    ) -> tuple[list[int], NDArray[np.float32]] | None:
        """This process's row numbers and their logits."""
        if not own:
            return None
        ends = np.cumsum([len(b.rows) for b in own]).tolist()
        local = [
            Batch(list(range(e - len(b.rows), e)), b.inputs) for b, e in zip(own, ends, strict=True)
        ]
        return [row for b in own for row in b.rows], predict(model, local)


def report(result: EvalResult) -> dict[str, Any]:
    """An evaluation as it stands in the result files."""
    return {
        **result.scores,
        "stderr": result.stderr,
        "samples": result.n,
        "auc": result.auc,
        "predicted_shares": result.predicted_shares,
        "degenerate": result.degenerate,
        "runtime": round(result.seconds, 3),
    }


def mean_loss(task: Task, logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean cross entropy of logits (n, c), or mean squared error for regression."""
    wide = logits.astype(np.float64)
    if task.regression:
        return float(np.mean((wide[:, 0] - labels) ** 2))
    shifted = wide - wide.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_total - shifted[np.arange(len(labels)), labels]))
