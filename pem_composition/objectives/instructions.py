"""A decoder learns to answer instructions, written down with a template.

loss = 1/N sum_i sum_t CE(logits_it, x_i,t+1),  N the target tokens of the global batch: those of
the answers and their end tokens, or with ``train_on_inputs`` those of the prompts as well, as
Alpaca-LoRA does. Evaluations count the answers alone either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.evaluation.models import max_input_length
from pem_composition.objectives.cuts import cut_notes
from pem_composition.objectives.objective import Objective
from pem_composition.tasks.data import Example, TaskData
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.instructions import Template, load_instructions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.language import LanguageEvaluator


@dataclass(frozen=True)
class Instructions(Objective):
    """Rows with an instruction, perhaps an input, and the answer that is learned."""

    template: Template
    train_on_inputs: bool = False
    labelled = False

    def read(
        self,
        task_name: str | None,
        *,
        reading: Reading,
        max_predict_samples: int | None = None,
        **where: Any,
    ) -> TaskData:
        """Instructions and answers stand in columns of fixed names; see ``Documents.read``."""
        return load_instructions(task_name, **where)

    def content(self, task: Task) -> dict[str, Any]:
        """The template by what it says, wherever it comes from."""
        return self.template.content()

    def encode(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        """Rows of whose answer a token is left."""
        from pem_composition.evaluation.instruction_rows import pairs
        from pem_composition.evaluation.language import causal_rows

        found = pairs(self.template, examples, tokenizer, self.max_seq_length)
        notes = cut_notes(
            examples, [row.whole for row in found], self.max_seq_length,
            context=max_input_length(config, tokenizer), loses="the end of the answer",
            without=[not row.answered for row in found],
        )  # fmt: skip
        rows = [
            (row.tokens[:-1], row.tokens[1:] if self.train_on_inputs else row.answer_targets)
            for row in found
            if row.answered
        ]
        return replace(causal_rows(rows, tokenizer.pad_token_id or 0), notes=notes)

    def evaluator(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        **layout: Any,
    ) -> LanguageEvaluator:
        from pem_composition.evaluation.instruction_rows import pairs
        from pem_composition.evaluation.language import causal_rows, language_evaluator

        found = pairs(self.template, examples, tokenizer, self.max_seq_length)
        rows = [(row.tokens[:-1], row.answer_targets) for row in found]
        return language_evaluator(causal_rows(rows), **layout)
