"""Score a model on one split, the rows shared out among the processes.

The keys are those of ``eval_results.json``.

Shapes: n rows, k outputs per row.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from pem_composition.evaluation.classify import EvalResult, in_order
from pem_composition.evaluation.evaluator import Evaluator, Outputs


class Scorer:
    """Metrics of a model in an evaluator that was prepared once; draws no random numbers."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Loss, metrics, standard error, AUC, predicted shares and time."""
        start = time.perf_counter()
        return self.scores(self.outputs(model), seconds=time.perf_counter() - start)

    def scores(self, outputs: Outputs, *, seconds: float = 0.0) -> dict[str, Any]:
        """The same of outputs (n, k) that are at hand."""
        result = self.evaluator.score(outputs, seconds=seconds)
        return {"loss": self.evaluator.loss(outputs), **report(result)}

    def outputs(self, model: nn.Module) -> Outputs:
        """Outputs (n, k) of every row, on every process."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.evaluator.predict(model)
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        own = self.evaluator.batches[rank::world]
        parts: list[Any] = [None] * world
        share = self.evaluator.outputs(model, own) if own else None
        torch.distributed.all_gather_object(parts, share)
        rows, outputs = zip(*(part for part in parts if part is not None), strict=True)
        return in_order([row for part in rows for row in part], np.concatenate(outputs))


def report(result: EvalResult) -> dict[str, Any]:
    """An evaluation as it stands in the result files."""
    text = {} if result.invalid_share is None else {"invalid_share": result.invalid_share}
    return {
        **result.scores,
        "stderr": result.stderr,
        "samples": result.n,
        "auc": result.auc,
        "predicted_shares": result.predicted_shares,
        "degenerate": result.degenerate,
        **text,
        "runtime": round(result.seconds, 3),
    }
