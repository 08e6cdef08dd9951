"""Generation: a sample depends on seed and number alone, and is what the settings ask for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from support.texts import generate
from support.tiny_models import random_module, tiny, write_causal

from pem_composition.adapters import attach
from pem_composition.errors import DataError, RunFailed, UsageError
from pem_composition.evaluation.decoding import Sampling
from pem_composition.evaluation.models import load_causal
from pem_composition.evaluation.text_sampling import (
    Request,
    _write,
    continuation,
    encode_prompts,
    pick,
    warpers_of,
)
from pem_composition.tasks.data import read_prompts

WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad"]
PROMPTS = ["good fine", "bad", "great nice bad poor awful", "sad sad"]
CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model and tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    texts = [" ".join(WORDS)]
    return {n: load_causal(write_causal(folder / n, n, texts))[:2] for n in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def gpt2(bases):
    return bases["gpt2"]


@pytest.fixture(scope="module")
def llama(bases):
    return bases["llama"]


def warm(n):
    return Sampling(max_new_tokens=n, temperature=1.3)


@torch.no_grad()
def by_hand(model, tokens, steps, uniform, end, temperature=1.0):
    """One row, the whole text read again for every token: no cache, padding or batch."""
    out = []
    for u in uniform[:steps]:
        logits = model(input_ids=torch.tensor([[*tokens, *out]])).logits[0, -1].double().numpy()
        p = np.exp((logits - logits.max()) / temperature)
        out.append(int(np.searchsorted(np.cumsum(p / p.sum()), u, side="right")))
        if out[-1] == end:
            break
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_a_sample_is_what_an_unbatched_model_without_cache_gives_for_its_numbers(
    name, gpt2, one_thread
):
    """The law: sample j of prompt p depends on (seed, p, j), not on batches of 1, 3 or 8."""
    model, (_, tokenizer) = tiny(name), gpt2
    runs = [
        list(generate(model, tokenizer, PROMPTS, warm(12), samples=3, seed=7, batch_size=size))
        for size in (1, 3, 8)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert [(s.prompt_number, s.sample) for s in runs[0]] == [
        (p, s) for p in range(4) for s in range(3)
    ]
    for sample in runs[0]:
        tokens = tokenizer(sample.prompt).input_ids
        numbers = np.random.default_rng((7, sample.prompt_number, sample.sample)).random(12)
        written = by_hand(model, tokens, 12, numbers, tokenizer.eos_token_id, 1.3)
        ended = written[-1] == tokenizer.eos_token_id
        kept = written[:-1] if ended else written
        assert (sample.new_tokens, sample.ended) == (len(kept), ended)
        assert sample.text == continuation(tokenizer, tokens, kept)
    assert len({s.text for s in runs[0]}) > 6


def test_samples_differ_by_seed_and_the_longer_text_begins_with_the_shorter(gpt2):
    short = list(generate(*gpt2, ["good"], warm(6), samples=5))
    long = list(generate(*gpt2, ["good"], warm(20), samples=9))
    other = list(generate(*gpt2, ["good"], warm(6), samples=5, seed=1))
    for a, b in zip(short, long, strict=False):
        assert b.text.startswith(a.text) and b.new_tokens >= a.new_tokens
    assert [s.text for s in short] != [s.text for s in other]
    assert {s.seed for s in short} == {42} and {s.seed for s in other} == {1}


@pytest.mark.slow
def test_rows_that_end_early_leave_the_others_as_they_are(llama):
    """An end token that is often drawn: rows leave the batch one by one."""
    model, tokenizer = llama
    plain = list(generate(model, tokenizer, ["good"], warm(20), samples=8))
    drawn = [t for s in plain for t in tokenizer(s.text, add_special_tokens=False).input_ids]
    frequent = max(set(drawn), key=drawn.count)
    before, tokenizer.eos_token_id = tokenizer.eos_token_id, frequent
    try:
        runs = [
            list(generate(model, tokenizer, PROMPTS, warm(20), samples=5, batch_size=size))
            for size in (1, 3, 20)
        ]
    finally:
        tokenizer.eos_token_id = before
    assert runs[0] == runs[1] == runs[2]
    assert sum(s.ended for s in runs[0]) > 3 and len({s.new_tokens for s in runs[0]}) > 4


def test_greedy_is_what_transformers_generates_row_by_row(gpt2, llama):
    for model, tokenizer in (gpt2, llama):
        ours = list(generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=10, greedy=True)))
        for prompt, sample in zip(PROMPTS, ours, strict=True):
            ids = torch.tensor([tokenizer(prompt).input_ids])
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10,
                pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            written = [t for t in theirs if t not in (0, tokenizer.eos_token_id)]
            assert sample.text == continuation(tokenizer, ids[0].tolist(), written)


def warped_by_hand(logits, temperature, top_k, top_p):
    """Probabilities in float64: temperature, then the k best, then the smallest set of mass p."""
    p = np.exp(logits.astype(float) / temperature)
    if top_k is not None:
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, None, 1), (0.5, None, 1), (2, 7, 1), (1, None, 0.6), (0.7, 20, 0.8), (1, 1, 1)],
)
def test_tokens_are_drawn_from_the_warped_distribution(temperature, top_k, top_p):
    """Drawn at a grid of u, the share of each token is its probability to the grid's width."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    decoding = Sampling(
        max_new_tokens=1, temperature=float(temperature), top_k=top_k, top_p=float(top_p)
    )
    grid = (np.arange(20_000) + 0.5) / 20_000
    drawn = pick(logits.expand(len(grid), -1), grid, warpers_of(decoding))
    shares = np.bincount(drawn.numpy(), minlength=40) / len(grid)
    expected = warped_by_hand(logits.numpy(), temperature, top_k, top_p)
    np.testing.assert_allclose(shares, expected, atol=2 / 20_000)
    assert ((shares > 0) <= (expected > 0)).all()


def test_the_extreme_numbers_give_tokens_that_can_be_drawn():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    assert pick(logits, [0.0, np.nextafter(1, 0)]).tolist() == [2, 3]
    assert pick(logits, None).tolist() == [2, 2]
    with pytest.raises(RunFailed, match="not finite"):
        pick(torch.full((1, 6), torch.nan), [0.5])


def test_lengths_count_the_prompt_or_not_as_they_say(gpt2, llama):
    model, tokenizer = llama
    tokens = [len(tokenizer(p).input_ids) for p in PROMPTS]
    fixed = generate(model, tokenizer, PROMPTS, Sampling(max_length=14, temperature=1.3))
    for sample, prompt in zip(fixed, tokens, strict=True):
        assert sample.new_tokens == 14 - prompt or sample.ended
    for sample in generate(model, tokenizer, PROMPTS, warm(9)):
        assert sample.new_tokens == 9 or sample.ended
    with pytest.raises(DataError, match=r"prompt 0: fills --max_length by itself; found 3 tokens"):
        list(generate(model, tokenizer, ["good fine"], Sampling(max_length=3)))
    room = 66 - tokens[1]
    list(generate(model, tokenizer, ["bad"], warm(room)))
    with pytest.raises(DataError, match=rf"{tokens[1]} tokens and {room + 1} new ones.* 66"):
        list(generate(model, tokenizer, ["bad"], warm(room + 1)))


def test_prompts_begin_as_the_tokenizer_writes_them(gpt2, llama):
    for (model, tokenizer), begins in ((gpt2, False), (llama, True)):
        for tokens in encode_prompts(model, tokenizer, PROMPTS, warm(3)):
            assert (tokens[0] == tokenizer.bos_token_id) == begins
        assert encode_prompts(model, tokenizer, [""], warm(3)) == [[tokenizer.bos_token_id]]
        assert tokenizer.padding_side == "right", "left padding is the loop's own"
    model, tokenizer = gpt2
    before, tokenizer.bos_token = tokenizer.bos_token, None
    try:
        with pytest.raises(DataError, match="empty, and the tokenizer has no start token"):
            encode_prompts(model, tokenizer, [""], warm(3))
    finally:
        tokenizer.bos_token = before


def test_a_module_writes_other_texts_and_leaves_the_model_in_its_mode(gpt2):
    model, tokenizer = gpt2
    before = list(generate(model, tokenizer, PROMPTS, warm(10)))
    model.train()
    try:
        with attach(model, random_module(model)):
            changed = list(generate(model, tokenizer, PROMPTS, warm(10)))
        assert model.training
    finally:
        model.eval()
    assert [s.text for s in changed] != [s.text for s in before]
    assert list(generate(model, tokenizer, PROMPTS, warm(10))) == before


def test_prompt_files_of_every_form_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    for cells in (
        [{"prompt": "a b"}, {"prompt": "c"}],
        [{"text": "a b", "id": 1}, {"text": "c", "id": 2}],
        [{"prompt": {"text": "a b", "toxicity": None}}, {"prompt": {"text": "c"}}],
        [{"prompt": "a b", "text": "not this"}, {"prompt": "c", "text": "nor this"}],
    ):
        path.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
        assert read_prompts(path) == ["a b", "c"]
    for content, words in (
        ("", "the file is empty"),
        ('{"question": "a"}\n', "no prompts; found question, expected a column named prompt"),
        ('{"prompt": {"toxicity": 1}}\n', "line 1: column 'prompt' holds no prompt; found dict"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            read_prompts(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "length must be said in one way"),
        ({"max_new_tokens": 3, "max_length": 9}, "length must be said in one way"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"max_new_tokens": 3, "temperature": 0.0}, "--greedy"),
        ({"max_new_tokens": 3, "temperature": float("nan")}, "--temperature"),
        ({"max_new_tokens": 3, "top_k": 0}, "--top_k"),
        ({"max_new_tokens": 3, "top_p": 1.5}, "--top_p"),
        ({"max_new_tokens": 3, "greedy": True, "top_k": 5}, "samples nothing"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Sampling(**settings)


STATES = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 97, "hidden_size": 32}


def state_model(kind):
    if kind == "mamba":
        config = transformers.MambaConfig(**STATES, num_hidden_layers=2)
    elif kind == "lfm2":
        layers = ["conv", "full_attention", "conv"]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
        config = transformers.Lfm2Config(
            **STATES, **heads, num_hidden_layers=3, layer_types=layers, pad_token_id=0
        )
    else:
        config = transformers.RwkvConfig(**STATES, num_hidden_layers=2, context_length=64)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_models_with_states_write_padded_rows_as_alone_and_rows_can_leave(kind):
    model, limits = state_model(kind), (12, 3, 9, 12)
    prompts = [[3], [4, 5, 6], list(range(7, 19)), list(range(20, 27))]
    requests = [Request(p, n, i, 0) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    found = _write(model, requests, Sampling(max_new_tokens=12, greedy=True), 0, frozenset([2]))
    for prompt, steps, tokens in zip(prompts, limits, found, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        assert alone[0, len(prompt) :].tolist() == tokens


def test_a_model_whose_memory_no_row_can_leave_is_refused_by_name():
    requests = [Request([3], 4, 0, 0)]
    with pytest.raises(UsageError, match="RwkvForCausalLM: keeps what it has read"):
        _write(state_model("rwkv"), requests, Sampling(max_new_tokens=4), 0, frozenset([2]))
