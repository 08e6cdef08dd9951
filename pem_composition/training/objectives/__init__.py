"""What is learned from the rows, one file per objective; the run itself (runs.py) knows none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pem_composition.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.exam import ExamSettings
    from pem_composition.tasks.data import Example, TaskData
    from pem_composition.tasks.glue import Reading, Task


class Objective(Protocol):
    """From rows to a loss, and from rows to an exam."""

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        """The rows of the splits; arguments as those of ``load_task``."""

    def content(self, task: Task) -> dict[str, Any]:
        """What decides the result besides flags and rows; part of the run's key."""

    def metrics(self, task: Task) -> tuple[str, ...]:
        """Names of the metrics that an evaluation gives, the loss aside."""

    def settings(self, task: Task, max_seq_length: int) -> ExamSettings:
        """How rows become inputs and outputs become scores."""

    def encode(
        self,
        settings: ExamSettings,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        """Training rows: the model's inputs, and labels that the loss compares its logits with."""

    def loss(self, task: Task) -> Callable[..., Tensor]:
        """(model output, labels, number of labels in the global batch) -> scalar."""


def objective_of(config: TrainConfig) -> Objective:
    """The objective that the flags name."""
    if config.objective == "classification":
        from pem_composition.training.objectives.classification import Classification

        return Classification()
    if config.objective == "causal_lm":
        from pem_composition.training.objectives.causal_lm import Documents

        return Documents(config.score_filter, config.truncate, config.loss_on_padding)
    if config.objective == "instruction":
        from pem_composition.tasks.instructions import get_template
        from pem_composition.training.objectives.instruction import Instructions

        return Instructions(get_template(config.template), config.train_on_inputs)
    from pem_composition.training.objectives.seq2seq import Answers, NextBlocks

    return NextBlocks(config.block_tokens) if config.next_block else Answers(config.prompt)
