"""Beam search: each row is what transformers finds for it alone, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from support.texts import write
from support.tiny_models import random_module, tiny, write_causal

from pem_composition.adapters import attach
from pem_composition.errors import DataError, RunFailed, UsageError
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.models import load_causal

WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad"]
PROMPTS = ["good fine", "bad", "great nice bad poor awful", "sad sad", "fine bad good nice"]
CASES = [("gpt2", 2.5), ("opt", 2.5), ("llama", 1.0), ("llama", 2.5), ("gemma3", 2.5)]
END = 2  # of the tiny models' own settings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_causal(tmp_path_factory.mktemp("base"), "llama", [" ".join(WORDS)])
    return load_causal(folder).tokenizer


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


def beam_search(model, prompts, pads, search, ends):
    """transformers' own, rows padded on the left with ``pads``, tokens up to an end token."""
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(p)) + p for pad, p in zip(pads, prompts, strict=True)]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    found = model.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), num_beams=search.num_beams,
        repetition_penalty=search.repetition_penalty, max_new_tokens=search.max_new_tokens,
        min_new_tokens=1, do_sample=False, eos_token_id=ends, pad_token_id=ends[0],
    )[:, width:].tolist()  # fmt: skip
    stops = [next((i for i, t in enumerate(tokens) if t in ends), None) for tokens in found]
    return [(t if s is None else t[:s], s is not None) for t, s in zip(found, stops, strict=True)]


def alone(model, prompts, search, ends=(END,)):
    """Each row without padding, as the reference's program asks for it."""
    return [beam_search(model, [p], [0], search, list(ends))[0] for p in prompts]


def end_of_some(model, prompts, search):
    """An end token with which some answers end and others do not; END where there is none."""
    plain = alone(model, prompts, search)
    for end in sorted({t for tokens, _ in plain for t in tokens[2:5]}):
        ended = [done for _, done in alone(model, prompts, search, (end, END))]
        if any(ended) and not all(ended):
            return end
    return END


@pytest.mark.slow
@pytest.mark.parametrize(("name", "penalty"), CASES)
def test_answers_are_those_of_each_row_alone_in_any_batch(
    name, penalty, tokenizer, prompts, one_thread
):
    model, search = tiny(name), BeamSearch(4, penalty, 12)
    end = end_of_some(model, prompts, search)
    assert end != END or name not in ("llama", "opt")
    model.generation_config.eos_token_id = [end]
    expected = alone(model, prompts, search, (end, END))
    for size in (1, 2, 5):
        assert write(model, tokenizer, prompts, search, batch_size=size) == expected, size
    assert len({tuple(tokens) for tokens, _ in expected}) > 1


def test_the_models_own_settings_do_not_leak_into_the_search(tokenizer, prompts, one_thread):
    model, search = tiny("llama"), BeamSearch(3, 1.5, 8)
    expected = write(model, tokenizer, prompts, search)
    own = {"length_penalty": -2.0, "no_repeat_ngram_size": 1, "early_stopping": True,
           "do_sample": True, "temperature": 0.1, "num_return_sequences": 2}  # fmt: skip
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert write(model, tokenizer, prompts, search) == expected


def test_more_beams_find_an_answer_at_least_as_probable(tokenizer, prompts, one_thread):
    model = tiny("gpt2")

    @torch.no_grad()
    def log_p(prompt, written):
        """Per token, the end token included, as beams are compared."""
        tokens = [*written.tokens, END] if written.ended else written.tokens
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        picked = logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        return float(picked.mean())

    one, eight = (write(model, tokenizer, prompts, BeamSearch(n, 1.0, 8)) for n in (1, 8))
    gains = [log_p(p, b) - log_p(p, a) for p, a, b in zip(prompts, one, eight, strict=True)]
    assert min(gains) > -1e-6 and max(gains) > 1e-3


def test_a_module_changes_answers_and_the_mode_stays(tokenizer, prompts, one_thread):
    model, search = tiny("llama"), BeamSearch(2, 1.2, 8)
    plain = write(model, tokenizer, prompts, search)
    model.train()
    with attach(model, random_module(model)):
        assert write(model, tokenizer, prompts, search) != plain
    assert model.training and write(model, tokenizer, prompts, search) == plain


def test_what_cannot_be_answered_is_refused(tokenizer, prompts):
    model = tiny("llama")
    with pytest.raises(DataError, match="instructions: no rows"):
        write(model, tokenizer, [], BeamSearch())
    longest = max(range(5), key=lambda i: len(prompts[i]))
    room = 66 - len(prompts[longest])
    write(model, tokenizer, prompts, BeamSearch(1, 1.0, room))
    words = rf"row {longest}: the answer would not fit.*{room + 1} new ones, expected at most 66"
    with pytest.raises(DataError, match=words):
        write(model, tokenizer, prompts, BeamSearch(1, 1.0, room + 1))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RunFailed, match="answers: the logits are not finite"):
        write(model, tokenizer, prompts, BeamSearch(2, 2.5, 4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beams": 0}, "--num_beams: cannot be used; found 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "--repetition_penalty"),
    ],
)
def test_searches_that_cannot_be_meant_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        BeamSearch(**values)
