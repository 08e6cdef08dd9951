"""``pem init``: write an initial module and head once, for runs that start from the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition.errors import UsageError
from pem_composition.evaluation.joint_task import joint_task
from pem_composition.flag_declarations import flag
from pem_composition.tasks.data import FILE, RowFiles, load_task
from pem_composition.tasks.glue import Task, get_task
from pem_composition.training import initial
from pem_composition.training.training_flags import AdapterFlags

if TYPE_CHECKING:
    from pem_composition.tasks.glue import Task

NAME = "init"
HELP = "write the initial module, and head if any, that several runs start from"
EXAMPLES = """
  pem init --model_name_or_path minilm --task_name sst2 --lora_r 8 --seed 42 --output_dir runs/init
  pem init --model_name_or_path roberta-base --num_labels 3 --adapter_config ia3 --output_dir init
  pem init --objective seq2seq --model_name_or_path flan-t5-small --output_dir runs/init
  pem init --objective causal_lm --model_name_or_path gpt2-large --output_dir runs/init
"""


@dataclass(frozen=True)
class Config(AdapterFlags):
    """Flags of ``pem init``."""

    num_labels: int | None = flag(
        None, "outputs of the head where no task is given; 1 for regression", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (
            self.task_name, self.joint_tasks, self.train_file, self.labels, self.do_regression,
        )  # fmt: skip
        named = any(given)
        if self.objective != "classification":
            if self.num_labels is not None:
                raise UsageError.build(
                    "--num_labels",
                    f"a model of --objective {self.objective} has no head",
                    do="leave it out",
                )
        elif named == (self.num_labels is not None):
            raise UsageError.build(
                "--num_labels",
                "says what the head predicts",
                found="a task as well" if named else "no task either",
                expected="one of --task_name, --joint_tasks, --train_file, --labels, --num_labels",
            )


def run(config: Config) -> int:
    """Draw the module and write it, unless it is there already."""
    for note in config.idle_notes():
        print(note)
    print(initial.write(config, task_of(config)))
    return 0


def task_of(config: Config) -> Task | None:
    """The task whose head is initialised; None for models that write, which have no head.

    Raises:
        DataError: unknown task, or a file that is none.
    """
    if config.objective != "classification":
        return None
    if config.joint_tasks:
        return joint_task(config.joint_tasks)
    if config.task_name is not None:
        return get_task(config.task_name)
    if config.train_file is not None:
        data = load_task(
            files=RowFiles(train_file=config.train_file, splits=["train"]), reading=config.reading()
        )
        for note in data.notes:
            print(f"note: {note}")
        return data.task
    if config.labels or config.do_regression:
        config.reading().check()
        return Task(FILE, ("text", None), config.labels or ())
    labels = tuple(f"LABEL_{i}" for i in range(config.num_labels or 1))
    return Task("unnamed", ("text", None), labels if len(labels) > 1 else ())
