"""What every objective has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.evaluator import Evaluator
    from pem_composition.tasks.data import Example, TaskData
    from pem_composition.tasks.glue import Reading, Task


@dataclass(frozen=True)
class Objective(ABC):
    """From rows to a loss, and from rows to scores.

    Attributes:
        max_seq_length: tokens of an input; longer ones are cut.
        labelled: True where scores compare with the labels of the rows.
    """

    max_seq_length: int = field(default=128, kw_only=True)
    labelled: ClassVar[bool] = True

    @abstractmethod
    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        """The rows of the splits; arguments as those of ``load_task``."""

    def content(self, task: Task) -> dict[str, Any]:
        """What decides the result of training besides flags and rows; part of the run's key."""
        return {}

    def metrics(self, task: Task) -> tuple[str, ...]:
        """Names of the metrics that an evaluation gives, the loss aside."""
        return task.metrics

    def described(self, task: Task) -> dict[str, Any]:
        """What decides the scores of a model besides the rows; part of the key of a result."""
        return {**self.content(task), "max_seq_length": self.max_seq_length}

    def within(self, limit: int | None) -> Self:
        """The objective with inputs of at most so many tokens, the most that the model reads."""
        fits = limit is None or self.max_seq_length <= limit
        return self if fits else replace(self, max_seq_length=limit)

    @abstractmethod
    def encode(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        """Training rows: the model's inputs, and labels that the loss compares its logits with."""

    def loss(self, task: Task) -> Callable[..., Tensor]:
        """(model output, labels, number of labels in the global batch) -> scalar."""
        from pem_composition.objectives.losses import cross_entropy

        return cross_entropy

    @abstractmethod
    def evaluator(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        **layout: Any,
    ) -> Evaluator:
        """Tokenise and pad rows once, for any number of evaluations.

        Args:
            config: the model's configuration: where an encoder-decoder starts to write.
            layout: batch_size, pad_to and device as those of ``classify.batches``.

        Raises:
            DataError: no rows, answers that the tokenizer cannot write, too few blocks.
        """
