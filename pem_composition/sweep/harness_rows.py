"""The tasks of the lm-evaluation-harness as what a sweep scores its points on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.evaluation import harness
from pem_composition.sweep.result_store import Record
from pem_composition.tasks.data import VALIDATION, Example

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

FOLDER = "samples"


class HarnessRows:
    """One task of the harness; its samples at every point are kept in a file.

    Args:
        out: folder of the sweep; samples go to OUT/samples.
        batch_size: requests per forward pass; None: 1.
        bf16: matrix products in bfloat16.
    """

    def __init__(
        self,
        task: harness.HarnessTask,
        out: Path,
        *,
        batch_size: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.task, self.out, self.batch_size, self.bf16 = task, out, batch_size, bf16
        self.name, self.metrics, self.identity = task.name, task.metrics, task.identity
        self._lm: Any = None

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The rows as texts, which tell whether two splits share some."""
        texts = (json.dumps(row, default=str, sort_keys=True) for row in self.task.rows)
        return tuple(Example(text, None, None, n) for n, text in enumerate(texts))

    def rows(self, split: str) -> tuple[Example, ...] | None:
        """A task of the harness has one split."""
        return self.examples if split == VALIDATION else None

    def scored(self, *_splits: object) -> HarnessRows:
        """The task itself; it brings its rows."""
        return self

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Show the model to the harness, before anything is attached to it."""
        if self._lm is None:
            self._lm = harness.language_model(
                model, tokenizer, batch_size=self.batch_size, bf16=self.bf16
            )

    def evaluate(
        self, _model: nn.Module, _partial: Path, key: str, **_precision: bool
    ) -> dict[str, Any]:
        """Score, standard error, what it is made of row by row, and the file of samples.

        Raises:
            DataError: the harness cannot ask or score the task.
        """
        assert self._lm is not None, "prepare comes first"
        answered = self.task.answer(self._lm)
        metric = self.task.metrics[0]
        own = answered.stderr[metric]
        error = self.task.estimate([(1.0, answered.values)])[1] if own is None else own
        file = f"{FOLDER}/{self.name}-{key[:12]}.jsonl"
        harness.write_samples(self.out / file, answered.samples)
        return {
            "metric": metric,
            "score": answered.scores[metric],
            "standard_error": error,
            "standard_error_by": "rows drawn again" if own is None else "lm_eval",
            "n": len(self.task.rows),
            "scores": answered.scores,
            "stderr": answered.stderr,
            "values": answered.values,
            "samples": file,
            "loss": None,
            "auc": None,
            "predicted_share": {},
            "degenerate": False,
            "invalid_share": None,
        }

    def gain(self, record: Record, others: Sequence[Record]) -> tuple[float, float]:
        """score - mean of the others' scores, and its standard error row by row."""
        share = -1.0 / len(others)
        terms = [(1.0, record["values"]), *((share, other["values"]) for other in others)]
        return self.task.estimate(terms)

    def average(self, records: Sequence[Record]) -> dict[str, Any]:
        """The mean of the records' scores as a row of the table."""
        share = 1.0 / len(records)
        score, error = self.task.estimate([(share, record["values"]) for record in records])
        first = {name: records[0][name] for name in ("metric", "n")}
        return {**first, "score": score, "standard_error": error, "auc": None}


def read(
    names: Sequence[str],
    out: Path,
    *,
    batch_size: int | None = None,
    bf16: bool = False,
    **asked: Any,
) -> tuple[HarnessRows, ...]:
    """The tasks of these names.

    Args:
        asked: as ``harness.read`` takes it.

    Raises:
        UsageError, DataError: as ``harness.read``.
    """
    tasks = harness.read(names, **asked)
    return tuple(HarnessRows(task, out, batch_size=batch_size, bf16=bf16) for task in tasks)
