"""A model and rows that stay loaded while modules are swapped in place and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pem_composition.sweep.held import HeldModel, Loader
from pem_composition.sweep.ledger import Ledger
from pem_composition.sweep.points import Point, Settings, key_of
from pem_composition.sweep.rows import Rows

Say = Callable[[str], None]
Record = Mapping[str, Any]


class Bench:
    """A model, the tasks' rows by split, and the ledger: scores points, each at most once.

    Args:
        load: gives model and tokenizer; called when the first point has to be computed, so that a
            finished sweep loads nothing.
        splits: for each split the rows of every task, the tasks in one order.
    """

    def __init__(
        self,
        load: Loader,
        splits: Mapping[str, Sequence[Rows]],
        settings: Settings,
        ledger: Ledger,
        say: Say,
    ) -> None:
        self.splits, self.settings = splits, settings
        self.ledger, self.say = ledger, say
        self._held = HeldModel(load, self._prepare, rounded=settings.bf16)
        self._target: Point | None = None
        self.computed = 0

    def score(self, target: Point, split: str) -> list[Record]:
        """The record of a point on each task, from the ledger or computed and appended."""
        return [self._score(target, split, rows) for rows in self.splits[split]]

    @property
    def known(self) -> int:
        """Points that earlier runs had scored."""
        return len(self.ledger.records) - self.computed

    def close(self) -> None:
        """Give the base model its own weights back."""
        self._held.close()
        self._target = None

    def _score(self, target: Point, split: str, rows: Rows) -> Record:
        identity = target.identity(self.settings, split, rows.identity)
        key = key_of(identity)
        if key not in self.ledger.records:
            self.ledger.append(self._compute(target, rows, key, identity))
            self.computed += 1
            self.say(_line(self.ledger.records[key], rows.name))
        return self.ledger.records[key]

    def _compute(
        self, target: Point, rows: Rows, key: str, identity: Mapping[str, Any]
    ) -> dict[str, Any]:
        model, _ = self._held.open()
        started = time.perf_counter()
        if self._target is not target:
            self._held.put(target.module(self.settings))
            self._target = target
        result = rows.evaluate(model, bf16=self.settings.bf16)
        return {
            "key": key,
            "names": [i.name for i in target.inputs],
            **identity,
            **result,
            "seconds": round(time.perf_counter() - started, 4),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _prepare(self, model: Any, tokenizer: Any) -> None:
        """Prepare every split, so that rows are refused before any result."""
        for rows in (r for tasks in self.splits.values() for r in tasks):
            rows.prepare(model, tokenizer)


def _line(record: Record, task: str) -> str:
    """Progress of one point."""
    what = " ".join(
        f"{c:+g}*{n}" for c, n in zip(record["coefficients"], record["names"], strict=True)
    )
    if "method" in record:
        what = f"{record['method']} of {what}"
    flag = "  predicts one class" if record["degenerate"] else ""
    if record["invalid_share"]:
        flag += f"  {record['invalid_share']:.0%} invalid"
    space = f" in {record['space']} space" if record["space"] else ""
    return (
        f"{record['split']} {task}: {record['metric']} {record['score']:.4f}"
        f" +- {record['standard_error']:.4f}  {what}{space}  ({record['seconds']:.1f} s){flag}"
    )
