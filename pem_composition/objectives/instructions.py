"""A decoder learns to answer instructions, written down with a template.

loss = 1/N sum_i sum_t CE(logits_it, x_i,t+1),  N the target tokens of the global batch: those of
the answers and their end tokens, or with ``train_on_inputs`` those of the prompts as well, as
Alpaca-LoRA does. Evaluations count the answers alone either way.

A row is the prompt, the answer and the end token, cut at a length; what is cut has no end token,
as it does not end there. Prompt and answer are tokenised together, as they stand in one text; the
answer begins at the first token that the prompt alone does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pem_composition.errors import DataError
from pem_composition.evaluation.encoded import IGNORED, EncodedDataset, causal_rows
from pem_composition.objectives.cuts import cut_notes
from pem_composition.objectives.objective import ModelRows, Objective
from pem_composition.tasks.data import Example, RowFiles, TaskData
from pem_composition.tasks.glue import Reading, Task
from pem_composition.tasks.instruction_rows import Template, load_instructions
from pem_composition.tasks.tokens import Tokens, shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Instructions(Objective):
    """Rows with an instruction, perhaps an input, and the answer that is learned."""

    template: Template
    train_on_inputs: bool = False
    labelled = False

    def read(self, task_name: str | None, files: RowFiles, *, reading: Reading) -> TaskData:
        """Instructions and answers stand in columns of fixed names; see ``Documents.read``."""
        return load_instructions(task_name, files)

    def content(self, task: Task) -> dict[str, Any]:
        """The template by what it says, wherever it comes from."""
        return self.template.content()

    def training_rows(self, rows: ModelRows) -> EncodedDataset:
        """Rows of whose answer a token is left."""
        found = self._pairs(rows)
        notes = cut_notes(
            rows.examples, [row.whole for row in found], self.max_seq_length,
            context=rows.context, loses="the end of the answer",
            without=[not row.answered for row in found],
        )  # fmt: skip
        learned = [
            (row.tokens[:-1], row.tokens[1:] if self.train_on_inputs else row.answer_targets)
            for row in found
            if row.answered
        ]
        return replace(causal_rows(learned, rows.filler), notes=notes)

    def scored_rows(self, rows: ModelRows) -> EncodedDataset:
        return causal_rows([(row.tokens[:-1], row.answer_targets) for row in self._pairs(rows)])

    def _pairs(self, rows: ModelRows) -> list[Pair]:
        return pairs(self.template, rows.examples, rows.tokenizer, self.max_seq_length)


class Pair(NamedTuple):
    """A row as it is read.

    Attributes:
        tokens: of prompt, answer and end, cut at a length.
        prompt: number of tokens before the answer.
        whole: number of tokens before the cut.
    """

    tokens: Tokens
    prompt: int
    whole: int

    @property
    def answered(self) -> bool:
        """True if a token of the answer is left."""
        return len(self.tokens) > self.prompt

    @property
    def answer_targets(self) -> Tokens:
        """What follows each token but the last; IGNORED where it belongs to the prompt."""
        hidden = min(self.prompt, len(self.tokens)) - 1
        return [IGNORED] * hidden + self.tokens[1 + hidden :]


def pairs(
    template: Template,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> list[Pair]:
    """Every row, cut at a length.

    Raises:
        DataError: no rows, or no answer of which a token is left.
    """
    if not examples:
        raise DataError.build("instructions", "no rows", expected="at least one")
    asked = [template.text(e.text, e.text_pair, tokenizer) for e in examples]
    texts = [text + str(e.label) for text, e in zip(asked, examples, strict=True)]
    prompts, wholes = (template.tokens(each, tokenizer) for each in (asked, texts))
    out = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        tokens = [*whole, tokenizer.eos_token_id]
        out.append(Pair(tokens[:max_seq_length], shared(prompt, tokens), len(tokens)))
    if not any(pair.answered for pair in out):
        shortest = min(pair.prompt for pair in out)
        raise DataError.build(
            "--max_seq_length", "leaves no token of any answer", found=max_seq_length,
            expected=f"more than the shortest prompt's {shortest} tokens",
        )  # fmt: skip
    return out
