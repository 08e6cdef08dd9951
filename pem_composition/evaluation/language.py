"""Language modelling: how well a block i + 1 is predicted from block i, or a document's tokens.

loss = sum over rows and their target tokens of -log p(token | what was read) / tokens
perplexity = exp(loss)

A row is a block (with the one before it to read), a document or a window of a long text.

Shape suffixes: b rows, s tokens of a row, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pem_composition.errors import RunFailed
from pem_composition.evaluation import classify, statistics
from pem_composition.evaluation.answers import Writing, writing_of
from pem_composition.evaluation.classify import EncodedDataset, EvalResult
from pem_composition.evaluation.exam import Exam, ExamSettings, Outputs
from pem_composition.tasks.data import Example
from pem_composition.tasks.polarity import LANGUAGE, Block, next_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


IGNORED = -100  # a token that is read, but not counted


class LanguageExam(Exam):
    """Rows with target tokens. k = 2: summed negative log-likelihood and number of tokens."""

    @classmethod
    def prepare(
        cls,
        settings: ExamSettings,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        **layout: Any,
    ) -> LanguageExam:
        """Cut the documents into blocks."""
        pairs = encode_blocks(tokenizer, examples, settings.block_size)
        writing = writing_of(tokenizer, config)
        return cls(LANGUAGE, classify.batches(_rows(pairs, writing), **layout))

    @property
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
        return float(statistics.ratio(*outputs.T).value or 0.0)

    def result(self, outputs: Outputs, *, seconds: float = 0.0) -> EvalResult:
        """Loss and perplexity, and the loss's standard error over the choice of rows.

        It is that of a ratio of two sums (``statistics.ratio``); of equal rows that of their mean.
        """
        if not np.isfinite(outputs).all():
            raise RunFailed.build(
                "evaluation", "the loss of a row is not finite",
                do="the module or its training diverged",
            )  # fmt: skip
        loss, error = statistics.ratio(*outputs.T)
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


def encode_blocks(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], block_size: int
) -> list[tuple[Block, Block]]:
    """Pairs of neighbouring blocks of the documents, each with its end token.

    Raises:
        DataError: fewer than two blocks.
    """
    texts = [example.text for example in examples]
    ids = tokenizer(texts, add_special_tokens=False, truncation=False).input_ids
    return next_blocks([[*row, tokenizer.eos_token_id] for row in ids], block_size)


def shifted(tokens: Sequence[int], writing: Writing) -> list[int]:
    """What the decoder reads to write the tokens: its start, then all but the last of them."""
    return [writing.start[0], *tokens[:-1]]


def _rows(pairs: Sequence[tuple[Block, Block]], writing: Writing) -> EncodedDataset:
    size = len(pairs[0][0])
    inputs = {
        "input_ids": [source for source, _ in pairs],
        "attention_mask": [[1] * size for _ in pairs],
        "decoder_input_ids": [shifted(target, writing) for _, target in pairs],
        "target_ids": [target for _, target in pairs],
    }
    padding = dict.fromkeys(inputs, 0)
    return EncodedDataset(inputs, (None,) * len(pairs), padding)
