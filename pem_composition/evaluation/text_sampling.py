"""Texts from a causal language model: batched, with cached keys and values, padded on the left.

Sample j of prompt p is drawn with random numbers of its own, u_0 u_1 ... from (seed, p, j): token t
is the first x, in the order of the vocabulary, with P(token <= x) > u_t. So it depends neither on
the batch size nor on the other rows, except where rounding (which differs between batch sizes)
moves a probability across u_t; and a longer text begins with the shorter one.

A prompt is read as the tokenizer writes it: with the start token where it adds one (Llama's <s>),
without where it does not (GPT-2, SmolLM2). An empty prompt is the start token alone.

Shape suffixes: b rows, t tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation.decoder import DecoderRows
from pem_composition.evaluation.decoding import Prompts, Sampling
from pem_composition.evaluation.model_names import max_input_length
from pem_composition.evaluation.padded import by_device, evaluating
from pem_composition.tasks.tokens import begun

Warper = Callable[[Tensor, Tensor], Tensor]

BATCH_ROWS = {"cpu": 32, "cuda": 64}


class Sample(NamedTuple):
    """One text, as it stands in a line of JSON.

    Attributes:
        text: what follows the prompt, without special tokens.
        sample: number of the sample among those of its prompt.
        prompt_number: number of the prompt in its file.
        new_tokens: tokens that were written, the end token not counted.
        ended: True if the model ended the text, False where the length did.
    """

    prompt: str
    text: str
    sample: int
    seed: int
    prompt_number: int
    new_tokens: int
    ended: bool


class Request(NamedTuple):
    """A prompt's tokens, how many may follow, and the numbers of prompt and sample."""

    tokens: list[int]
    steps: int
    prompt: int = 0
    sample: int = 0


Write = Callable[[Sequence[Request]], list[list[int]]]  # the new tokens, an end token included


def batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Sampling,
    *,
    samples: int = 1,
    seed: int = 42,
    batch_size: int | None = None,
    skip: int = 0,
    write: Write | None = None,
) -> Iterator[list[Sample]]:
    """Samples of every prompt, prompt by prompt, in batches as they are done.

    Args:
        model: a causal language model, with or without a module attached.
        batch_size: rows per forward pass; None: 32 on a CPU, 64 on a GPU. Changes no text.
        skip: batches that are there already; the rest are made of the same rows as without it, and
            so are equal bit for bit.
        write: who writes in place of the model, which then says only what fits and what ends.

    Raises:
        DataError: no prompts, or a prompt that leaves no room in the length or the context.
        RunFailed: a probability that is not finite.
    """
    device = next(model.parameters()).device
    encoded = encode_prompts(model, tokenizer, prompts, decoding)
    requests = [
        Request(tokens, decoding.steps(tokens), p, s)
        for p, tokens in enumerate(encoded)
        for s in range(samples)
    ]
    ends = end_tokens(model, tokenizer)
    size = batch_size or by_device(BATCH_ROWS, device)
    for first in range(skip * size, len(requests), size):
        batch = requests[first : first + size]
        texts = write(batch) if write else _write(model, batch, decoding, seed, ends)
        out = []
        for request, tokens in zip(batch, texts, strict=True):
            written = [t for t in tokens if t not in ends]
            out.append(
                Sample(
                    prompts[request.prompt],
                    continuation(tokenizer, request.tokens, written),
                    request.sample,
                    seed,
                    request.prompt,
                    len(written),
                    len(written) < len(tokens),
                )
            )
        yield out


def sample_rows(
    prompts: Prompts,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    skip: int = 0,
    write: Write | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """The texts as they stand in lines of JSON, batch by batch, all but the first ``skip``."""
    found = batches(
        model, tokenizer, prompts.texts, prompts.decoding,
        samples=prompts.samples, seed=prompts.seed, batch_size=prompts.batch_size, skip=skip,
        write=write,
    )  # fmt: skip
    for batch in found:
        yield [sample._asdict() for sample in batch]


def encode_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Sampling,
) -> list[list[int]]:
    """Tokens of every prompt, checked for room.

    Raises:
        DataError: see ``batches``.
    """
    if not prompts:
        raise DataError.build("prompts", "no prompt", expected="at least one")
    limit = max_input_length(model.config, tokenizer)  # type: ignore[arg-type]
    out = []
    for number, prompt in enumerate(prompts):
        tokens = begun(tokenizer, prompt)
        if not tokens and tokenizer.bos_token_id is None:
            raise DataError.build(
                f"prompt {number}", "empty, and the tokenizer has no start token", do="give a text"
            )
        tokens = tokens or [tokenizer.bos_token_id]
        steps = decoding.steps(tokens)
        if steps < 1:
            raise DataError.build(
                f"prompt {number}", "fills --max_length by itself",
                found=f"{len(tokens)} tokens", expected=f"less than {decoding.max_length}",
                do="raise --max_length, or give --max_new_tokens",
            )  # fmt: skip
        if limit is not None and len(tokens) + steps > limit:
            raise DataError.build(
                f"prompt {number}", "the text would not fit in the model's context",
                found=f"{len(tokens)} tokens and {steps} new ones", expected=f"at most {limit}",
                do="shorten the prompt or lower the length",
            )  # fmt: skip
        out.append(tokens)
    return out


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's own settings."""
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return frozenset(t for t in (tokenizer.eos_token_id, *listed) if t is not None)


def continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], written: Sequence[int]
) -> str:
    """The text of what was written; its first space, which some tokenizers drop at a beginning."""

    def decode(tokens: Sequence[int]) -> str:
        text = tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    before, whole = decode(prompt), decode([*prompt, *written])
    return whole[len(before) :] if whole.startswith(before) else decode(written)


def warpers_of(decoding: Sampling) -> list[Warper]:
    """(tokens so far, logits (b, v)) -> logits, in the order temperature, top_k, top_p."""
    warpers: list[Warper] = []
    if decoding.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    return warpers


def uniform(seed: int, request: Request) -> np.ndarray:
    """The request's random numbers in [0, 1), one per token."""
    return np.random.default_rng((seed, request.prompt, request.sample)).random(request.steps)


def token_log_probabilities(model: nn.Module, tokens: Sequence[int]) -> NDArray[np.float64]:
    """log p(token t | tokens before it) of every token but the first, (t - 1,).

    Raises:
        RunFailed: logits that are not finite.
    """
    with evaluating(model) as device:
        ids_bt = torch.tensor([list(tokens)], device=device)
        logits_tv = model(input_ids=ids_bt).logits[0, :-1]
        _check_finite(logits_tv)
        log_tv = logits_tv.double().log_softmax(dim=1)
        found: NDArray[np.float64] = log_tv.gather(1, ids_bt[0, 1:, None])[:, 0].cpu().numpy()
        return found


# --- one batch ----------------------------------------------------------------------------------


def _write(
    model: nn.Module,
    requests: Sequence[Request],
    decoding: Sampling,
    seed: int,
    ends: frozenset[int],
) -> list[list[int]]:
    """The new tokens of each request, an end token included."""
    out: list[list[int]] = [[] for _ in requests]
    draws = [uniform(seed, request) for request in requests]
    warpers = warpers_of(decoding)
    with evaluating(model):
        rows = DecoderRows(model, [request.tokens for request in requests])
        numbers = list(range(len(requests)))  # of the requests whose text goes on
        while numbers:
            here_b = [draws[i][len(out[i])] for i in numbers]
            tokens_b = pick(rows.logits_bv, None if decoding.greedy else here_b, warpers)
            for i, token in zip(numbers, tokens_b.tolist(), strict=True):
                out[i].append(token)
            going = [len(out[i]) < requests[i].steps and out[i][-1] not in ends for i in numbers]
            numbers = [i for i, goes_on in zip(numbers, going, strict=True) if goes_on]
            if numbers and not all(going):
                kept_n = torch.tensor(going, device=tokens_b.device).nonzero()[:, 0]
                rows.select(kept_n)
                tokens_b = tokens_b[kept_n]
            if numbers:
                rows.read(tokens_b[:, None])
    return out


def pick(
    logits_bv: Tensor, uniform_b: Sequence[float] | None, warpers: Sequence[Warper] = ()
) -> Tensor:
    """The next tokens (b,): min {x: P(token <= x) > u}; without u the most probable ones.

    Raises:
        RunFailed: logits that are not finite.
    """
    _check_finite(logits_bv)
    if uniform_b is None:
        return logits_bv.argmax(dim=1)
    none = torch.empty((len(logits_bv), 0), dtype=torch.long, device=logits_bv.device)
    warped_bv = logits_bv.float()
    for warp in warpers:
        warped_bv = warp(none, warped_bv)
    cumulative_bv = warped_bv.double().softmax(dim=1).cumsum(dim=1)
    u_b1 = torch.tensor(np.asarray(uniform_b), device=logits_bv.device)[:, None]
    # The last sum may miss one by rounding, so u is taken as a share of it.
    return torch.searchsorted(cumulative_bv, u_b1 * cumulative_bv[:, -1:], right=True)[:, 0]


def _check_finite(logits_bv: Tensor) -> None:
    if not torch.isfinite(logits_bv.amax(dim=1)).all():
        raise RunFailed.build(
            "generation", "the logits are not finite", do="the module or its training diverged"
        )
