"""How a tokenizer begins a text, and which tokens an answer has behind a prompt. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pem_composition.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[int]

PROBE = "a."  # stands for any text that a space may follow
SEPARATOR = " "  # between a prompt and its answer, where one text holds both


def begun(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> Tokens:
    """The tokens of a text with the tokenizer's own beginning, without an end token.

    Args:
        special: False: the text brings its special tokens, as a chat template writes them.
    """
    given = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
    tokens = list(given.input_ids)
    while special and tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """What the tokenizer begins a text with; empty for GPT-2 and SmolLM2."""
    bare = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    tokens = begun(tokenizer, PROBE)
    return tokens[: len(tokens) - len(bare)]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, special: bool = True
) -> Tokens:
    """What a decoder reads before it answers; at least one token, for something must predict.

    Raises:
        DataError: an empty prompt, and a tokenizer without start and end token.
    """
    return begun(tokenizer, prompt, special=special) or [first_token(tokenizer, "prompt")]


def first_token(tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """What is read of a text that has no token: the start token, the end token else.

    Raises:
        DataError: a tokenizer without both.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise DataError.build(where, "empty, and the tokenizer has no start token")
    return int(first)


def tokens_after(
    tokenizer: PreTrainedTokenizerBase, word: str, text: str = PROBE, *, special: bool = True
) -> Tokens:
    """The tokens of a word behind a text; none where they join those of the text.

    A space stands between them, which belongs to the word's first token, unless the text ends with
    white space, as most chat templates do.
    """
    space = "" if text[-1:].isspace() else SEPARATOR
    before = begun(tokenizer, text, special=special)
    whole = begun(tokenizer, text + space + word, special=special)
    return whole[len(before) :] if whole[: len(before)] == before else []


def shared(a: Tokens, b: Tokens) -> int:
    """Number of tokens with which both begin."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
