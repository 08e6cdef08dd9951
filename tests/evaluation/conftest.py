"""Rows for tiny models that write, and what they answer, computed one row and token at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.tiny_models import VOCABULARY, tiny

from pem_composition.evaluation import encoded, padded
from pem_composition.evaluation.encoded import Writing
from pem_composition.evaluation.prompted_rows import PromptedRows
from pem_composition.tasks.glue import Task
from pem_composition.tasks.prompts import Prompt

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

WRITING = {
    "t5": Writing((0,), 1, 0),
    "t5-gated": Writing((0,), 1, 0),
    "bart": Writing((2, 0), 2, 1),
    "gpt2": Writing((), 2, 1),
    "llama": Writing((), 2, 2),  # padded with its end token
}


def log_softmax(logits):
    """In float64."""
    wide = np.asarray(logits, np.float64)
    top = wide.max(-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))


@dataclass
class Oracle:
    """A model that reads one unpadded row and the whole answer, without a cache."""

    model: torch.nn.Module
    rows: list[list[int]]
    writing: Writing

    @torch.no_grad()
    def steps(self, row, tokens):
        """Log-probabilities (s + 1, v) of what follows the start and each token."""
        if not self.writing.start:
            whole = torch.tensor([[*row, *tokens]])
            return log_softmax(self.model(input_ids=whole).logits[0, len(row) - 1 :].numpy())
        read = torch.tensor([[*self.writing.start, *tokens]])
        logits = self.model(input_ids=torch.tensor([row]), decoder_input_ids=read).logits[0]
        return log_softmax(logits[len(self.writing.start) - 1 :].numpy())

    def score(self, row, answer, *, end):
        log_p = self.steps(row, answer)
        tokens = [*answer, self.writing.end] if end else answer
        return sum(log_p[place, token] for place, token in enumerate(tokens))

    def scores(self, answers, *, end):
        """(n, w)."""
        return np.array([[self.score(r, a, end=end) for a in answers] for r in self.rows])

    def greedy(self, row, steps):
        """The most probable token after those before it, until the end token."""
        tokens = []
        for _ in range(steps):
            tokens.append(int(self.steps(row, tokens)[-1].argmax()))
            if tokens[-1] == self.writing.end:
                break
        return tokens

    def written(self, answers, steps):
        """Number of the answer that greedy generation gives for each row, -1 for none."""
        closed = [[*answer, self.writing.end] for answer in answers]
        texts = [self.greedy(row, steps) for row in self.rows]
        return np.array([closed.index(t) if t in closed else -1 for t in texts])

    def asked(self, answers, labels=None, *, task=None, words=None, **layout):
        """The rows, asked for these tokens; labels go round if none are given."""
        names = tuple(f"c{i}" for i in range(len(answers)))
        task = task or Task("file", ("text", None), names)
        masks = [[1] * len(row) for row in self.rows]
        fill = {"input_ids": self.writing.pad, "attention_mask": 0}
        inputs = {"input_ids": self.rows, "attention_mask": masks}
        data = encoded.EncodedDataset(inputs, (None,) * len(self.rows), fill)
        if labels is None:
            labels = np.arange(len(self.rows)) % len(answers)
        prompt = Prompt("test", "{text}", tuple(words or names))
        batches = padded.batches(data, **layout)
        return PromptedRows(task, prompt, tuple(map(tuple, answers)), self.writing, labels, batches)


def make_oracle(name, *, count=14, seed=0, **writing):
    """Output embeddings of its own keep a model from repeating what it reads."""
    model = tiny(name)
    weight = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
    model.lm_head.weight = torch.nn.Parameter(weight)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(5, VOCABULARY, rng.integers(3, 20)).tolist() for _ in range(count)]
    return Oracle(model, rows, WRITING[name]._replace(**writing))


# An encoder and decoder, and a decoder alone; with all of them the laws take many seconds.
QUICK = ("t5", "gpt2")
EACH = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in WRITING]


@pytest.fixture(params=EACH)
def oracle(request, one_thread):
    return make_oracle(request.param)


@pytest.fixture
def fluent(one_thread):
    """A T5 whose end token is one that it writes often, and the answers that it gives then.

    Which token ends an answer is the tokenizer's choice, so any may; each answer is the row's own.
    """
    plain = make_oracle("t5", count=24)
    written = [plain.greedy(row, 3) for row in plain.rows]
    later = [token for tokens in written for token in tokens[1:]]
    end = max(set(later), key=later.count)
    oracle = make_oracle("t5", count=24, end=end)
    found = [oracle.greedy(row, 4) for row in oracle.rows]
    answers = {tuple(tokens[:-1]) for tokens in found if tokens[-1] == end and len(tokens) > 1}
    return oracle, sorted(answers, key=lambda a: (len(a), a))
