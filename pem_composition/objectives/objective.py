"""What every objective has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pem_composition.evaluation.model_names import max_input_length

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.encoded import EncodedDataset
    from pem_composition.evaluation.evaluator import Evaluator
    from pem_composition.tasks.data import Example, RowFiles, TaskData
    from pem_composition.tasks.glue import Reading, Task


class ModelRows(NamedTuple):
    """Rows of a task and the model that reads them, as far as it is needed to encode them."""

    task: Task
    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig

    @property
    def decodes(self) -> bool:
        """True for a decoder alone, which reads prompt and answer in one row."""
        return not self.config.is_encoder_decoder

    @property
    def context(self) -> int | None:
        """Most tokens that the model reads; None: any number."""
        return max_input_length(self.config, self.tokenizer)

    @property
    def filler(self) -> int:
        """The token that fills a batch."""
        return self.tokenizer.pad_token_id or 0


@dataclass(frozen=True)
class Objective(ABC):
    """From rows to a loss, and from rows to scores.

    Attributes:
        max_seq_length: tokens of an input; longer ones are cut.
        labelled: True where scores compare with the labels of the rows.
        writes: True where the model answers in tokens; False where a head does.
    """

    max_seq_length: int = field(default=128, kw_only=True)
    labelled: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    @abstractmethod
    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
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

    def read_by(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The objective as the model can read its inputs, see ``within``."""
        return self.within(max_input_length(config, tokenizer))

    def encode(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        """Training rows: the model's inputs, and labels that the loss compares its logits with."""
        fitted = self.read_by(config, tokenizer)
        return fitted.training_rows(ModelRows(task, examples, tokenizer, config))

    def loss(self, task: Task) -> Callable[..., Tensor]:
        """(model output, labels, number of labels in the global batch) -> scalar."""
        from pem_composition.objectives import losses

        return losses.loss_of(task, words=self.writes)

    def evaluator(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        **layout: Any,
    ) -> Evaluator:
        """Tokenise and pad rows once, for any number of evaluations.

        Rows longer than the model reads are cut there, whoever asks.

        Args:
            config: the model's configuration: where an encoder-decoder starts to write.
            layout: batch_size, pad_to and device as those of ``padded.batches``.

        Raises:
            DataError: no rows, answers that the tokenizer cannot write, too few blocks.
        """
        fitted = self.read_by(config, tokenizer)
        return fitted.prepared(ModelRows(task, examples, tokenizer, config), layout)

    @abstractmethod
    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        """See ``encode``."""

    def prepared(self, rows: ModelRows, layout: Mapping[str, Any]) -> Evaluator:
        """See ``evaluator``; here of rows whose target tokens are counted, whatever they are."""
        from pem_composition.evaluation.language import language_evaluator

        return language_evaluator(self.scored_rows(rows), **layout)

    def scored_rows(self, rows: ModelRows) -> EncodedDataset:
        """What an evaluation counts: what is trained, unless an objective says otherwise."""
        return self.training_rows(rows)
