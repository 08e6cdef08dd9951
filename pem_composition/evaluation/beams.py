"""Answers by beam search with a repetition penalty: transformers' own, rows batched.

Rows are padded on the left, each with its own first token. The penalty is one for every token that
stands in a row, and to earlier releases of transformers padding stands there, too: with the usual
padding token (often the end token) a row was scored otherwise for standing beside a longer one. A
row's first token is in it already. So an answer depends neither on the batch size nor on the other
rows, except where rounding (which differs between batch sizes) turns two nearly equal beams round.

Shape suffixes: b rows, t tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation.decoder import padded_left
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.model_names import max_input_length
from pem_composition.evaluation.padded import by_device, evaluating
from pem_composition.evaluation.text_sampling import Request, Write, end_tokens
from pem_composition.tasks.tokens import Tokens

BATCH_ROWS = {"cpu": 8, "cuda": 16}  # times the beams


class BeamText(NamedTuple):
    """The new tokens of one row without the end token, and whether the model wrote one."""

    tokens: Tokens
    ended: bool


def check_room(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    search: BeamSearch,
    name: str = "instructions",
) -> None:
    """Refuse prompts that leave no room for an answer, before anything is written.

    Raises:
        DataError: no prompts, or one that does not fit in the model's context.
    """
    if not prompts:
        raise DataError.build(name, "no rows", expected="at least one")
    limit = max_input_length(model.config, tokenizer)  # type: ignore[arg-type]
    for number, prompt in enumerate(prompts):
        if limit is not None and len(prompt) + search.max_new_tokens > limit:
            raise DataError.build(
                f"{name}, row {number}", "the answer would not fit in the model's context",
                found=f"{len(prompt)} tokens and {search.max_new_tokens} new ones",
                expected=f"at most {limit}", do="shorten the row or lower --max_new_tokens",
            )  # fmt: skip


def batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    search: BeamSearch,
    *,
    batch_size: int | None = None,
    skip: int = 0,
    write: Write | None = None,
) -> Iterator[dict[int, BeamText]]:
    """Number of the prompt -> its best beam, batch by batch, longest prompts first.

    Args:
        model: a causal language model, with or without a module attached.
        batch_size: prompts per batch, each with its beams; None: 8 on a CPU, 16 on a GPU.
        skip: batches that are there already; the rest are made of the same rows as without it.
        write: who writes in place of the model, see ``text_sampling.batches``.

    Raises:
        DataError: see ``check_room``.
        RunFailed: a probability that is not finite.
    """
    check_room(model, tokenizer, prompts, search)
    device = next(model.parameters()).device
    size = batch_size or by_device(BATCH_ROWS, device)
    ends = end_tokens(model, tokenizer)
    config = _config(search, ends)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for first in range(skip * size, len(order), size):
        rows = order[first : first + size]
        if write:
            new = write([Request(prompts[i], search.max_new_tokens, i) for i in rows])
        else:
            with evaluating(model):
                new = _search(model, [prompts[i] for i in rows], config, device).tolist()
        yield {i: _written(t, ends) for i, t in zip(rows, new, strict=True)}


def _config(search: BeamSearch, ends: frozenset[int]) -> GenerationConfig:
    """Everything that decides a beam is said, or the model's own settings would fill it in."""
    return GenerationConfig(
        num_beams=search.num_beams,
        repetition_penalty=float(search.repetition_penalty),
        max_new_tokens=search.max_new_tokens,
        min_new_tokens=1,
        do_sample=False,
        length_penalty=1.0,
        early_stopping=False,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )


def _search(
    model: nn.Module, prompts: Sequence[Tokens], config: GenerationConfig, device: torch.device
) -> Tensor:
    """New tokens (b, t), filled up with an end token."""
    ids_bt, mask_bt = padded_left(prompts, device)
    found_bt = model.generate(  # type: ignore[operator]
        ids_bt,
        attention_mask=mask_bt,
        generation_config=config,
        logits_processor=[_finite],
    )
    return found_bt[:, ids_bt.shape[1] :]


def _finite(_ids_bt: Tensor, scores_bv: Tensor) -> Tensor:
    """The scores as they are; a model that diverged would otherwise write whatever comes first."""
    if torch.isnan(scores_bv).any():
        raise RunFailed.build(
            "answers", "the logits are not finite", do="the module or its training diverged"
        )
    return scores_bv


def _written(tokens: Tokens, ends: frozenset[int]) -> BeamText:
    length = next((i for i, token in enumerate(tokens) if token in ends), None)
    return BeamText(tokens if length is None else tokens[:length], length is not None)
