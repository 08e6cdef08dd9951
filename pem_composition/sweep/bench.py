"""A model and rows that stay loaded while modules are swapped in place and scored."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pem_composition.sweep.ledger import Ledger
from pem_composition.sweep.points import Point, Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import Batch
    from pem_composition.module import PEM
    from pem_composition.tasks.data import Example
    from pem_composition.tasks.glue import Task

BOOTSTRAP_SAMPLES = 400

Say = Callable[[str], None]


class Rows:
    """The rows of one split: tokenised and padded at most once, then scored for any weights."""

    def __init__(
        self, task: Task, examples: Sequence[Example], max_seq_length: int, batch_size: int
    ) -> None:
        from pem_composition.evaluation import metrics
        from pem_composition.training.identity import data_digest

        self.task, self.examples = task, examples
        self.max_seq_length, self.batch_size = max_seq_length, batch_size
        self.labels = metrics.gold_labels(task, [e.label for e in examples])
        self.digest = data_digest(examples)
        self._batches: Sequence[Batch] | None = None
        self._resampled: dict[str, Any] = {}

    def evaluate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Score, standard error, predictions and what else a record holds of an evaluation."""
        from pem_composition.evaluation import classify, metrics

        if self._batches is None:
            data = classify.encode(tokenizer, self.examples, max_seq_length=self.max_seq_length)
            device = next(model.parameters()).device
            self._batches = classify.batches(data, batch_size=self.batch_size, device=device)
        logits = classify.predict(model, self._batches)
        result = classify.score(self.task, logits, self.labels).to_dict()
        predictions = metrics.predictions_of(self.task, logits).tolist()
        return {
            "metric": result["metric"],
            "score": result["score"],
            "standard_error": result["stderr"],
            "n": result["n"],
            "scores": result["scores"],
            "auc": result["auc"],
            "predicted_share": result["predicted_shares"],
            "degenerate": result["degenerate"],
            "predictions": _packed(predictions),
        }

    def gain(
        self, record: Mapping[str, Any], singles: Sequence[Mapping[str, Any]]
    ) -> tuple[float, float]:
        """score - mean of the singles' scores, and its standard error over the choice of rows.

        Paired: both sides are scored on the same resampled rows, so what they get wrong together
        cancels.
        """
        gain = record["score"] - sum(s["score"] for s in singles) / len(singles)
        draws = self._draws(record) - sum(self._draws(s) for s in singles) / len(singles)
        return gain, float(draws.std(ddof=1))

    def average(self, singles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The mean of the singles' scores as a row of the table."""
        aucs = [s["auc"] for s in singles]
        return {
            "score": sum(s["score"] for s in singles) / len(singles),
            "standard_error": float(
                (sum(self._draws(s) for s in singles) / len(singles)).std(ddof=1)
            ),
            "auc": sum(aucs) / len(aucs) if all(a is not None for a in aucs) else None,
            "n": singles[0]["n"],
            "metric": singles[0]["metric"],
        }

    def _draws(self, record: Mapping[str, Any]) -> NDArray[Any]:
        """The record's score on bootstrap samples of the rows, the same for every record."""
        import numpy as np

        from pem_composition.evaluation.metrics import METRICS

        key = record["key"]
        if key not in self._resampled:
            given, gold = np.asarray([float(p) for p in record["predictions"]]), self.labels
            given = given.astype(gold.dtype)
            generator = np.random.default_rng(0)
            samples = (
                generator.integers(len(gold), size=len(gold)) for _ in range(BOOTSTRAP_SAMPLES)
            )
            self._resampled[key] = np.array(
                [METRICS[record["metric"]](gold[i], given[i]) for i in samples]
            )
        return self._resampled[key]


def _packed(predictions: Sequence[float]) -> str | list[float]:
    """Class numbers of up to ten classes as one digit per row; scores rounded to six digits."""
    if all(isinstance(p, int) and 0 <= p < 10 for p in predictions):
        return "".join(map(str, predictions))
    return [round(p, 6) for p in predictions]


class Bench:
    """A model, rows by split, and the ledger: scores points, each at most once.

    Args:
        load: gives model and tokenizer; called when the first point has to be computed, so that a
            finished sweep loads nothing.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        splits: Mapping[str, Rows],
        settings: Settings,
        ledger: Ledger,
        say: Say,
    ) -> None:
        self.load, self.splits, self.settings, self.ledger, self.say = (
            load,
            splits,
            settings,
            ledger,
            say,
        )
        self._model: Any = None
        self._tokenizer: Any = None
        self._folded: Any = None
        self.computed = 0

    def score(self, target: Point, split: str) -> dict[str, Any]:
        """The record of a point on a split, from the ledger or computed and appended."""
        rows = self.splits[split]
        identity = target.identity(self.settings, split, rows.digest)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if key not in self.ledger.records:
            self.ledger.append(self._compute(target, split, key, identity))
            self.computed += 1
            self.say(_line(self.ledger.records[key]))
        return self.ledger.records[key]

    @property
    def known(self) -> int:
        """Points that earlier runs had scored."""
        return len(self.ledger.records) - self.computed

    def close(self) -> None:
        """Give the base model its own weights back."""
        if self._folded is not None:
            self._folded.restore()

    def _compute(
        self, target: Point, split: str, key: str, identity: Mapping[str, Any]
    ) -> dict[str, Any]:
        if self._model is None:
            self._model, self._tokenizer = self.load()
        started = time.perf_counter()
        self._put(target.module(self.settings))
        result = self.splits[split].evaluate(self._model, self._tokenizer)
        return {
            "key": key,
            "names": [i.name for i in target.inputs],
            **identity,
            **result,
            "seconds": round(time.perf_counter() - started, 4),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _put(self, module: PEM) -> None:
        """Make the model's weights base + module; numbers change in place after the first time."""
        from pem_composition.adapters import fold

        if self._folded is None:
            self._folded = fold(self._model, module)
        else:
            self._folded.swap(module)


def _line(record: Mapping[str, Any]) -> str:
    """Progress of one point."""
    what = " ".join(
        f"{c:+g}*{n}" for c, n in zip(record["coefficients"], record["names"], strict=True)
    )
    flag = "  predicts one class" if record["degenerate"] else ""
    space = f" in {record['space']} space" if record["space"] else ""
    return (
        f"{record['split']}: {record['metric']} {record['score']:.4f}"
        f" +- {record['standard_error']:.4f}  {what}{space}  ({record['seconds']:.1f} s){flag}"
    )
