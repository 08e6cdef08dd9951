"""A head's logits against the class, or its one output against the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.objectives.objective import Objective
from pem_composition.tasks.data import Example, TaskData, load_task
from pem_composition.tasks.glue import TASKS, Reading, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.evaluator import ClassificationEvaluator


@dataclass(frozen=True)
class Classification(Objective):
    """loss = 1/n sum_i CE(logits_i, label_i)   or   1/n sum_i (logit_i - score_i)^2.

    Attributes:
        order: number of the head's output for each class of the task; empty: in the task's order.
    """

    order: tuple[int, ...] = ()

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        return load_task(task_name, reading=reading, **where)

    def content(self, task: Task) -> dict[str, Any]:
        """The class names, where no name of a task stands for them."""
        return {} if task.name in TASKS else {"labels": list(task.labels)}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return task.scores

    def described(self, task: Task) -> dict[str, Any]:
        order = {"order": list(self.order)} if self.order else {}
        return {"max_seq_length": self.max_seq_length, **order}

    def encode(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        from pem_composition.evaluation.classify import encode

        return encode(tokenizer, examples, max_seq_length=self.max_seq_length)

    def loss(self, task: Task) -> Callable[..., Tensor]:
        from pem_composition.objectives.losses import cross_entropy, squared_error

        return squared_error if task.regression else cross_entropy

    def evaluator(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        **layout: Any,
    ) -> ClassificationEvaluator:
        from pem_composition.evaluation.classify import batches
        from pem_composition.evaluation.evaluator import ClassificationEvaluator

        data = self.encode(task, examples, tokenizer, config)
        return ClassificationEvaluator(task, data.labels, batches(data, **layout), self.order)
