"""A decoder learns to answer instructions, written down with a template.

loss = 1/N sum_i sum_t CE(logits_it, x_i,t+1),  N the target tokens of the global batch: those of
the answers and their end tokens, or with ``train_on_inputs`` those of the prompts as well, as
Alpaca-LoRA does. Evaluations count the answers alone either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.tasks.data import Example, TaskData
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.instructions import Template, load_instructions
from pem_composition.training.objectives.cuts import cut_notes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.exam import ExamSettings


@dataclass(frozen=True)
class Instructions:
    """Rows with an instruction, perhaps an input, and the answer that is learned."""

    template: Template
    train_on_inputs: bool = False

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        """Instructions and answers stand in columns of fixed names."""
        return load_instructions(task_name, **where)

    def content(self, task: Task) -> dict[str, Any]:
        """The template by what it says, wherever it comes from."""
        return self.template.content()

    def metrics(self, task: Task) -> tuple[str, ...]:
        return task.metrics

    def settings(self, task: Task, max_seq_length: int) -> ExamSettings:
        from pem_composition.evaluation.exam import ExamSettings

        return ExamSettings(
            "instruction", "answer", max_seq_length=max_seq_length, template=self.template
        )

    def encode(
        self,
        settings: ExamSettings,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        from pem_composition.evaluation.classify import EncodedDataset
        from pem_composition.evaluation.instructions import pairs
        from pem_composition.evaluation.models import max_input_length

        found = pairs(settings, examples, tokenizer)
        notes = cut_notes(
            examples, [row.whole for row in found], settings.max_seq_length,
            context=max_input_length(config, tokenizer), loses="the end of the answer",
            without=[not row.answered for row in found],
        )  # fmt: skip
        rows = [row for row in found if row.answered]
        inputs = {
            "input_ids": [row.tokens[:-1] for row in rows],
            "attention_mask": [[1] * (len(row.tokens) - 1) for row in rows],
        }
        fillers = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0}
        labels = [row.tokens[1:] if self.train_on_inputs else row.answer_targets for row in rows]
        return EncodedDataset(inputs, tuple(labels), fillers, notes)  # type: ignore[arg-type]

    def loss(self, task: Task) -> Callable[..., Tensor]:
        from pem_composition.training.losses import cross_entropy

        return cross_entropy
