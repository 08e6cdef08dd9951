"""A head's logits against the class, or its one output against the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.tasks.data import Example, TaskData, load_task
from pem_composition.tasks.glue import TASKS, Reading, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.exam import ExamSettings


@dataclass(frozen=True)
class Classification:
    """loss = 1/n sum_i CE(logits_i, label_i)   or   1/n sum_i (logit_i - score_i)^2."""

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        return load_task(task_name, reading=reading, **where)

    def content(self, task: Task) -> dict[str, Any]:
        """The class names, where no name of a task stands for them."""
        return {} if task.name in TASKS else {"labels": list(task.labels)}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return task.scores

    def settings(self, task: Task, max_seq_length: int) -> ExamSettings:
        from pem_composition.evaluation.exam import ExamSettings

        return ExamSettings(max_seq_length=max_seq_length)

    def encode(
        self,
        settings: ExamSettings,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        from pem_composition.evaluation.classify import encode

        return encode(tokenizer, examples, max_seq_length=settings.max_seq_length)

    def loss(self, task: Task) -> Callable[..., Tensor]:
        from pem_composition.training.losses import cross_entropy, squared_error

        return squared_error if task.regression else cross_entropy
