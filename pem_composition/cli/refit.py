"""``pem refit``: the last layer of a module's head fitted anew, on features of the frozen model."""

from __future__ import annotations

from dataclasses import dataclass

from pem_composition.cli import common
from pem_composition.cli.module_rows import RowsOfModule
from pem_composition.cli.parser import COMMAND
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag
from pem_composition.merging.penalties import FOLDS, PENALTIES
from pem_composition.training.task_model import TaskModel

NAME = "refit"
HELP = "fit the last layer of a module's head anew on a few rows, in seconds; for merges"
EXAMPLES = """
  pem refit --adapter runs/merged --model_name_or_path minilm --task_name sst2 --data_dir glue \\
      --output_dir runs/refitted
  pem refit --adapter runs/merged --model_name_or_path minilm --task_name sst2 rte mnli \\
      --data_dir glue --max_samples 500 --output_dir runs/refitted
"""


@dataclass(frozen=True, kw_only=True)
class Config(RowsOfModule):
    """Flags of pem refit."""

    task_name: tuple[str, ...] = flag((), "tasks; each gets a head", metavar="TASK")
    max_samples: int = flag(500, "at most N rows per task, stratified by label", least=1)
    penalty: tuple[float, ...] = flag(
        PENALTIES, "of the squared weights; several: chosen by --folds", above=0
    )
    folds: int = flag(FOLDS, "of the cross-validation that chooses the penalty", least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.task_name)) < len(self.task_name):
            raise UsageError.build("--task_name", "a task given twice", found=self.task_name)
        if len(self.task_name) > 1 and self.files:
            raise UsageError.build(
                "--task_name", "several tasks and one file", do="give --data_dir instead"
            )


def run(config: Config) -> int:
    """Read, fit and write."""
    common.check_output(config.output_dir, config.overwrite)
    asked = TaskModel(
        model=config.model_name_or_path,
        adapter=config.adapter,
        max_seq_length=config.max_seq_length,
    )
    objective, own = asked.objective_of(), asked.own_classes
    tasks = [
        config.read(task, objective, own, config.max_samples)
        for task in config.task_name or (None,)
    ]
    from pem_composition.merging import last_layer

    how = last_layer.Refit(
        penalties=config.penalty,
        folds=config.folds,
        max_seq_length=config.max_seq_length,
        seed=config.seed,
        use_cpu=config.use_cpu,
        allow_base_mismatch=config.allow_base_mismatch,
    )
    last_layer.run(
        config.adapter, config.model_name_or_path, tasks, config.split, how, config.output_dir,
        command=COMMAND.get(), overwrite=config.overwrite, say=common.say,
    )  # fmt: skip
    print(config.output_dir)
    return 0
