"""Flags and rows of the programs that compute with one module on rows: fisher, gram, refit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pem_composition.cli import common
from pem_composition.errors import UsageError
from pem_composition.evaluation.model_names import resolve
from pem_composition.flag_declarations import flag, required, seed_flag
from pem_composition.training.task_model import TaskModel
from pem_composition.training.training_flags import FileFlags, check_objective

if TYPE_CHECKING:
    from pem_composition.evaluation.own_classes import Classes
    from pem_composition.objectives import Objective
    from pem_composition.tasks.data import TaskData


@dataclass(frozen=True, kw_only=True)
class RowsOfModule(FileFlags):
    """One module, its base, and the rows it is shown."""

    model_name_or_path: str = required("base model: a directory or a name")
    adapter: str = required("module directory")
    output_dir: Path = required("directory of the result")
    train_file: str | None = flag(
        None, "rows: .jsonl .json .csv .tsv .parquet, also packed (.gz .bz2 .xz .zip)"
    )
    split: Literal["train", "validation", "test"] = flag("train", "which rows are read")
    max_seq_length: int = flag(128, "tokens per example; longer ones are cut", least=1)
    seed: int = seed_flag("of the choice of rows, and of a head that nothing brings")
    overwrite: bool = flag(False, "replace an existing output")
    allow_base_mismatch: bool = flag(False, "take a module of another base model all the same")
    use_cpu: bool = flag(False, "do not use a GPU")

    def __post_init__(self) -> None:
        if not (self.task_name or self.files):
            raise UsageError.build("--task_name", "no rows to read", do="give a task or a file")

    @property
    def files(self) -> list[str]:
        """Files of rows that were named."""
        given = (self.train_file, self.validation_file, self.test_file)
        return [file for file in given if file]

    def read(
        self, task: str | None, objective: Objective, classes: Classes, max_samples: int
    ) -> TaskData:
        """The rows of one task; what a user should know of them is printed.

        Raises:
            PEMError: no such model, or rows that cannot be used.
        """
        resolve(self.model_name_or_path)
        limits = ("max_train_samples", "max_eval_samples", "max_predict_samples")
        files = self.row_files([self.split], seed=self.seed, **dict.fromkeys(limits, max_samples))
        data = objective.read(task, files, reading=self.reading(classes))
        data.require(self.split)
        for note in data.notes:
            print(f"note: {note}")
        return data


@dataclass(frozen=True, kw_only=True)
class Flags(RowsOfModule):
    """Flags of pem fisher and pem gram."""

    max_samples: int = flag(256, "at most N rows, stratified by label", least=1)
    objective: Literal["classification", "seq2seq"] = flag(
        "classification", "how the module answers: by a head, or text to text"
    )
    prompt: str | None = flag(
        None, "seq2seq: template and answers, by name or JSON file; default: the task's own"
    )

    # What the check of an objective asks for besides.
    target = block_size = template = None
    next_block = False

    def __post_init__(self) -> None:
        check_objective(self)
        super().__post_init__()


def run(config: Flags, what: str, merge_with: Sequence[str] = (), **facts: Any) -> int:
    """Read, compute and write the statistics of one module.

    Args:
        merge_with: of a subspace, the other modules.
        facts: what decides the numbers besides module, rows and base.
    """
    common.check_output(config.output_dir, config.overwrite)
    asked = TaskModel(
        model=config.model_name_or_path,
        adapter=config.adapter,
        objective=config.objective,
        prompt=config.prompt,
        max_seq_length=config.max_seq_length,
        seed=config.seed,
        allow_base_mismatch=config.allow_base_mismatch,
    )
    data = config.read(
        config.task_name, asked.objective_of(), asked.own_classes, config.max_samples
    )
    from pem_composition.merging import module_statistics

    told = module_statistics.run(
        asked, data, config.split, what, facts, config.output_dir,
        merge_with=merge_with, use_cpu=config.use_cpu, overwrite=config.overwrite,
    )  # fmt: skip
    print(told)
    return 0
