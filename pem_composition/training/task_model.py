"""Which model, alone or with a module, answers which rows, and how; read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from pem_composition.checkpoint import inspect_header
from pem_composition.evaluation.model_names import resolve
from pem_composition.evaluation.own_classes import Classes, of_model, of_module, order_of
from pem_composition.objectives import Objective, objective_of
from pem_composition.tasks.data import RowFiles, TaskData, check_labelled
from pem_composition.tasks.glue import Reading, Task


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A model, alone or with a module, and how it answers a task.

    Attributes:
        model: folder or name; ``adapter`` is the folder of a module to attach, None for none.
        head: which head of a module that has several.
        answers: how an answer in text is found; None: scoring.
        max_seq_length, block_size: tokens.
        seed: of a head that neither model nor module brings.
    """

    model: str
    adapter: str | None = None
    head: str | None = None
    objective: str = "classification"
    next_block: bool = False
    prompt: str | None = None
    template: str | None = None
    answers: str | None = None
    max_seq_length: int = 128
    block_size: int = 128
    seed: int = 42
    allow_base_mismatch: bool = False

    @property
    def classifies(self) -> bool:
        """True where a head answers."""
        return self.objective == "classification"

    @property
    def own_classes(self) -> Classes:
        """The classes of the module's head, of a whole model else."""
        if not self.classifies:
            return None
        if self.adapter is None:
            return of_model(self.model)
        return of_module(inspect_header(self.adapter), self.head)

    def objective_of(self, task: Task | None = None) -> Objective:
        """How rows are asked; with a task, for a head that answers in an order of its own."""
        return objective_of(
            self.objective, next_block=self.next_block, max_seq_length=self.max_seq_length,
            block_size=self.block_size, prompt=self.prompt, template=self.template,
            found=self.answers, order=order_of(task, self.own_classes) if task is not None else (),
        )  # fmt: skip

    def read(
        self, task_name: str | None, files: RowFiles, reading: Reading, *, scored: bool
    ) -> TaskData:
        """The rows of the splits of ``files``, all of them.

        Args:
            scored: rows are compared with their labels.

        Raises:
            PEMError: no such model.
            DataError: rows that cannot be used, or without labels where they are to be scored.
        """
        resolve(self.model)
        objective = self.objective_of()
        data = objective.read(task_name, files, reading=reading)
        for split in files.splits if scored and objective.labelled else ():
            check_labelled(data.task, [example.label for example in data.require(split)])
        for split in files.splits:
            data.require(split)
        return data
