"""What a model reads of an instruction, and how well it predicts answers: by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.texts import answers, write
from support.tiny_models import write_causal

from pem_composition.errors import DataError
from pem_composition.evaluation.decoding import BeamSearch
from pem_composition.evaluation.encoded import IGNORED
from pem_composition.evaluation.instruction_answers import prompt_tokens
from pem_composition.evaluation.long_texts import summary
from pem_composition.evaluation.models import load_causal
from pem_composition.evaluation.text_sampling import continuation
from pem_composition.objectives.instructions import Instructions, pairs
from pem_composition.tasks.data import Example
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.instruction_rows import CHAT, Template

TEMPLATE = Template(
    "t", "good {instruction} bad {input} nice ", "good {instruction} nice ", ("sad",)
)
ROWS = [
    Example("fine", None, "great poor", 0),
    Example("great nice", "awful", "bad", 1),
    Example("poor", None, "nice nice fine good bad awful", 2),
]
WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_causal(write_causal(folder, request.param, [" ".join(WORDS)]))[:2]


def pairs_of(rows, tokenizer, length=64, template=TEMPLATE):
    return pairs(template, rows, tokenizer, length)


def test_a_row_is_prompt_answer_and_end_and_the_answer_alone_counts(base):
    _, tokenizer = base
    end = tokenizer.eos_token_id
    for row, pair in zip(ROWS, pairs_of(ROWS, tokenizer), strict=True):
        (prompt,) = prompt_tokens(TEMPLATE, [row], tokenizer)
        text = TEMPLATE.text(row.text, row.text_pair, tokenizer)
        assert prompt == tokenizer(text).input_ids
        assert pair.tokens == [*tokenizer(text + row.label).input_ids, end]
        kept = [t for t in pair.answer_targets if t != IGNORED]
        assert pair.tokens[: pair.prompt] == prompt[: pair.prompt]
        assert pair.tokens[pair.prompt :] == kept
        assert len(pair.answer_targets) == len(pair.tokens) - 1
        assert row.label in tokenizer.decode(kept)


def test_cut_rows_have_no_end_token_and_may_have_no_answer(base):
    _, tokenizer = base
    whole = pairs_of(ROWS, tokenizer)
    length = whole[2].prompt + 2
    cut = pairs_of(ROWS, tokenizer, length)
    assert cut[2].tokens == whole[2].tokens[:length]
    assert len([t for t in cut[2].answer_targets if t != IGNORED]) == 2
    shortest = min(pair.prompt for pair in whole)
    short = pairs_of(ROWS, tokenizer, shortest + 1)
    empty = [pair for pair in short if set(pair.answer_targets) == {IGNORED}]
    assert empty and all(len(p.answer_targets) == len(p.tokens) - 1 for p in short)
    words = f"leaves no token of any answer; found {shortest}, expected more than the shortest"
    with pytest.raises(DataError, match=words):
        pairs_of(ROWS, tokenizer, shortest)
    with pytest.raises(DataError, match="instructions: no rows"):
        pairs_of([], tokenizer)


@torch.no_grad()
def by_hand(model, pair):
    """Sum over the answer's tokens and the end token of -log p, one row, in float64."""
    logits = model(torch.tensor([pair.tokens])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[i - 1, pair.tokens[i]]) for i in range(pair.prompt, len(pair.tokens)))


@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_is_that_of_the_answers_given_the_prompts(base, batch):
    model, tokenizer = base
    evaluator = Instructions(TEMPLATE).evaluator(
        LANGUAGE, ROWS, tokenizer, model.config, batch_size=batch
    )
    found = evaluator.predict(model)
    rows = pairs_of(ROWS, tokenizer)
    nll = [by_hand(model, pair) for pair in rows]
    count = [len(pair.tokens) - pair.prompt for pair in rows]
    assert found[:, 0].tolist() == pytest.approx(nll, rel=1e-5)
    assert found[:, 1].tolist() == count
    scores = summary(evaluator, found)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(nll) / sum(count)), rel=1e-5)
    assert scores["tokens"] == sum(count)


def test_the_chat_template_of_the_tokenizer_writes_its_own_special_tokens(base):
    _, tokenizer = base
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}</s>{{ m['content'] }}</s>{% endfor %}"
    try:
        (tokens,) = prompt_tokens(CHAT, ROWS[:1], tokenizer)
        end = tokenizer.eos_token_id
        assert tokens[0] == tokens[-1] == end and tokens.count(tokenizer.bos_token_id) in (0, 2)
        (pair,) = pairs_of(ROWS[:1], tokenizer, template=CHAT)
        assert pair.tokens[: len(tokens)] == tokens and pair.prompt == len(tokens)
    finally:
        tokenizer.chat_template = before
    with pytest.raises(DataError, match="no chat template"):
        prompt_tokens(CHAT, ROWS, tokenizer)


def test_answers_are_cut_at_the_next_section_and_keep_what_was_asked(base, one_thread):
    model, tokenizer = base
    rows = [Example(f"{w} fine", None, None, i) for i, w in enumerate(WORDS)]
    found = answers(model, tokenizer, rows, TEMPLATE, BeamSearch(2, 1.1, 14))
    assert [(a.row, a.instruction, a.input, a.reference) for a in found] == [
        (i, row.text, None, None) for i, row in enumerate(rows)
    ]
    for answer in found:
        assert answer.answer == answer.text.partition("sad")[0].strip()
        assert answer.new_tokens == 14 or answer.ended
    prompts = prompt_tokens(TEMPLATE, rows, tokenizer)
    written = write(model, tokenizer, prompts, BeamSearch(2, 1.1, 14))
    assert [a.text for a in found] == [
        continuation(tokenizer, p, w.tokens) for p, w in zip(prompts, written, strict=True)
    ]
    assert len({tuple(w.tokens) for w in written}) > 1
    again = answers(model, tokenizer, rows[::-1], TEMPLATE, BeamSearch(2, 1.1, 14), batch_size=3)
    assert again[::-1] == found
    with pytest.raises(DataError, match=r"mine, row 0: the answer would not fit"):
        answers(model, tokenizer, rows, TEMPLATE, BeamSearch(1, 1.0, 66), name="mine")
