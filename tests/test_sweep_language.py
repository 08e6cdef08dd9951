"""Merges of language models, scored by the perplexity of documents and of answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.sweep_by_hand import refused
from support.tiny_models import write_causal
from support.training_bench import BAD, GOOD, write_documents

from pem_composition import checkpoint
from pem_composition.adapters import attach
from pem_composition.cli import main
from pem_composition.evaluation.models import load_causal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SHORT = ("--max_steps", "12", "--eval_strategy", "no", "--max_seq_length", "24")
LEARN = ("--learning_rate", "1e-2", "--logging_steps", "12", "--disable_tqdm", "true")


class Bench:
    """Two modules of one decoder, for documents and for answers, and rows of both kinds."""

    def __init__(self, folder):
        self.folder = folder
        texts = [" ".join([*GOOD, *BAD, "Instruction Response"])]
        self.base = write_causal(folder / "base", "gpt2", texts)
        self.documents = write_documents(folder / "documents.jsonl", 40, seed=1)
        self.others = folder / "others.jsonl"
        lines = self.documents.read_text().splitlines()
        turned = [{"text": " ".join(json.loads(x)["text"].split()[::-1])} for x in lines]
        self.others.write_text("".join(json.dumps(row) + "\n" for row in turned))
        self.template = folder / "template.json"
        texts = {"with_input": "{instruction} {input} =", "without_input": "{instruction} ="}
        self.template.write_text(json.dumps(texts))
        self.answers = folder / "answers.jsonl"
        pairs = zip(GOOD, BAD, strict=True)
        asked = [{"instruction": good, "input": "", "output": bad} for good, bad in pairs]
        self.answers.write_text("".join(json.dumps(row) + "\n" for row in asked * 4))
        self.modules = [self.train("a", self.documents), self.train("b", self.others)]

    def model(self):
        return "--model_name_or_path", self.base

    def train(self, name, rows):
        words = ["train", "--objective", "causal_lm", *self.model(), "--train_file", rows]
        words += ["--validation_file", rows, "--output_dir", self.folder / name, *SHORT, *LEARN]
        assert main([str(word) for word in words]) == 0
        return self.folder / name


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("language"))


def run(*words):
    assert main([str(word) for word in words]) == 0


@torch.no_grad()
def by_hand(bench, module, rows):
    """Loss per token of documents, each with its end token and read from its first, in float64."""
    model, tokenizer, _ = load_causal(bench.base, dtype=torch.float64)
    attach(model, module)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        ids = [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id][:24]
        log_tv = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(log_tv[i, token].item() for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
    return total / count


def test_a_grid_is_scored_by_the_perplexity_of_every_domain(bench, tmp_path):
    run(
        "merge", "-a", *bench.modules, "-p", tmp_path, "--grid", "0", "0.5", "1", "--evaluate",
        *bench.model(), "--objective", "causal_lm", "--max_seq_length", "24",
        "--validation_file", bench.documents, bench.others, "--space", "parameter",
    )  # fmt: skip
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if r.get("split") == "validation"]
    assert len(found) == 3 * 2
    merged = checkpoint.load(tmp_path / "selected_parameter")
    for names, module in (
        (["a"], checkpoint.load(bench.modules[0])),
        (["b"], checkpoint.load(bench.modules[1])),
        (["a", "b"], merged),
    ):
        losses = [r["scores"]["loss"] for r in found if sorted(r["names"]) == names]
        expected = [by_hand(bench, module, rows) for rows in (bench.documents, bench.others)]
        assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-5)
    assert all(np.isclose(np.exp(r["score"]), r["scores"]["perplexity"]) for r in found)


@pytest.mark.parametrize("objective", ["causal_lm", "instruction"])
def test_an_evaluation_gives_what_training_reports(bench, objective, tmp_path):
    rows = bench.documents if objective == "causal_lm" else bench.answers
    flags = ["--objective", objective, *bench.model(), "--max_seq_length", "24"]
    flags += ["--validation_file", rows, "--output_dir"]
    flags = ["--template", bench.template, *flags] if objective == "instruction" else flags
    run(
        "train", *flags, tmp_path / "module", "--train_file", rows, *SHORT[:4], *LEARN,
    )  # fmt: skip
    run("evaluate", *flags, tmp_path / "scores", "--adapter", tmp_path / "module")
    trained, scored = (
        json.loads((tmp_path / folder / "all_results.json").read_text())
        for folder in ("module", "scores")
    )
    for name in ("eval_loss", "eval_perplexity", "eval_stderr"):
        assert scored[name] == pytest.approx(trained[name], rel=1e-6)


def test_coefficients_are_learned_on_documents_and_entropy_is_refused(bench, tmp_path, capsys):
    flags = [
        "learn", "-a", *bench.modules, *bench.model(), "--objective", "causal_lm",
        "--validation_file", bench.documents, "--max_seq_length", "24", "--max_steps", "20", "-p",
    ]  # fmt: skip
    run(*flags, tmp_path / "learned", "--method", "cat")
    record = json.loads((tmp_path / "learned/learned.json").read_text())
    assert record["loss_after"] < record["loss_before"]
    expected = by_hand(bench, checkpoint.load(tmp_path / "learned"), bench.documents)
    assert record["loss_after"] == pytest.approx(expected, rel=2e-2)  # a mean over batches
    capsys.readouterr()
    line = refused(capsys, tmp_path, *flags[:-1], "--method", "adamerging")
    assert "no task to learn on" in line


def test_an_encoder_decoder_predicts_no_documents(bench, tmp_path, capsys):
    from support.tiny_models import write_text_to_text

    base = write_text_to_text(tmp_path / "t5", [" ".join(GOOD)])
    words = ["evaluate", "--objective", "causal_lm", "--model_name_or_path", base]
    words += ["--validation_file", bench.documents]
    assert main([str(word) for word in words]) == 2
    assert "a causal language model is needed" in capsys.readouterr().err
