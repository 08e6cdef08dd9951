"""A decoder learns documents, one per row: each token from those before it.

loss = 1/N sum_i sum_t CE(logits_it, x_i,t+1),  N the target tokens of the global batch: the text's
and its end token. With ``loss_on_padding`` rows are padded with the end token to --max_seq_length
and the padding counts, too, as in the reference code (labels = inputs); most of that loss is of end
tokens after end tokens. Evaluations count the text alone either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.tasks.data import Example, TaskData
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.toxicity import ScoreFilter, load_texts
from pem_composition.training.objectives.cuts import cut_notes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.exam import ExamSettings

PADDED_NOTE = (
    "--loss_on_padding: documents are padded with the end token to --max_seq_length and the loss "
    "counts the padding, as the reference does; evaluations count the text alone"
)


@dataclass(frozen=True)
class Documents:
    """Documents, all of them or those with a score above a threshold."""

    chosen: ScoreFilter | None = None
    truncate: bool = True
    loss_on_padding: bool = False

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        data = load_texts(task_name, chosen=self.chosen, reading=reading, **where)
        return replace(data, notes=(*data.notes, PADDED_NOTE)) if self.loss_on_padding else data

    def content(self, task: Task) -> dict[str, Any]:
        return {}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return task.metrics

    def settings(self, task: Task, max_seq_length: int) -> ExamSettings:
        from pem_composition.evaluation.exam import ExamSettings

        return ExamSettings(
            "causal_lm", "document", max_seq_length=max_seq_length, truncate=self.truncate
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
        from pem_composition.evaluation.models import max_input_length
        from pem_composition.evaluation.perplexity import document_tokens, whole_documents

        documents = document_tokens(settings, examples, tokenizer, config)
        width = settings.max_seq_length if self.loss_on_padding else 0
        end = tokenizer.eos_token_id
        filled = [tokens + [end] * (width - len(tokens)) for tokens in documents]
        # The attention mask tells text from padding, as a tokenizer's does.
        masks = [
            ([1] * len(tokens) + [0] * (width - len(tokens)))[: len(row) - 1]
            for tokens, row in zip(documents, filled, strict=True)
        ]
        inputs = {"input_ids": [row[:-1] for row in filled], "attention_mask": masks}
        fillers = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0}
        whole, length = documents, max(map(len, documents))
        if settings.truncate and length == settings.max_seq_length:
            whole = whole_documents(examples, tokenizer)
        notes = cut_notes(
            examples, [len(tokens) for tokens in whole], length,
            context=max_input_length(config, tokenizer), loses="their end and its end token",
        )  # fmt: skip
        return EncodedDataset(inputs, tuple(row[1:] for row in filled), fillers, notes)  # type: ignore[arg-type]

    def loss(self, task: Task) -> Callable[..., Tensor]:
        from pem_composition.training.losses import cross_entropy

        return cross_entropy
