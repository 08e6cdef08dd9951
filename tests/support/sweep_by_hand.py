"""What a sweep computes, done by hand: one freshly loaded model, one row, one token at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import sweep_data

import pem_composition as library
from pem_composition import cli, json_lines
from pem_composition.report.records import Results

TEMPLATES = {
    "rte": 'Does "{sentence1}" imply that "{sentence2}"? Please answer either yes or no.',
    "sst2": "Is the following review positive or negative? {sentence}",
}
ANSWERS = {"rte": ("Yes", "No"), "sst2": ("negative", "positive")}
LABELS = {"rte": ("entailment", "not_entailment"), "sst2": ("negative", "positive")}


def run(*words: object) -> int:
    return cli.main([str(w) for w in words])


def points(out: Path) -> dict[str, dict]:
    return {r["key"]: r for r in json_lines.read(out / "results.jsonl") if "key" in r}


def mean(found: Results, keys: list[str]) -> float:
    """Mean score of some points."""
    return float(np.mean([found.points[key]["score"] for key in keys]))


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: object) -> str:
    assert run(*words, "-p", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return captured.err


class Hand:
    """A freshly loaded base that answers one row at a time, token by token."""

    def __init__(self, base: Path) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self.model = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def log_probability(self, source: str, answer: str) -> float:
        """Sum over the answer's tokens, its end token left out, in float64."""
        ids = self.tokenizer(source, return_tensors="pt").input_ids
        target = self.tokenizer(answer).input_ids[:-1]
        start = self.model.config.decoder_start_token_id
        total = 0.0
        for place, token in enumerate(target):
            read = torch.tensor([[start, *target[:place]]])
            logits = self.model(input_ids=ids, decoder_input_ids=read).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
        return total

    def freely(self, source: str) -> list[int]:
        """Tokens of greedy generation up to the end token."""
        ids = self.tokenizer(source, return_tensors="pt").input_ids
        out = self.model.generate(ids, max_new_tokens=4, do_sample=False)[0, 1:].tolist()
        return out[: out.index(1)] if 1 in out else out

    @torch.no_grad()
    def answer(self, task: str, file: Path) -> tuple[str, float]:
        """Predicted answers as a string of digits, and the share that generation leaves invalid."""
        given, invalid = "", []
        for line in file.read_text().splitlines():
            source = asked(task, json.loads(line))
            scores = [self.log_probability(source, word) for word in ANSWERS[task]]
            given += str(int(np.argmax(scores)))
            valid = [self.tokenizer(word).input_ids[:-1] for word in ANSWERS[task]]
            invalid.append(self.freely(source) not in valid)
        return given, float(np.mean(invalid))


def asked(task: str, row: dict[str, object]) -> str:
    """What a model reads of a row."""
    source = TEMPLATES[task]
    for column, text in row.items():
        source = source.replace("{" + column + "}", str(text))
    return source


def combined(bench: sweep_data.TextBench, record: dict) -> library.PEM:
    """The record's module, made anew."""
    folders = {path.name: path for path in bench.modules}
    modules = [library.load(folders[name], base=bench.base) for name in record["names"]]
    if record["space"] is None:
        return modules[0]
    return library.combine(
        modules, record["coefficients"], space=record["space"], head=record["head"]
    )


def rows_of(bench: sweep_data.TextBench, record: dict) -> Path:
    files = {"rte": bench.pairs, "sst2": bench.reviews}[record["task"]]
    return files[record["split"] == "test"]


def check_by_hand(bench: sweep_data.TextBench, found: list[dict]) -> None:
    hand = Hand(bench.base)
    for record in found:
        with library.attach(hand.model, combined(bench, record)):
            given, invalid = hand.answer(record["task"], rows_of(bench, record))
        assert record["predictions"] == given
        assert record["invalid_share"] == pytest.approx(invalid)
        gold = [json.loads(x)["label"] for x in rows_of(bench, record).open()]
        right = [LABELS[record["task"]][int(p)] == g for p, g in zip(given, gold, strict=True)]
        assert record["score"] == pytest.approx(np.mean(right))
