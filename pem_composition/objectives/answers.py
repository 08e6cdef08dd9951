"""Text to text: the decoder writes the answer that stands for a row's label.

loss = 1/N sum_i sum_t CE(logits_it, y_it),  N the target tokens of the global batch.

The decoder reads its start token and the targets, shifted right by one; no head is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.evaluation.search import SCORING
from pem_composition.objectives.cuts import cut_notes
from pem_composition.objectives.objective import Objective
from pem_composition.tasks.data import Example, TaskData, load_task
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.prompts import Prompt, answer_tokens, classes_of, get_prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pem_composition.evaluation.answers import PromptedEvaluator
    from pem_composition.evaluation.classify import EncodedDataset


@dataclass(frozen=True)
class Answers(Objective):
    """A row is asked with a prompt; its target is the answer of its label, and the end token.

    Attributes:
        prompt: the template and its answers, by name or file; None: the task's own.
        found: how evaluations find the answers: by scoring each of them (evaluation/answers.py) or
            by generation, constrained or free (evaluation/generation.py).
    """

    prompt: str | None = None
    found: str = SCORING

    def read(self, task_name: str | None, *, reading: Reading, **where: Any) -> TaskData:
        """A prompt file's classes are those of rows of no known task."""
        own = replace(reading, own=classes_of(self.prompt))
        return load_task(task_name, reading=own, **where)

    def content(self, task: Task) -> dict[str, Any]:
        """The prompt by what it says, wherever it comes from."""
        prompt = self.prompt_of(task)
        return {"prompt": {"template": prompt.template, "answers": list(prompt.answers)}}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return (*task.scores, "exact_match")

    def described(self, task: Task) -> dict[str, Any]:
        found = {} if self.found == SCORING else {"answers": self.found}
        length = {"max_seq_length": self.max_seq_length}
        return {"objective": "seq2seq", "target": "label", **found, **self.content(task), **length}

    def prompt_of(self, task: Task) -> Prompt:
        """The template and its answers."""
        return get_prompt(task, self.prompt)

    def encode(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> EncodedDataset:
        from pem_composition.evaluation.language import with_targets
        from pem_composition.evaluation.models import max_input_length

        prompt = self.prompt_of(task)
        answer_tokens(tokenizer, prompt)  # refuses answers that cannot be written
        sources, data = self._sources(task, examples, tokenizer)
        # A row as long as the cut may have been longer; the answers are written whole.
        whole = data.lengths
        for i, size in enumerate(whole):
            if size == self.max_seq_length:
                whole[i] = len(tokenizer(sources[i], truncation=False, verbose=False).input_ids)
        notes = cut_notes(
            examples, whole, self.max_seq_length,
            context=max_input_length(config, tokenizer), loses="the end of the prompt",
        )  # fmt: skip
        targets = tokenizer(text_target=[prompt.target(task, example) for example in examples])
        encoded = with_targets(dict(data.inputs), targets.input_ids, tokenizer, config)
        return replace(encoded, notes=notes)

    def evaluator(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        **layout: Any,
    ) -> PromptedEvaluator:
        from pem_composition.evaluation.answers import PromptedRows, ScoringEvaluator, writing_of
        from pem_composition.evaluation.classify import batches
        from pem_composition.evaluation.generation import GenerationEvaluator

        prompt = self.prompt_of(task)
        _, data = self._sources(task, examples, tokenizer)
        answers, writing = answer_tokens(tokenizer, prompt), writing_of(tokenizer, config)
        labels: Any = [example.label for example in examples]
        asked = PromptedRows(task, prompt, answers, writing, labels, batches(data, **layout))
        return (
            ScoringEvaluator(asked)
            if self.found == SCORING
            else GenerationEvaluator(asked, self.found)
        )

    def _sources(
        self, task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[str], EncodedDataset]:
        """The rows as the prompt asks them, in words and tokenised; cut at the end."""
        from pem_composition.evaluation.classify import encode

        prompt = self.prompt_of(task)
        sources = [prompt.source(task, example) for example in examples]
        texts = [Example(text, None, None, row) for row, text in enumerate(sources)]
        return sources, encode(tokenizer, texts, max_seq_length=self.max_seq_length)
