"""Answers of a causal language model to instructions, by beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pem_composition.evaluation import beams
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.text_sampling import Write, continuation
from pem_composition.tasks.data import Example
from pem_composition.tasks.instruction_rows import Template
from pem_composition.tasks.tokens import Tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


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
    write: Write | None = None,
) -> Iterator[dict[int, Answer]]:
    """Number of the instruction -> the model's answer, batch by batch; see ``beams.batches``.

    Raises:
        DataError: no instructions, or one that leaves no room for an answer.
        RunFailed: a probability that is not finite.
    """
    prompts = prompt_tokens(template, examples, tokenizer)
    beams.check_room(model, tokenizer, prompts, search, name)
    written = beams.batches(
        model, tokenizer, prompts, search, batch_size=batch_size, skip=skip, write=write
    )
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
    return template.tokens(texts, tokenizer)
