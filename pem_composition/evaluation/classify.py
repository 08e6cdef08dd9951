"""Predict and score a classification or regression set: tokenised once, padded per batch.

Rows are sorted by length, so short rows make short batches; logits come back in the order of the
rows. Padding is on the right and masked, so it changes a row's logits by rounding only.
Shape suffixes: n rows, c outputs; b rows of a batch, t tokens of its longest row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation import metrics
from pem_composition.tasks.data import Example
from pem_composition.tasks.glue import Task
from pem_composition.tasks.tokens import first_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 32
DEFAULT_MAX_LENGTH = 128
# Rows per forward pass where none is given: on a CPU a larger batch pads more and gains nothing.
BATCH_ROWS = {"cpu": 16, "cuda": 64}
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class EncodedDataset:
    """Tokenised rows in their original order, of different lengths.

    Indexing gives what a Hugging Face data collator pads: ``input_ids``, ``attention_mask``,
    ``token_type_ids`` where the model has them, and ``labels`` unless the row has none.

    Attributes:
        notes: what a user should know of the rows, such as how many were cut.
    """

    inputs: Mapping[str, list[list[int]]]
    labels: tuple[int | float | None, ...]
    padding: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: rows[index] for name, rows in self.inputs.items()}
        if self.labels[index] is not None:
            row["labels"] = self.labels[index]
        return row

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return [len(ids) for ids in self.inputs["input_ids"]]


class Batch(NamedTuple):
    """Row numbers of a batch (b,) and its padded inputs, each (b, t)."""

    rows: list[int]
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class EvalResult:
    """Scores of one evaluation.

    Attributes:
        score: the primary metric, whose standard error over the choice of rows is ``stderr``.
        scores: every metric of the task (``Task.scores``).
        predicted_shares: share of the rows per predicted class; empty for regression.
        degenerate: nearly every row gets the same class (above 97 percent).
        auc: two classes only: how well the logits rank.
        invalid_share: text-to-text only: share of the rows for which generation gives none of the
            answers; free and greedy generation, unless the evaluator is one of constrained answers.
        seconds: wall time of the predictions.
    """

    task: str
    metric: str
    score: float
    stderr: float
    n: int
    scores: dict[str, float] = field(default_factory=dict)
    predicted_shares: dict[str, float] = field(default_factory=dict)
    degenerate: bool = False
    auc: float | None = None
    invalid_share: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return asdict(self)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_seq_length: int = DEFAULT_MAX_LENGTH,
) -> EncodedDataset:
    """Tokenise every row once; longer rows are cut, the longer text of a pair first.

    An empty text is read as the start token where the tokenizer adds none (GPT-2).

    Raises:
        DataError: no rows, an empty one without such a token, or a length of less than 8 tokens.
    """
    if not examples:
        raise DataError.build("encode", "no rows", expected="at least one")
    if max_seq_length < 8:
        raise DataError.build(
            "--max_seq_length", "too short", found=max_seq_length, expected="at least 8 tokens"
        )
    texts = [e.text for e in examples]
    pairs = [e.text_pair for e in examples] if examples[0].text_pair is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_seq_length, padding=False)
    padding = {
        "input_ids": tokenizer.pad_token_id or 0,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    inputs = {name: list(encoded[name]) for name in INPUT_NAMES if name in encoded}
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = [[1] * len(ids) for ids in inputs["input_ids"]]
    for place, example in enumerate(examples):
        if not inputs["input_ids"][place]:  # a model cannot read nothing
            token = first_token(tokenizer, f"row {example.row_id}")
            row = {"input_ids": token, "attention_mask": 1, "token_type_ids": 0}
            for name, column in inputs.items():
                column[place] = [row[name]]
    return EncodedDataset(inputs, tuple(e.label for e in examples), padding)


def batches(
    data: EncodedDataset,
    *,
    batch_size: int | None = None,
    token_budget: int | None = None,
    pad_to: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Batch, ...]:
    """Padded batches, longest rows first (so that a lack of memory shows at once).

    Args:
        batch_size: most rows of a batch; None: 16 on a CPU, 64 on a GPU.
        token_budget: most tokens of a batch, padding included; a longer row has a batch of its own.
        pad_to: pad every batch to this many tokens, as ``--pad_to_max_length`` does.

    Raises:
        DataError: a batch size or a budget that is not positive.
    """
    if batch_size is None:
        batch_size = BATCH_ROWS.get(torch.device(device).type, BATCH_ROWS["cuda"])
    if batch_size < 1 or (token_budget is not None and token_budget < 1):
        raise DataError.build(
            "--per_device_eval_batch_size", "not a batch size", expected="at least 1",
            found=batch_size if batch_size < 1 else token_budget,
        )  # fmt: skip
    groups = _groups(data.lengths, batch_size, token_budget)
    return tuple(Batch(rows, _pad(data, rows, pad_to, device)) for rows in groups)


def predict(
    model: nn.Module,
    data: EncodedDataset | Sequence[Batch],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    token_budget: int | None = None,
    pad_to: int | None = None,
) -> NDArray[np.float32]:
    """Logits (n, c) in the order of the rows, without dropout and gradients.

    A sweep makes its batches once (``batches``) and passes them here for every point.
    """
    device = next(model.parameters()).device
    if isinstance(data, EncodedDataset):
        data = batches(
            data, batch_size=batch_size, token_budget=token_budget, pad_to=pad_to, device=device
        )
    return in_order(*collect(model, data, _logits))


def collect(
    model: nn.Module,
    data: Sequence[Batch],
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor],
) -> tuple[list[int], NDArray[np.float32]]:
    """Row numbers (n,) and ``forward``'s outputs (n, k) in the order of the batches.

    In evaluation mode, without gradients; the model's mode is as before afterwards.

    Raises:
        DataError: no batches.
    """
    with evaluating(model) as device:
        parts = [as_array(forward(model, on_device(batch, device))) for batch in data]
    return joined(data, parts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and the mode as before afterwards; gives the device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's inputs where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}


def as_array(outputs: Tensor) -> NDArray[np.float32]:
    """Outputs (b, k) as they are kept."""
    return outputs.float().cpu().numpy()


def joined(
    data: Sequence[Batch], parts: Sequence[NDArray[np.float32]]
) -> tuple[list[int], NDArray[np.float32]]:
    """Row numbers (n,) and outputs (n, k) of batches.

    Raises:
        DataError: no batches.
    """
    if not parts:
        raise DataError.build("predict", "no batches", expected="at least one row")
    return [row for batch in data for row in batch.rows], np.concatenate(parts)


def in_order(rows: Sequence[int], outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (n, k) of the row numbers (n,), which are 0 ... n - 1 in any order, by row number."""
    out = np.empty_like(outputs)
    out[list(rows)] = outputs
    return out


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def evaluate(
    model: nn.Module,
    data: EncodedDataset,
    task: Task,
    *,
    prepared: Sequence[Batch] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    token_budget: int | None = None,
    pad_to: int | None = None,
) -> EvalResult:
    """Predict every row and score the predictions.

    Args:
        prepared: the batches of ``data``, if they are at hand.

    Raises:
        DataError: rows without labels, or a head that does not fit the task.
        RunFailed: a logit that is not finite.
    """
    labels = metrics.gold_labels(task, data.labels)
    start = time.perf_counter()
    logits = predict(
        model, prepared or data, batch_size=batch_size, token_budget=token_budget, pad_to=pad_to
    )
    return score(task, logits, labels, seconds=time.perf_counter() - start)


def score(
    task: Task, logits: NDArray[Any], labels: NDArray[Any], *, seconds: float = 0.0
) -> EvalResult:
    """Everything that is reported of logits (n, c) against labels (n,).

    Raises:
        RunFailed: a logit that is not finite.
    """
    check_finite(task, logits, "logits")
    return result_of(
        task,
        metrics.predictions_of(task, logits),
        labels,
        auc=None if task.regression else metrics.auc(logits, labels),
        seconds=seconds,
    )


def check_finite(task: Task, outputs: NDArray[Any], what: str) -> None:
    """Refuse outputs (n, k) that are not numbers.

    Raises:
        RunFailed: naming the first such row.
    """
    finite = np.isfinite(outputs).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise RunFailed.build(
            f"evaluation of {task.name}", f"the {what} of row {row} are not finite",
            found=outputs[row].tolist(), do="the module or its training diverged",
        )  # fmt: skip


def result_of(
    task: Task,
    predictions: NDArray[Any],
    labels: NDArray[Any],
    *,
    more: Mapping[str, float] | None = None,
    auc: float | None = None,
    invalid_share: float | None = None,
    seconds: float = 0.0,
) -> EvalResult:
    """Metrics, standard error and shares of predictions (n,), beside what is known already."""
    scores = metrics.compute(task, predictions, labels, task.scores)
    shares = metrics.predicted_shares(task, predictions)
    return EvalResult(
        task=task.name,
        metric=task.primary,
        score=scores[task.primary],
        stderr=metrics.standard_error(task.primary, predictions, labels),
        n=len(labels),
        scores={**scores, **(more or {})},
        predicted_shares=shares,
        degenerate=metrics.is_degenerate(shares),
        auc=auc,
        invalid_share=invalid_share,
        seconds=seconds,
    )


def _groups(lengths: Sequence[int], batch_size: int, budget: int | None) -> Iterator[list[int]]:
    """Row numbers by falling length, cut where the batch is full."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[group[0]] if group else 0
        if group and (
            len(group) == batch_size or (budget is not None and longest * (len(group) + 1) > budget)
        ):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _pad(
    data: EncodedDataset, rows: Sequence[int], pad_to: int | None, device: torch.device | str
) -> dict[str, Tensor]:
    width = max(pad_to or 0, *(len(data.inputs["input_ids"][i]) for i in rows))
    out = {}
    for name, column in data.inputs.items():
        padded_bt = torch.full((len(rows), width), data.padding[name], dtype=torch.long)
        for place, row in enumerate(rows):
            padded_bt[place, : len(column[row])] = torch.tensor(column[row])
        out[name] = padded_bt.to(device)
    return out
