"""Instructions for a causal language model: what it reads, and how well it predicts the answers.

    loss = 1/N sum_i sum_t -log p(y_it | prompt_i, y_i1 ... y_i,t-1),  N tokens of all answers

A row is the prompt, the answer and the end token, cut at a length; what is cut has no end token,
as it does not end there. Prompt and answer are tokenised together, as they stand in one text; the
answer begins at the first token that the prompt alone does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pem_composition.errors import DataError
from pem_composition.evaluation import beams
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.language import IGNORED
from pem_composition.evaluation.text_sampling import continuation
from pem_composition.tasks.data import Example
from pem_composition.tasks.instructions import Template
from pem_composition.tasks.tokens import Tokens, begun, shared

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


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


class Answer(NamedTuple):
    """One answer, as it stands in a line of JSON.

    Attributes:
        row: number of the instruction in its file.
        answer: what was written, cut where the template's next section begins.
        text: all that was written, without special tokens.
        reference: the answer that the file has; None where it has none.
        new_tokens: tokens that were written, the end token not counted.
        ended: True if the model ended the text, False where the length did.
    """

    row: int
    instruction: str
    input: str | None
    answer: str
    text: str
    reference: str | None
    new_tokens: int
    ended: bool


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: Template,
    search: BeamSearch,
    *,
    batch_size: int | None = None,
    name: str = "instructions",
) -> list[Answer]:
    """The model's answer to every instruction, in their order.

    Raises:
        DataError: no instructions, or one that leaves no room for an answer.
        RunFailed: a probability that is not finite.
    """
    out: dict[int, Answer] = {}
    for batch in answer_batches(
        model, tokenizer, examples, template, search, batch_size=batch_size, name=name
    ):
        out |= batch
    return [out[place] for place in range(len(examples))]


def answer_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: Template,
    search: BeamSearch,
    *,
    batch_size: int | None = None,
    name: str = "instructions",
    skip: int = 0,
) -> Iterator[dict[int, Answer]]:
    """The same as place of the instruction -> answer, batch by batch; see ``beams.batches``."""
    prompts = prompt_tokens(template, examples, tokenizer)
    beams.check_room(model, tokenizer, prompts, search, name)
    written = beams.batches(model, tokenizer, prompts, search, batch_size=batch_size, skip=skip)
    for batch in written:
        out = {}
        for place, (tokens, ended) in batch.items():
            example = examples[place]
            text = continuation(tokenizer, prompts[place], tokens)
            reference = None if example.label is None else str(example.label)
            out[place] = Answer(
                int(example.row_id), example.text, example.text_pair, template.cut(text), text,
                reference, len(tokens), ended,
            )  # fmt: skip
        yield out


def prompt_tokens(
    template: Template, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """What the model reads before it answers, for every row.

    Raises:
        DataError: ``chat``, and the tokenizer has no chat template.
    """
    texts = [template.text(e.text, e.text_pair, tokenizer) for e in examples]
    return _tokens(template, texts, tokenizer)


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
    prompts, wholes = (_tokens(template, each, tokenizer) for each in (asked, texts))
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


def _tokens(
    template: Template, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """As the tokenizer begins a text; a chat template begins it by itself."""
    return [begun(tokenizer, text, special=not template.is_chat) for text in texts]
