"""What a run is: flags, data, base model, initial module, number of processes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pem_composition.checkpoint import hub_name
from pem_composition.errors import CheckpointError
from pem_composition.evaluation import keys
from pem_composition.evaluation.model_names import resolve
from pem_composition.launch import world_size
from pem_composition.objectives import Objective
from pem_composition.tasks.data import TaskData
from pem_composition.training.training_flags import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    output_dir: Path
    metrics: Mapping[str, Any]
    skipped: bool = False  # the directory already held the result of this very run


@dataclass(frozen=True)
class RunPlan:
    """A run that may begin: its objective and rows, what it is, and where it resumes."""

    objective: Objective
    data: TaskData
    identity: Mapping[str, Any]
    resume: Path | None = None

    @property
    def key(self) -> str:
        """sha256 of everything that decides the result."""
        return keys.key_of(self.identity)


def describe_run(config: TrainConfig, data: TaskData, content: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result of a run: equal descriptions, the same run.

    A batch is that of all processes; how many share it changes roundings, and what dropout draws.

    Args:
        content: what the objective reads besides the rows, such as a prompt.
    """
    flags = config.result_fields()
    flags["per_device_train_batch_size"] *= world_size()
    return keys.complete(
        {
            "flags": flags,
            "base": keys.base_digest(resolve(config.model_name_or_path)),
            "init_from": initial_digest(config.init_from),
            "processes": world_size(),
            **keys.task_content(data.task),
            **content,
            **{f"{split} rows": keys.rows_digest(rows) for split, rows in data.splits.items()},
        }
    )


def initial_digest(folder: str | None) -> str | None:
    """Digest of the module that a run starts from; None where it starts from a new one.

    Raises:
        CheckpointError: there is none in the folder.
    """
    if folder is None or folder == "":
        return None
    if hub_name.reference(folder) is None and not Path(folder).is_dir():
        raise CheckpointError.build(
            f"--init_from {folder}", "no module", found="no such directory",
            expected="the folder of a module", do="make one with pem init",
        )  # fmt: skip
    return keys.module_digest(folder)
