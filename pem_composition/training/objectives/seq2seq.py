"""Text to text: the decoder writes a row's answer, or the next block of a domain's text.

loss = 1/N sum_i sum_t CE(logits_it, y_it),  N the target tokens of the global batch.

The decoder reads its start token and the targets, shifted right by one; no head is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.tasks.data import Example, TaskData, load_task
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.polarity import load_documents
from pem_composition.tasks.prompts import Prompt, classes_of, get_prompt
from pem_composition.training.objectives.cuts import cut_notes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.classify import EncodedDataset
    from pem_composition.evaluation.exam import ExamSettings


@dataclass(frozen=True)
class Answers:
    """A row is asked with a prompt; its target is the answer of its label, and the end token."""

    prompt_name: str | None = None  # None: the task's own

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        """A prompt file's classes are those of rows of no known task."""
        own = replace(reading, own=classes_of(self.prompt_name))
        return load_task(task_name, reading=own, **where)

    def content(self, task: Task) -> dict[str, Any]:
        """The prompt by what it says, wherever it comes from."""
        prompt = self.prompt(task)
        return {"prompt": {"template": prompt.template, "answers": list(prompt.answers)}}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return (*task.scores, "exact_match")

    def prompt(self, task: Task) -> Prompt:
        """The template and its answers."""
        return get_prompt(task, self.prompt_name)

    def settings(self, task: Task, max_seq_length: int) -> ExamSettings:
        from pem_composition.evaluation.exam import ExamSettings

        return ExamSettings("seq2seq", "label", self.prompt(task), max_seq_length)

    def encode(
        self,
        settings: ExamSettings,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        from pem_composition.evaluation.answers import encode_sources
        from pem_composition.evaluation.models import max_input_length
        from pem_composition.tasks.prompts import answer_tokens

        prompt = self.prompt(task)
        answer_tokens(tokenizer, prompt)  # refuses answers that cannot be written
        sources = [prompt.source(task, example) for example in examples]
        data = encode_sources(tokenizer, sources, settings.max_seq_length)
        # A row as long as the cut may have been longer; the answers are written whole.
        whole = data.lengths
        for i, size in enumerate(whole):
            if size == settings.max_seq_length:
                whole[i] = len(tokenizer(sources[i], truncation=False, verbose=False).input_ids)
        notes = cut_notes(
            examples, whole, settings.max_seq_length,
            context=max_input_length(config, tokenizer), loses="the end of the prompt",
        )  # fmt: skip
        targets = tokenizer(text_target=[prompt.target(task, example) for example in examples])
        encoded = with_targets(dict(data.inputs), targets.input_ids, tokenizer, config)
        return replace(encoded, notes=notes)

    def loss(self, task: Task) -> Callable[..., Tensor]:
        from pem_composition.training.losses import cross_entropy

        return cross_entropy


@dataclass(frozen=True)
class NextBlocks:
    """A language model of a domain: block i is read, block i + 1 is written."""

    block_size: int

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        return load_documents(task_name, reading=reading, **where)

    def content(self, task: Task) -> dict[str, Any]:
        return {}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return task.metrics

    def settings(self, task: Task, max_seq_length: int) -> ExamSettings:
        from pem_composition.evaluation.exam import ExamSettings

        return ExamSettings("seq2seq", "next_block", block_size=self.block_size)

    def encode(
        self,
        settings: ExamSettings,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        from pem_composition.evaluation.language import encode_blocks

        sources, targets = zip(*encode_blocks(tokenizer, examples, self.block_size), strict=True)
        inputs = {
            "input_ids": list(sources),
            "attention_mask": [[1] * len(source) for source in sources],
        }
        return with_targets(inputs, targets, tokenizer, config)

    def loss(self, task: Task) -> Callable[..., Tensor]:
        from pem_composition.training.losses import cross_entropy

        return cross_entropy


def with_targets(
    inputs: dict[str, list[list[int]]],
    targets: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> EncodedDataset:
    """Rows with what the decoder reads and the labels it is compared with."""
    from pem_composition.evaluation.classify import EncodedDataset

    start, pad = config.decoder_start_token_id, tokenizer.pad_token_id or 0
    read = {"decoder_input_ids": [[start, *target[:-1]] for target in targets]}
    fillers = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "decoder_input_ids": pad}
    return EncodedDataset(inputs | read, tuple(targets), fillers)
