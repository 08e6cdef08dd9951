"""A model and rows that stay loaded while modules are swapped in place and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import launch, progress
from pem_composition.arithmetic.head_policies import own_head
from pem_composition.evaluation.resumable import partial_path
from pem_composition.sweep.loaded import LoadedModel, Loader
from pem_composition.sweep.points import OUTPUTS, Point, Settings, alone
from pem_composition.sweep.refitting import Refitting
from pem_composition.sweep.result_store import Record, ResultStore, finite
from pem_composition.sweep.rows import Rows, identity_of

if TYPE_CHECKING:
    from pem_composition.module import PEM

Target = Point | Sequence[Point]  # one for all tasks, or one for each
Say = Callable[[str], None]


class Runner:
    """A model, the tasks' rows by split, and the store: scores points, each at most once.

    Args:
        load: gives model and tokenizer; called when the first point has to be computed, so that a
            finished sweep loads nothing.
        splits: for each split the rows of every task, the tasks in one order.
        refitting: how scores with new last layers come to be, see ``refit``.
    """

    def __init__(
        self,
        load: Loader,
        splits: Mapping[str, Sequence[Rows]],
        settings: Settings,
        store: ResultStore,
        say: Say,
        refitting: Refitting | None = None,
    ) -> None:
        self.splits, self.settings = splits, settings
        self.store, self.say, self.refitting = store, say, refitting
        beside = settings.bf16 or settings.attached
        self._held = LoadedModel(load, self._prepare, beside=beside)
        self._target: Point | None = None
        self._module: PEM | None = None  # in the model
        self._head: Mapping[str, Any] = {}  # that the module in the model brings
        if store.undescribed:
            say(f"note: {store.path}: {store.undescribed} results of an earlier release do not say "
                "all that they depend on; those that are needed are computed again")  # fmt: skip

    def score(self, target: Target, split: str) -> list[Record]:
        """The record of a point on each task, from the store or computed and appended."""
        found = [
            self._score(one, split, rows, wait=True) for one, rows in self._each(target, split)
        ]
        return [record for record in found if record is not None]

    def refit(self, target: Target, split: str) -> list[Record] | None:
        """The record of a point on each task with a last layer that is fitted anew; None for one
        without a backbone of its own, an ensemble."""
        each = list(self._each(target, split))
        if self.refitting is None or any(one.space == OUTPUTS for one, _ in each):
            return None
        found = [
            self._score(one, split, rows, wait=True, place=place)
            for place, (one, rows) in enumerate(each)
        ]
        return [record for record in found if record is not None]

    def choose(self, target: Target, split: str) -> list[Record]:
        """The record on each task that a point is chosen by."""
        found = self.refit(target, split) if self.chooses_refitted else None
        return self.score(target, split) if found is None else found

    @property
    def chooses_refitted(self) -> bool:
        """True where points are chosen by scores with new last layers."""
        return self.refitting is not None and self.refitting.chooses

    def share(self, targets: Iterable[tuple[Target, str]], *, choosing: bool = False) -> None:
        """Score what is not known and no other process is at; ``score``, or where points are to be
        chosen ``choose``, waits for the rest."""
        for target, split in progress.over(launch.own_first(list(targets)), "points"):
            for place, (one, rows) in enumerate(self._each(target, split)):
                refits = choosing and self.chooses_refitted
                self._score(one, split, rows, wait=False, place=place if refits else None)

    def _each(self, target: Target, split: str) -> Iterator[tuple[Point, Rows]]:
        """The rows of every task, each with its point."""
        tasks = self.splits[split]
        own = [target] * len(tasks) if isinstance(target, Point) else target
        return zip(own, tasks, strict=True)

    def close(self) -> None:
        """Give the base model its own weights back."""
        self._held.close()
        self._target = None

    def told(self, what: str) -> str:
        """What was computed and what was there, in one line."""
        store = self.store
        others = f", {store.shared} by other processes" if store.shared else ""
        return f"{store.computed} {what}, {store.known} known before{others}"

    def _score(
        self, target: Point, split: str, rows: Rows, *, wait: bool, place: int | None = None
    ) -> Record | None:
        """A record; ``place``: with a new last layer, fitted on the task of that number."""
        asked = {**rows.identity, **identity_of(target.head)}
        if place is not None and self.refitting is not None:
            asked |= self.refitting.identity(place)
        identity = target.identity(self.settings, split, asked)

        def compute(key: str) -> dict[str, Any]:
            return self._compute(target, rows, key, place)

        before = self.store.computed
        record = self.store.once(
            identity, compute, wait=wait, ready=lambda: self._ready(rows),
            usable=lambda r: finite(r, "score", "standard_error"),
        )  # fmt: skip
        if record is not None and self.store.computed > before:
            self._partial(record["key"]).unlink(missing_ok=True)
            self.say(_line(record, rows.name))
        return record

    def _ready(self, rows: Rows) -> None:
        """Open the model, and see that a backend that answers has the same base."""
        self._held.open()
        backend = getattr(rows, "backend", None)
        if backend is not None:
            backend.connect()

    def _partial(self, key: str) -> Path:
        """Where a result that is made in batches is kept until it is whole."""
        return partial_path(self.store.path.with_name(key[:16]))

    def _compute(self, target: Point, rows: Rows, key: str, place: int | None) -> dict[str, Any]:
        if target.space == OUTPUTS:
            members = zip(target.coefficients, map(alone, target.inputs), strict=True)
            outputs = [(c, self._outputs(member, rows)) for c, member in members]
            result = rows.ensemble(outputs)
        else:
            model = self._wearing(target)
            answering = target.head if place is None else self._refitted(target, rows, place)
            given: dict[str, Any] = {} if answering is None else {"head": answering}
            if target.prior_matched:
                given |= {"prior_matched": True, "shares": target.shares}
            if getattr(rows, "backend", None) is not None:
                given["module"] = self._module
            result = rows.evaluate(model, self._partial(key), key, bf16=self.settings.bf16, **given)
        what = {"control": target.control} if target.control else {}
        return {"names": [i.name for i in target.inputs], **what, **result}

    def _refitted(self, target: Point, rows: Rows, place: int) -> Mapping[str, Any]:
        """The head that answers, its last layer fitted anew on the model with the module."""
        assert self.refitting is not None, "asked for by refit"
        model, (_, tokenizer) = self._wearing(target), self._held.open()
        given = rows.head if target.head is None else target.head
        head = self._head if given is None else given
        with rows.answering(model, head, bf16=self.settings.bf16):
            return self.refitting.head(place, model, tokenizer, rows, head)

    def _outputs(self, member: Point, rows: Rows) -> Any:
        """What a module answers with its own head; said, for an average waits for every module."""
        began, module = time.perf_counter(), member.inputs[0]
        outputs = rows.predict(
            self._wearing(member), bf16=self.settings.bf16, head=own_head(module.pem)
        )
        self.say(f"{rows.name}: outputs of {module.name}  ({time.perf_counter() - began:.1f} s)")
        return outputs

    def _wearing(self, target: Point) -> Any:
        """The model with the point's module in it."""
        model, _ = self._held.open()
        if self._target is not target:
            module = target.module(self.settings)
            self._held.put(module)
            self._target, self._module = target, module
            self._head = {} if module is None else own_head(module)
        return model

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
    what = what or "base model"
    flag = "  predicts one class" if record["degenerate"] else ""
    if record["invalid_share"]:
        flag += f"  {record['invalid_share']:.0%} invalid"
    space = f" in {record['space']} space" if record["space"] else ""
    space += ", new last layer" if "refit" in record else ""
    return (
        f"{record['split']} {task}: {record['metric']} {record['score']:.4f}"
        f" +- {record['standard_error']:.4f}  {what}{space}  ({record['seconds']:.1f} s){flag}"
    )
