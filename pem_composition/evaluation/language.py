"""Language modelling: how well a block i + 1 is predicted from block i, or a document's tokens.

loss = sum over rows and their target tokens of -log p(token | what was read) / tokens
perplexity = exp(loss)

A row is a block (with the one before it to read), a document or a window of a long text.

Shape suffixes: b rows, s tokens of a row, v vocabulary.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pem_composition.errors import RunFailed
from pem_composition.evaluation import padded, standard_errors
from pem_composition.evaluation.encoded import IGNORED, EncodedDataset
from pem_composition.evaluation.evaluator import EvalResult, Evaluator, Outputs
from pem_composition.tasks.document_rows import LANGUAGE

# Tokens per forward pass: their logits over 50,000 words take 0.4 GB per 2,048 tokens.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}


class LanguageEvaluator(Evaluator):
    """Rows with target tokens. k = 2: summed negative log-likelihood and number of tokens."""

    @cached_property
    def labels(self) -> NDArray[Any]:
        return np.zeros(self.size)

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(b, 2)."""
        target_bs = inputs["target_ids"]
        read = {name: column for name, column in inputs.items() if name != "target_ids"}
        logits_bsv = model(**read).logits.float()
        nll_bs = F.cross_entropy(
            logits_bsv.flatten(0, 1), target_bs.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(target_bs)
        return torch.stack([nll_bs.sum(dim=1), (target_bs != IGNORED).sum(dim=1)], dim=1)

    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        """Mean loss of each row; 0 of one of which no token is counted."""
        return outputs[:, 0] / np.maximum(outputs[:, 1], 1)

    def loss(self, outputs: Outputs) -> float:
        """Loss per token."""
        return float(standard_errors.ratio(*outputs.T).value or 0.0)

    def score(self, outputs: Outputs, *, seconds: float = 0.0) -> EvalResult:
        """Loss and perplexity, and the loss's standard error over the choice of rows.

        It is that of a ratio of two sums (``standard_errors.ratio``); of equal rows of their mean.
        """
        if not np.isfinite(outputs).all():
            raise RunFailed.build(
                "evaluation", "the loss of a row is not finite",
                do="the module or its training diverged",
            )  # fmt: skip
        loss, error = standard_errors.ratio(*outputs.T)
        assert loss is not None and error is not None, "there are rows"
        return EvalResult(
            task=self.task.name,
            metric=self.task.primary,
            score=loss,
            stderr=error,
            n=len(outputs),
            scores={"loss": loss, "perplexity": math.exp(min(loss, 700.0))},
            seconds=seconds,
        )


def language_evaluator(data: EncodedDataset, **layout: Any) -> LanguageEvaluator:
    """Rows whose labels are the tokens that should be written; see ``padded.batches``."""
    inputs: Any = {**data.inputs, "target_ids": list(data.labels)}
    padding = {**data.padding, "target_ids": IGNORED}
    encoded = EncodedDataset(inputs, (None,) * len(data), padding)
    budget = padded.by_device(TOKEN_BUDGET, layout.get("device", "cpu"))
    layout = {"token_budget": budget} | layout
    return LanguageEvaluator(LANGUAGE, padded.batches(encoded, **layout))
