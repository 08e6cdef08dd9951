"""What a sweep, a search or the learning of coefficients has in hand: modules, a base, tasks. No
torch until it loads something."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.compatible import SPACES
from pem_composition.arithmetic.head_policies import own_head
from pem_composition.arithmetic.methods.coefficients import DEFAULT_RULE, RULES
from pem_composition.arithmetic.methods.registry import Choice
from pem_composition.arithmetic.ranks import Rank
from pem_composition.checkpoint.adapter_transformers_write import as_reference
from pem_composition.checkpoint.content import RECORD, REFERENCE, held_in
from pem_composition.checkpoint.several import read_modules
from pem_composition.errors import CheckpointError, IncompatibleModules
from pem_composition.evaluation import keys
from pem_composition.module import combine
from pem_composition.report.records import RESULTS
from pem_composition.sweep import tasks
from pem_composition.sweep.controls import AnalogyControls, Controls
from pem_composition.sweep.engine import ANALOGY, MERGE, Plan
from pem_composition.sweep.points import PER_TASK, Input, Settings, kept_head, read_input
from pem_composition.sweep.refitting import Refitting
from pem_composition.sweep.result_store import ResultStore
from pem_composition.sweep.runner import Runner, Say
from pem_composition.tasks.data import TEST, VALIDATION
from pem_composition.tasks.glue import TASKS
from pem_composition.training.training_flags import DECODERS

if TYPE_CHECKING:
    from pem_composition.module import PEM
    from pem_composition.sweep.rows import Rows
    from pem_composition.tasks.data import Example

SELECTED = ("selected", "selected_valid")


@dataclass(frozen=True, kw_only=True)
class MergeSetup:
    """Modules that are merged and scored, checked as far as no tensor is needed.

    Attributes:
        base: folder or hub name of the base model; ``base_name`` as the user named it.
        paths, names: of the modules, then of the reference if there is one.
        count: how many of them are merged.
        points: coefficients.
        choice: the merging method with its settings.
        dtype, format: of modules that are written.
        command: what the user called, for the report.
        controls: the table has control rows, too; ``joint``: modules trained on the rows of all
            tasks that are among them, ``joint_names`` what they are called.
        rule: of the coefficients that equal weights are, see ``arithmetic.methods.coefficients``.
        training: of each task the rows that new last layers are fitted on; none: none are.
    """

    base: str
    base_name: str
    out: Path
    paths: tuple[str, ...]
    names: tuple[str, ...]
    count: int
    kind: str
    tasks: tuple[tasks.ScoredTask, ...]
    scoring: tasks.Scoring
    points: tuple[tuple[float, ...], ...]
    spaces: tuple[str, ...]
    choice: Choice
    composition: str = MERGE
    head: str = "average"
    rank: Rank | None = None
    dtype: str | None = None
    format: str = "peft"
    bf16: bool = False
    use_cpu: bool = False
    overwrite: bool = False
    command: str = ""
    controls: bool = False
    joint: tuple[str, ...] = ()
    joint_names: tuple[str, ...] = ()
    training: tuple[Sequence[Example], ...] = ()
    rule: str = DEFAULT_RULE

    @property
    def own_heads(self) -> bool:
        """True where task i is scored with the head of module i."""
        return self.head == PER_TASK

    def inputs(self) -> list[Input]:
        """The modules, read.

        Raises:
            IncompatibleModules: one without the head that it is scored with.
        """
        modules = read_modules(self.paths, self.names, base=self.base)
        named = zip(self.names, modules, self.paths, strict=True)
        found = [read_input(*one) for one in named]
        if self.scoring.by_head:
            # a language model of an analogy brings no head, and needs none
            alone = [found[0], *found[3:]] if self.composition == ANALOGY else found
            for module in alone:
                if not module.pem.head_names:
                    raise IncompatibleModules.build(
                        module.name, "has no classification head to score",
                        do="use modules trained on the task, or --objective seq2seq for text to "
                        "text",
                    )  # fmt: skip
        return found

    def load(self) -> tuple[Any, Any]:
        """The base model on its device, and its tokenizer."""
        import torch

        from pem_composition.evaluation import attached, models

        if self.scoring.by_head:
            torch.manual_seed(0)  # the new head is replaced by the modules'; drawn alike anyway
            base, tokenizer, _ = models.load_base(self.base, self.tasks[0].answered)
        else:
            alone = self.scoring.objective in DECODERS
            base, tokenizer, _ = models.load_text_to_text(self.base, alone=alone)
        return attached.on_device(base, use_cpu=self.use_cpu, bf16=self.bf16), tokenizer

    def prepare(self, say: Say) -> tuple[Plan, Runner]:
        """Read the modules; the base model waits until a point needs it."""
        from pem_composition.evaluation.attached import device_key

        inputs = self.inputs()
        settings = Settings(
            base=keys.base_digest(self.base), head=self.head, rank=self.rank, bf16=self.bf16,
            method=str(self.choice), device=device_key(self.use_cpu), dtype=self.dtype,
            **self._by_harness(),
        )  # fmt: skip
        own = [own_head(i.pem) for i in inputs[: self.count]] if self.own_heads else []
        heads = [*own, *[None] * len(self.tasks)][: len(self.tasks)]
        splits = {
            split: [
                t.scored(split, self.scoring.batch_size, h)
                for t, h in zip(self.tasks, heads, strict=True)
            ]
            for split in dict.fromkeys((VALIDATION, tasks.report_split(self.tasks)))
        }
        plan = Plan(
            inputs=tuple(inputs[: self.count]),
            points=self.points,
            tasks=tuple(task.name for task in self.tasks),
            spaces=self.spaces,
            composition=self.composition,
            reference=inputs[self.count] if len(inputs) > self.count else None,
            base_name=self.base_name,
            max_invalid=self.scoring.max_invalid,
            metrics=tasks.chosen_by(self.scoring, self.tasks),
            command=self.command,
            controls=self._controls(inputs[: self.count], splits) if self.controls else None,
            rule=self.rule,
        )
        store = ResultStore(self.out / RESULTS, fresh=self.overwrite)
        fitted = Refitting(self.training, chooses=self.scoring.refit_select)
        refitting = fitted if self.training else None
        return plan, Runner(self.load, splits, settings, store, say, refitting)

    def _controls(self, inputs: Sequence[Input], splits: Mapping[str, Sequence[Rows]]) -> Controls:
        """What control rows need to know of the modules; the joint ones are read."""
        modules = read_modules(self.joint, self.joint_names, base=self.base)
        named = zip(self.joint_names, modules, self.joint, strict=True)
        labels = [task.answered.labels for task in self.tasks] if self.scoring.by_head else []
        asked = tuple(task.name for task in self.tasks)
        trained_on = tuple(i.pem.provenance.task for i in inputs)
        kind = AnalogyControls if self.composition == ANALOGY else Controls
        return kind(
            tasks=asked,
            # rows of no known task are called alike, whatever they are
            own=self.own_heads or (trained_on == asked and TASKS.keys() >= set(asked)),
            labels=tuple(labels),
            classes=not (self.scoring.next_block or self.scoring.harness_tasks)
            and all(task.answered.labels for task in self.tasks),
            shares=self._shares(splits),
            rules=tuple(name for name in RULES if name != self.rule),
            joint=tuple(read_input(*one) for one in named),
        )

    def _shares(self, splits: Mapping[str, Sequence[Rows]]) -> tuple[tuple[float, ...], ...]:
        """Of each task the shares of its classes among the rows that select; none where these are
        reported, too, or a task has none."""
        selecting = splits[VALIDATION] if len(splits) > 1 and not self.scoring.harness_tasks else ()
        found = tuple(rows.class_shares() for rows in selecting)
        return found if all(found) else ()

    def _by_harness(self) -> dict[str, Any]:
        """Modules stand beside the weights, as PEFT has them, so that scores agree to the digit."""
        if not self.scoring.harness_tasks:
            return {}
        return {"attached": True, "generation": keys.generation_digest(self.base)}

    def write_selected(self, plan: Plan, summary: Mapping[str, Any]) -> Iterator[tuple[Path, PEM]]:
        """Write the selected modules (whole models are left to merge.py), where and which."""
        earlier = {self.out / f"{which}_{space}" for which in SELECTED for space in SPACES}
        for which in SELECTED if self.kind != "full" else ():
            for space, coefficients in summary[which].items():
                target = self.out / f"{which}_{space}"
                earlier.discard(target)
                module = self._selected(plan, space, coefficients)
                module.save(target, format=self.format, dtype=self.dtype, overwrite=True)
                yield target, module
        for old in earlier:  # of another grid
            if (old / RECORD).exists():
                shutil.rmtree(old)

    def _selected(self, plan: Plan, space: str, coefficients: Sequence[float]) -> PEM:
        module = combine(
            [i.pem for i in plan.inputs],
            coefficients,
            space=space,
            method=self.choice.method,
            settings=self.choice.as_dict(),
            head=kept_head(plan.inputs, self.head),
            rank=self.rank if space == "delta" else None,
            dtype=self.dtype,
            allow_base_mismatch=True,
        )
        analogy = self.composition == ANALOGY and self.format == REFERENCE.name
        return as_reference(module) if analogy else module


def report_split(runner: Runner) -> str:
    """The split of the table."""
    return TEST if TEST in runner.splits else VALIDATION


def check_results_directory(out: Path) -> None:
    """A sweep continues in its own directory; it never writes into a module.

    Raises:
        CheckpointError: it would.
    """
    if inside := held_in(out):
        raise CheckpointError.build(
            out, "the output is a module", found=inside, do="choose another --save_path"
        )
