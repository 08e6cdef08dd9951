"""Text to text: the model writes the answer that stands for a row's label.

loss = 1/N sum_i sum_t CE(logits_it, y_it),  N the target tokens of the global batch.

The decoder reads its start token and the targets, shifted right by one; no head is trained. A
decoder alone (GPT-2, Llama) reads the prompt, a space and the answer in one row, whose targets are
the answer and its end token; the prompt is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.errors import DataError, UsageError
from pem_composition.evaluation.decoding import SCORING
from pem_composition.evaluation.encoded import (
    EncodedDataset,
    causal_rows,
    encode,
    with_targets,
    writing_of,
)
from pem_composition.objectives.cuts import cut_notes
from pem_composition.objectives.objective import ModelRows, Objective
from pem_composition.tasks.data import Example, RowFiles, TaskData, load_task
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.instruction_rows import Template
from pem_composition.tasks.prompts import Prompt, answer_tokens, classes_of, get_prompt
from pem_composition.tasks.tokens import PROBE, prompt_tokens, shared, tokens_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.prompted_rows import PromptedEvaluator


@dataclass(frozen=True)
class Answers(Objective):
    """A row is asked with a prompt; its target is the answer of its label, and the end token.

    Attributes:
        prompt: the template and its answers, by name or file; None: the task's own.
        found: how evaluations find the answers: by scoring each (evaluation/prompted_rows.py), or
            by generation, constrained or free (evaluation/generation.py).
        template: how a decoder alone is asked the prompt, such as in a chat; None: as it stands.
    """

    prompt: str | None = None
    found: str = SCORING
    template: Template | None = None

    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
        """A prompt file's classes are those of rows of no known task."""
        own = replace(reading, own=classes_of(self.prompt))
        return load_task(task_name, files, reading=own)

    def content(self, task: Task) -> dict[str, Any]:
        """The prompt by what it says, wherever it comes from."""
        prompt = self.prompt_of(task)
        asked = self.template.content() if self.template else {}
        return {"prompt": {"template": prompt.template, "answers": list(prompt.answers)}, **asked}

    def metrics(self, task: Task) -> tuple[str, ...]:
        return (*task.scores, "exact_match")

    def described(self, task: Task) -> dict[str, Any]:
        found = {} if self.found == SCORING else {"answers": self.found}
        length = {"max_seq_length": self.max_seq_length}
        return {"objective": "seq2seq", "target": "label", **found, **self.content(task), **length}

    def prompt_of(self, task: Task) -> Prompt:
        """The template and its answers."""
        return get_prompt(task, self.prompt)

    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        prompt, tokenizer = self.prompt_of(rows.task), rows.tokenizer
        answers = self._answers(rows)
        data, whole = self._sources(rows, answers)
        notes = cut_notes(
            rows.examples, whole, self.max_seq_length,
            context=rows.context, loses="the end of the prompt",
        )  # fmt: skip
        words = [prompt.target(rows.task, example) for example in rows.examples]
        if rows.decodes:
            closed = [[*answer, tokenizer.eos_token_id] for answer in answers]
            targets = [closed[prompt.answers.index(word)] for word in words]
        else:
            targets = tokenizer(text_target=words).input_ids
        encoded = with_targets(dict(data.inputs), targets, tokenizer, rows.config)
        return replace(encoded, notes=notes)

    def prepared(self, rows: ModelRows, layout: Mapping[str, Any]) -> PromptedEvaluator:
        from pem_composition.evaluation.generation import prompted_evaluator

        answers = self._answers(rows)
        data, _ = self._sources(rows, answers)
        return prompted_evaluator(
            replace(data, labels=tuple(example.label for example in rows.examples)),
            rows.task, self.prompt_of(rows.task), answers,
            writing_of(rows.tokenizer, rows.config), self.found, **layout,
        )  # fmt: skip

    def _answers(self, rows: ModelRows) -> tuple[tuple[int, ...], ...]:
        """The tokens of each answer; of a decoder alone as they follow what it reads.

        Raises:
            DataError: see ``answer_tokens``.
            UsageError: a template for an encoder-decoder.
        """
        prompt, tokenizer = self.prompt_of(rows.task), rows.tokenizer
        if rows.decodes:
            before, special = self._asked(PROBE, tokenizer), not self._is_chat
            return answer_tokens(
                tokenizer,
                prompt,
                lambda word: tokens_after(tokenizer, word, before, special=special),
            )
        if self.template is not None:
            raise UsageError.build(
                "--template", "an encoder-decoder reads the prompt as it stands", do="leave it out"
            )
        return answer_tokens(tokenizer, prompt)

    @property
    def _is_chat(self) -> bool:
        return self.template is not None and self.template.is_chat

    def _asked(self, source: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What a decoder reads; a space at its end would take the one before the answer."""
        if self.template is None:
            return source.rstrip()
        return self.template.text(source, None, tokenizer)

    def _read(self, sources: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens of what a decoder reads."""
        texts = [self._asked(source, tokenizer) for source in sources]
        return [prompt_tokens(tokenizer, text, special=not self._is_chat) for text in texts]

    def _sources(
        self, rows: ModelRows, answers: Sequence[Sequence[int]]
    ) -> tuple[EncodedDataset, list[int]]:
        """The rows as the prompt asks them, cut at the end; and how long each is uncut.

        A decoder's row holds the answer, too, so the prompt is cut where the longest answer and its
        end token still fit; the end of a template, which asks for the answer, stays.
        """
        prompt, tokenizer = self.prompt_of(rows.task), rows.tokenizer
        sources = [prompt.source(rows.task, example) for example in rows.examples]
        if rows.decodes:
            room = max(map(len, answers)) + 1
            if self.max_seq_length <= room:
                raise DataError.build(
                    "--max_seq_length", "leaves no token of the prompt", found=self.max_seq_length,
                    expected=f"more than the {room} tokens of the longest answer and its end",
                )  # fmt: skip
            read, width = self._read(sources, tokenizer), self.max_seq_length - room
            kept = [row[:width] for row in read]
            if self.template is not None:
                one, other = (row[::-1] for row in self._read((PROBE, "b,"), tokenizer))
                ending = shared(one, other)
                if ending >= width:
                    raise DataError.build(
                        "--max_seq_length", "leaves no token of the prompt",
                        found=self.max_seq_length, expected=f"more than {ending + room}",
                    )  # fmt: skip
                kept = [
                    row if len(row) <= width else row[: width - ending] + row[len(row) - ending :]
                    for row in read
                ]
            data = causal_rows([(row, []) for row in kept], rows.filler)
            return data, [len(row) + room for row in read]
        texts = [Example(text, None, None, row) for row, text in enumerate(sources)]
        data = encode(tokenizer, texts, max_seq_length=self.max_seq_length)
        # A row as long as the cut may have been longer; the answers are written whole.
        whole = data.lengths
        for i, size in enumerate(whole):
            if size == self.max_seq_length:
                whole[i] = len(tokenizer(sources[i], truncation=False, verbose=False).input_ids)
        return data, whole
