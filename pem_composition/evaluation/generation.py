"""Answers by generation: beam search that can write nothing else, or greedy and free.

What is written is compared token by token: a row is answered if the tokens before the end token
are exactly those of one answer. Decoded text is not compared, for different tokens can decode
alike, and training sees tokens.

Constrained beam search gives the answer w with the largest log p(w | x) that its beams keep, as
the reference does: answers of one token are written in one step, without an end token. Answers of
one common length end where they end; of different lengths each ends with the end token, and

score(w) = log p(w | x) + log p(end | w, x)

without a length penalty. So it gives the answer that label-word scoring (answers.py) prefers; but

- of answers of different lengths, none of which begins another, scoring leaves the end token out;
- of more answers than beams, one that begins badly may be dropped on the way.

Shape suffixes: b rows, t input tokens, s steps, w answers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from pem_composition.evaluation import padded
from pem_composition.evaluation.decoder import padded_left
from pem_composition.evaluation.decoding import CONSTRAINED, SCORING
from pem_composition.evaluation.encoded import EncodedDataset, Writing
from pem_composition.evaluation.evaluator import Outputs
from pem_composition.evaluation.prompted_rows import (
    INVALID,
    PromptedEvaluator,
    PromptedRows,
    ScoringEvaluator,
    unpadded,
)
from pem_composition.tasks.glue import Task
from pem_composition.tasks.prompts import Prompt

BEAMS = 4

Answers = Sequence[tuple[int, ...]]


class WrittenTokens(NamedTuple):
    """Tokens after the start (b, s), and the sum of their log-probabilities (b,)."""

    tokens: Tensor
    log_p: Tensor


class GenerationEvaluator(PromptedEvaluator):
    """Rows answered by generation. k = 2: the number of the answer that was written, INVALID if it
    is none of them, and the log-probability of what was written.

    An invalid answer is wrong: a class of its own for the metrics, and for a regression task the
    number below the lowest answer by one (Raffel et al. 2020 score it as -1).
    """

    def __init__(self, asked: PromptedRows, answers: str) -> None:
        super().__init__(asked)
        self.constrained = answers == CONSTRAINED

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(b, 2)."""
        if self.constrained:
            written = constrained(model, inputs, self.answers, self.writing)
        else:
            written = free(model, inputs, self.writing, max(map(len, self.answers)) + 1)
        numbers_b = answer_numbers(written.tokens, self.answers, self.writing.end)
        return torch.stack([numbers_b.float(), written.log_p.float()], dim=1)

    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        """Classes or values; an invalid answer is the class after the last, or the value below."""
        written = self.written(outputs)
        if self.task.regression:
            return np.append(self.values, self.values.min() - 1)[written]
        return np.where(written == INVALID, self.task.num_labels, written)

    def written(self, outputs: Outputs) -> NDArray[np.int64]:
        return outputs[:, 0].astype(np.int64)

    def loss(self, outputs: Outputs) -> None:
        """None: generation does not tell how likely the gold answer was."""


def prompted_evaluator(
    data: EncodedDataset,
    task: Task,
    prompt: Prompt,
    answers: Answers,
    writing: Writing,
    found: str,
    **layout: Any,
) -> PromptedEvaluator:
    """Rows that a prompt asks, answered as ``found`` says; see ``padded.batches``."""
    batches = padded.batches(data, **layout)
    asked = PromptedRows(task, prompt, tuple(answers), writing, data.labels, batches)
    return ScoringEvaluator(asked) if found == SCORING else GenerationEvaluator(asked, found)


def free(
    model: nn.Module, inputs: dict[str, Tensor], writing: Writing, steps: int
) -> WrittenTokens:
    """Greedy generation of at most so many tokens, with the whole vocabulary to choose from."""
    settings = {"max_new_tokens": steps, "output_logits": True}
    tokens_bs, out = _generate(model, inputs, writing, settings)
    log_bsv = F.log_softmax(torch.stack(out.logits, dim=1).float(), dim=-1)
    log_bs = log_bsv.gather(2, tokens_bs[..., None])[..., 0]
    ended_bs = (tokens_bs == writing.end).cumsum(dim=1) - (tokens_bs == writing.end).long()
    return WrittenTokens(tokens_bs, log_bs.masked_fill(ended_bs > 0, 0.0).sum(dim=1))


def constrained(
    model: nn.Module,
    inputs: dict[str, Tensor],
    answers: Answers,
    writing: Writing,
    *,
    beams: int = BEAMS,
) -> WrittenTokens:
    """Beam search in which every step must continue one of the answers, or end it."""
    lengths = {len(answer) for answer in answers}
    settings = {
        "max_new_tokens": max(lengths) + (len(lengths) > 1),
        "num_beams": beams,
        "length_penalty": 0.0,
        "output_scores": True,
    }
    tokens_bs, out = _generate(model, inputs, writing, settings, answers)
    return WrittenTokens(tokens_bs, out.sequences_scores)


def allowed_tokens(answers: Answers, end: int, skip: int) -> Callable[[int, Tensor], list[int]]:
    """For ``prefix_allowed_tokens_fn``: (row, tokens so far) -> tokens that may come next.

    Args:
        skip: number of tokens before the answer.
    """
    next_tokens = continuations(answers, end)

    def allowed(_row: int, tokens: Tensor) -> list[int]:
        return next_tokens.get(tuple(tokens[skip:].tolist()), [end])

    return allowed


def continuations(answers: Answers, end: int) -> dict[tuple[int, ...], list[int]]:
    """The trie of the answers: beginning -> tokens that follow it in some answer, or its end."""
    trie: dict[tuple[int, ...], list[int]] = {}
    for answer in answers:
        for place, token in enumerate((*answer, end)):
            following = trie.setdefault(tuple(answer[:place]), [])
            if token not in following:
                following.append(token)
    return trie


def answer_numbers(tokens_bs: Tensor, answers: Answers, end: int) -> Tensor:
    """Number of the answer that each row's tokens before the first end token are (b,), or INVALID.

    Where no end token was written, all tokens count.
    """
    closed_bs = F.pad(tokens_bs, (0, 1), value=end)
    numbers_b = torch.full((len(tokens_bs),), INVALID, device=tokens_bs.device)
    for number, answer in enumerate(answers):
        wanted = torch.tensor([*answer, end], device=tokens_bs.device)
        if len(wanted) <= closed_bs.shape[1]:
            same_b = (closed_bs[:, : len(wanted)] == wanted).all(dim=1)
            numbers_b = numbers_b.masked_fill(same_b, number)
    return numbers_b


def _generate(
    model: nn.Module,
    inputs: dict[str, Tensor],
    writing: Writing,
    settings: dict[str, Any],
    answers: Answers | None = None,
) -> tuple[Tensor, Any]:
    """New tokens (b, s) of ``model.generate`` with these settings and none of the model's own.

    Args:
        answers: what alone may be written.
    """
    config = GenerationConfig(
        eos_token_id=writing.end, pad_token_id=writing.pad, do_sample=False,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    if writing.start:
        ids_bt, mask_bt = inputs["input_ids"], inputs["attention_mask"]
        first = torch.tensor([writing.start], device=mask_bt.device).expand(len(mask_bt), -1)
        config.decoder_start_token_id = writing.start[0]
        hooks: dict[str, Any] = {"decoder_input_ids": first}
        skip = len(writing.start)
    else:
        ids_bt, mask_bt = padded_left(unpadded(inputs), inputs["input_ids"].device)
        hooks, skip = {}, ids_bt.shape[1]
    if answers is not None:
        hooks["prefix_allowed_tokens_fn"] = allowed_tokens(answers, writing.end, skip)
    with _own_settings_aside(model):
        out = model.generate(  # type: ignore[operator]
            ids_bt, attention_mask=mask_bt, generation_config=config, **hooks
        )
    return out.sequences[:, skip:], out


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Models bring settings (a forced first word, a least length) that ``generate`` mixes in."""
    own: GenerationConfig = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
