"""Label-word scoring: the log-probability of every answer, and whether the model would give one.

score(w) = sum_t log p(w_t | w_1 ... w_{t-1}, x)

over the tokens of an answer w. The end token counts only where one answer's tokens begin another's
("yes", "yes sir"): without it the shorter one could never lose. With answers of one token each this
is what the reference's constrained beam search (two positions, answers forced) compares.

Free greedy generation gives exactly w if each token of w, and then the end token, is the most
probable one after those before it. So the same pass tells which rows would be answered validly,
without generating.

The encoder runs once per row; the decoder reads the start once, and then the answers, on the cached
keys and values. A decoder alone reads the prompt once, and then the answers, likewise. Answers of
one token each need one step more, for the most probable of them only. A step of the decoder reads
one token per row and all of its weights, so it takes the rows of several batches at once.

Shape suffixes: b rows, t input tokens, w answers, l tokens of the longest answer, v vocabulary,
c answers that are continued.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pem_composition import progress
from pem_composition.evaluation import metrics, padded
from pem_composition.evaluation.decoder import DecoderRows
from pem_composition.evaluation.encoded import Writing
from pem_composition.evaluation.evaluator import (
    EvalResult,
    Evaluator,
    Outputs,
    check_finite,
    result_of,
)
from pem_composition.evaluation.padded import Batch
from pem_composition.tasks.glue import Task
from pem_composition.tasks.prompts import Prompt

if TYPE_CHECKING:
    pass

EXACT = "exact_match"
INVALID = -1
# Which of the tokens that are read now lead to a score (b, t), and are no padding; None: all.
REAL_TOKENS: ContextVar[Tensor | None] = ContextVar("real_tokens", default=None)
DECODED_TOKENS = 8192  # of the inputs whose keys and values the decoder keeps at a time


class PromptedRows(NamedTuple):
    """Rows of a task, asked with a prompt.

    Attributes:
        answers: token numbers of each answer, without end token.
        labels: gold labels (n,); None where a row has none.
    """

    task: Task
    prompt: Prompt
    answers: tuple[tuple[int, ...], ...]
    writing: Writing
    labels: Sequence[int | float | None] | NDArray[Any]
    batches: tuple[Batch, ...]


class PromptedEvaluator(Evaluator):
    """Rows asked with a prompt, however they are answered."""

    def __init__(self, asked: PromptedRows) -> None:
        super().__init__(asked.task, asked.batches, asked.labels)
        self.prompt, self.answers, self.writing = asked.prompt, asked.answers, asked.writing

    @cached_property
    def _gold(self) -> NDArray[Any]:
        """Number of the answer that stands for each row's label (n,)."""
        return np.array([self.prompt.answer_of(self.task, y) for y in self.labels])

    @property
    def values(self) -> NDArray[np.float64]:
        """Regression: the numbers that can be answered."""
        return np.array([float(word) for word in self.prompt.answers])

    @abstractmethod
    def written(self, outputs: Outputs) -> NDArray[np.int64]:
        """Number of the answer that is generated for each row (n,), or INVALID."""

    def score(self, outputs: Outputs, *, seconds: float = 0.0) -> EvalResult:
        """Scores of ``predictions``; ``exact_match`` and ``invalid_share`` are of ``written``."""
        check_finite(self.task, outputs, "scores")
        written = self.written(outputs)
        return result_of(
            self.task,
            self.predictions(outputs),
            self.labels,
            more={EXACT: float(np.mean(written == self._gold))},
            auc=self.auc(outputs),
            invalid_share=float(np.mean(written == INVALID)),
            seconds=seconds,
        )

    def auc(self, outputs: Outputs) -> float | None:
        """How well two classes are ranked, where outputs rank them."""
        return None


class ScoringEvaluator(PromptedEvaluator):
    """Rows whose answers are scored. k = w + 1: the score of each answer, then the number of the
    one that greedy generation gives, INVALID if it gives none of them."""

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(b, w + 1) from one pass of the encoder and the steps of the decoder."""
        return score_answers(model, [inputs], self.answers, self.writing)

    def outputs(
        self, model: nn.Module, batches: Sequence[Batch] | None = None
    ) -> tuple[list[int], Outputs]:
        chosen = self.batches if batches is None else batches
        parts = []
        with padded.evaluating(model) as device:
            groups = list(decoded_together(chosen, self.answers))
            for group in progress.over(groups, "reading rows", "batches"):
                inputs = [padded.on_device(batch, device) for batch in group]
                scores = score_answers(model, inputs, self.answers, self.writing)
                parts.append(padded.as_array(scores))
        return padded.joined(chosen, parts)

    def class_scores(self, outputs: Tensor) -> Tensor:
        return outputs[:, :-1]

    def predictions(self, outputs: Outputs) -> NDArray[Any]:
        best = outputs[:, :-1].argmax(axis=1)
        return self.values[best] if self.task.regression else best

    def written(self, outputs: Outputs) -> NDArray[np.int64]:
        return outputs[:, -1].astype(np.int64)

    def auc(self, outputs: Outputs) -> float | None:
        return None if self.task.regression else metrics.auc(outputs[:, :-1], self.labels)

    def loss(self, outputs: Outputs) -> float:
        """Mean of -score(gold answer)."""
        return -float(outputs[np.arange(len(outputs)), self._gold].astype(np.float64).mean())


def decoded_together(
    batches: Sequence[Batch], answers: Sequence[tuple[int, ...]]
) -> Iterator[list[Batch]]:
    """Neighbouring batches of at most DECODED_TOKENS tokens, padded to the widest; at least one.

    Answers of several tokens each have a copy of the row's keys and values.
    """
    copies = 1 if _are_single(answers) else len(answers)
    group: list[Batch] = []
    for batch in batches:
        rows = sum(len(b.rows) for b in [*group, batch])
        width = max(b.inputs["input_ids"].shape[1] for b in [*group, batch])
        if group and rows * width * copies > DECODED_TOKENS:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def score_answers(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    answers: Sequence[tuple[int, ...]],
    writing: Writing,
) -> Tensor:
    """Scores of the answers and the answer of greedy generation, (b, w + 1).

    Args:
        batches: for each pass of the encoder ``input_ids`` and ``attention_mask``, together b rows.
        answers: token numbers of each answer, without end token.
    """
    rows: EncodedRows | DecoderRows
    if writing.start:
        rows = EncodedRows(model, batches, writing)
    else:
        rows = DecoderRows(model, [row for inputs in batches for row in unpadded(inputs)])
    first_bv = F.log_softmax(rows.logits_bv.float(), dim=-1)
    score = _single_tokens if _are_single(answers) else _several_tokens
    return score(rows, first_bv, answers, writing)


def unpadded(inputs: dict[str, Tensor]) -> list[list[int]]:
    """The tokens of each row."""
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids_t[mask_t.bool()].tolist() for ids_t, mask_t in pairs]


class EncodedRows:
    """Rows that an encoder has read, with what its decoder has read; as ``DecoderRows``."""

    def __init__(
        self, model: nn.Module, batches: Sequence[dict[str, Tensor]], writing: Writing
    ) -> None:
        self.model, self.cache = model, None
        self.encoded, self.mask_bt = _encoded(model, batches)
        first = torch.tensor([writing.start], device=self.mask_bt.device)
        self.logits_bv = self.read(first.expand(len(self.mask_bt), -1))[:, -1]

    def select(self, rows_n: Tensor) -> None:
        """Keep the rows of these numbers (n,); a number that occurs twice makes a copy."""
        self.cache.reorder_cache(rows_n)  # type: ignore[attr-defined]
        self.mask_bt = self.mask_bt[rows_n]
        self.encoded = type(self.encoded)(last_hidden_state=self.encoded[0][rows_n])

    def read(self, tokens_bt: Tensor) -> Tensor:
        """Append tokens (b, t) to every row's answer; the logits (b, t, v) behind each of them."""
        out = self.model(
            encoder_outputs=self.encoded, attention_mask=self.mask_bt,
            past_key_values=self.cache, decoder_input_ids=tokens_bt, use_cache=True,
        )  # fmt: skip
        self.cache = out.past_key_values
        logits: Tensor = out.logits
        return logits


def _encoded(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[Any, Tensor]:
    """The encoder's output of all rows and their mask (b, t), t of the widest batch."""
    t = max(inputs["attention_mask"].shape[1] for inputs in batches)
    masks, states = [], []
    for inputs in batches:
        mask_bt = inputs["attention_mask"]
        encoded = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask_bt)
        missing = t - mask_bt.shape[1]
        masks.append(F.pad(mask_bt, (0, missing)))
        states.append(F.pad(encoded.last_hidden_state, (0, 0, 0, missing)))
    rows, device = torch.cat(states), mask_bt.device.type
    if torch.is_autocast_enabled(device):  # every layer of the decoder would round them, twice
        rows = rows.to(torch.get_autocast_dtype(device))
    return type(encoded)(last_hidden_state=rows), torch.cat(masks)


def _single_tokens(
    rows: EncodedRows | DecoderRows,
    first_bv: Tensor,
    answers: Sequence[tuple[int, ...]],
    writing: Writing,
) -> Tensor:
    """Answers of one token: scores are known; one more step tells whether the best one ends."""
    tokens_w = torch.tensor([answer[0] for answer in answers], device=first_bv.device)
    scores_bw = first_bv[:, tokens_w]
    best_b = scores_bw.argmax(dim=1)
    chosen_b = first_bv.argmax(dim=1) == tokens_w[best_b]
    # no score depends on what follows
    said_bv = _read(rows, tokens_w[best_b, None], torch.zeros_like(chosen_b)[:, None])[:, -1]
    ends_b = said_bv.argmax(dim=1) == writing.end
    greedy_b = torch.where(chosen_b & ends_b, best_b, INVALID)
    return torch.cat([scores_bw, greedy_b[:, None].float()], dim=1)


def _several_tokens(
    rows: EncodedRows | DecoderRows,
    first_bv: Tensor,
    answers: Sequence[tuple[int, ...]],
    writing: Writing,
) -> Tensor:
    """Every answer is read by the decoder, on copies of the row's cached keys and values."""
    b, w, width = len(first_bv), len(answers), max(map(len, answers))
    device = first_bv.device
    padded = [[*answer, *[writing.pad] * (width - len(answer))] for answer in answers]
    tokens_wl = torch.tensor(padded, device=device)
    rows.select(torch.arange(b, device=device).repeat_interleave(w))
    lengths_w = torch.tensor([len(answer) for answer in answers], device=device)
    place_l = torch.arange(width + 1, device=device)
    counted_wl = place_l < lengths_w[:, None] + int(_nested(answers))
    logits = _read(rows, tokens_wl.repeat(b, 1), counted_wl[:, 1:].repeat(b, 1))
    later = F.log_softmax(logits.float(), dim=-1).unflatten(0, (b, w))
    log_bwlv = torch.cat([first_bv[:, None, None].expand(-1, w, 1, -1), later], dim=2)
    targets_wl = F.pad(tokens_wl, (0, 1), value=writing.pad)
    targets_wl[torch.arange(w), lengths_w] = writing.end
    gathered_bwl = log_bwlv.gather(3, targets_wl.expand(b, -1, -1)[..., None])[..., 0]
    scores_bw = gathered_bwl.masked_fill(~counted_wl, 0.0).sum(dim=2)
    right_bwl = (log_bwlv.argmax(dim=3) == targets_wl) | (place_l > lengths_w[:, None])
    greedy_bw = right_bwl.all(dim=2)
    greedy_b = torch.where(greedy_bw.any(dim=1), greedy_bw.float().argmax(dim=1), INVALID)
    return torch.cat([scores_bw, greedy_b[:, None].float()], dim=1)


def _read(rows: EncodedRows | DecoderRows, tokens_bt: Tensor, counted_bt: Tensor) -> Tensor:
    """``rows.read``, REAL_TOKENS set to the tokens on whose predictions a score depends."""
    real = REAL_TOKENS.set(counted_bt)
    try:
        return rows.read(tokens_bt)
    finally:
        REAL_TOKENS.reset(real)


def _are_single(answers: Sequence[tuple[int, ...]]) -> bool:
    """True if each answer is one token."""
    return all(len(answer) == 1 for answer in answers)


def _nested(answers: Sequence[tuple[int, ...]]) -> bool:
    """True if one answer's tokens begin another's."""
    return any(a != b and b[: len(a)] == a for a in answers for b in answers)
