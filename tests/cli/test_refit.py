"""pem refit: heads anew on a module whose adapter stays, from files to files."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import own_heads
from support.sweep_by_hand import run

import pem_composition as library

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> own_heads.Bench:
    return own_heads.make(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def data(bench: own_heads.Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of train rows per task, as GLUE has them."""
    folder = tmp_path_factory.mktemp("data")
    for task in bench.tasks:
        (folder / task).mkdir()
        rows = bench.rows[task, "validation"].read_text()
        (folder / task / "train.jsonl").write_text(rows)
    return folder


def refit(bench: own_heads.Bench, adapter: object, out: Path, *words: object) -> int:
    return run(
        "refit", "--adapter", adapter, "--model_name_or_path", bench.base, "--folds", 2,
        "--output_dir", out, *words,
    )  # fmt: skip


def test_a_merge_gets_a_head_for_every_task(bench, data, tmp_path):
    merged = tmp_path / "merged"
    assert run("merge", "-a", *bench.modules, "-p", merged, "--space", "delta",
               "--head", "none") == 0  # fmt: skip
    out = tmp_path / "refitted"
    assert refit(bench, merged, out, "--task_name", *bench.tasks, "--data_dir", data) == 0
    before, after = library.load(merged), library.load(out)
    for name, tensor in before.adapter_tensors().items():
        assert torch.equal(tensor, after.tensors[name])
    assert tuple(after.heads) == bench.tasks
    for task in bench.tasks:
        assert after.heads[task].info.labels == own_heads.LABELS[task]
        assert any(note.startswith(f"{task}: last layer") for note in after.provenance.notes)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_head_is_fitted_to_what_the_live_model_answers_with(bench, data, tmp_path, place):
    """A weak penalty separates 24 rows in 32 numbers: the written module answers all of them."""
    task, out = bench.tasks[place], tmp_path / "refitted"
    words = ("--task_name", task, "--data_dir", data, "--penalty", 1e-6)
    assert refit(bench, bench.modules[place], out, *words) == 0
    scores = tmp_path / "scores"
    assert run("evaluate", "--model_name_or_path", bench.base, "--adapter", out,
               "--task_name", task, "--validation_file", bench.rows[task, "validation"],
               "--output_dir", scores) == 0  # fmt: skip
    found = json.loads((scores / "eval_results.json").read_text())
    key = "eval_pearson" if task == "stsb" else "eval_accuracy"
    assert found[key] > 0.97


def test_what_a_module_saves_whole_stays_and_is_there_when_its_head_is_fitted(
    bench, data, tmp_path
):
    """A norm three times as large: without it the features, and so the answers, are others."""
    module = library.load(bench.modules[1])
    name = "roberta.embeddings.LayerNorm.weight"
    norm = {f"{name}.head": torch.full((32,), 3.0)}
    replace(module, tensors={**module.tensors, **norm}).save(tmp_path / "whole")
    out = tmp_path / "refitted"
    words = ("--task_name", "rte", "--data_dir", data, "--penalty", 1e-6)
    assert refit(bench, tmp_path / "whole", out, *words) == 0
    after = library.load(out)
    assert torch.equal(after.head_tensors()[name], norm[f"{name}.head"])
    assert accuracy(bench, after) == 1.0


def test_a_refitted_module_says_what_it_is_and_how_it_is_made_again(bench, data, tmp_path, capsys):
    """Of the training that its adapter had, it keeps what is true of the adapter."""
    merged, out = tmp_path / "merged", tmp_path / "refitted"
    assert run("merge", "-a", *bench.modules, "-p", merged, "--space", "delta",
               "--head", "none") == 0  # fmt: skip
    assert refit(bench, merged, out, "--task_name", "rte", "--data_dir", data) == 0
    capsys.readouterr()
    assert run("rebuild", out) == 2
    said = capsys.readouterr().err
    assert "found a last layer fitted on rows" in said
    under = re.search(r"what it was fitted on: pem (.*)\n", said)
    assert under and run(*shlex.split(under[1])) == 0
    capsys.readouterr()
    assert run("inspect", out) == 0
    command = re.search(r"\n  refit +pem (.*)\n", capsys.readouterr().out)
    before = library.load(out).head_tensors()
    assert command and run(*shlex.split(command[1]), "--overwrite") == 0
    for name, tensor in library.load(out).head_tensors().items():
        assert torch.equal(tensor, before[name])

    module, other = library.load(bench.modules[1]), tmp_path / "trained"
    training = {"key": "k", "flags": {"seed": 1}, "scores": {"eval_accuracy": 0.25}}
    origin = replace(module.provenance, training=training)
    replace(module, provenance=origin).save(other)
    words = ("--task_name", "rte", "--data_dir", data, "--overwrite")
    assert refit(bench, other, out, *words) == 0
    assert library.load(out).provenance.training.keys() == {"flags", "refit"}
    assert "eval_accuracy" not in (out / "README.md").read_text()


def test_heads_of_other_tasks_stay(bench, data, tmp_path):
    merged = tmp_path / "merged"
    assert run("merge", "-a", *bench.modules, "-p", merged, "--head", "per-task",
               "--space", "delta") == 0  # fmt: skip
    out = tmp_path / "refitted"
    assert refit(bench, merged, out, "--task_name", "rte", "--data_dir", data) == 0
    before, after = library.load(merged).heads, library.load(out).heads
    assert set(after) == set(before) == set(bench.tasks)
    for task in ("mnli", "stsb"):
        for name, tensor in before[task].tensors.items():
            assert torch.equal(tensor, after[task].tensors[name])
    old, new = before["rte"].tensors, after["rte"].tensors
    assert torch.equal(old["classifier.dense.weight"], new["classifier.dense.weight"])
    assert not torch.equal(old["classifier.out_proj.weight"], new["classifier.out_proj.weight"])


@pytest.mark.parametrize("known", [True, False])
def test_a_head_keeps_its_order_of_classes_and_its_inner_layers(bench, data, tmp_path, known):
    """Rows of no known task, whose labels are words, mean the classes of the module's head, too."""
    module, turned = library.load(bench.modules[1]), ("not_entailment", "entailment")
    replace(module, head=replace(module.head, labels=turned)).save(tmp_path / "turned")
    rows = bench.rows["rte", "validation"]
    words = ("--task_name", "rte", "--data_dir", data) if known else ("--train_file", rows)
    out = tmp_path / "refitted"
    assert refit(bench, tmp_path / "turned", out, *words, "--penalty", 1e-6) == 0
    after = library.load(out)
    assert after.head.labels == turned
    for name in ("classifier.dense.weight", "classifier.dense.bias"):
        assert torch.equal(after.head_tensors()[name], module.head_tensors()[name])
    assert accuracy(bench, after) == 1.0


@torch.no_grad()
def accuracy(bench: own_heads.Bench, module: library.PEM) -> float:
    """Share of the RTE rows that the module answers with the row's word, one row at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        bench.base, num_labels=2, ignore_mismatched_sizes=True
    )
    library.attach(model.eval(), module)
    labels = module.head.labels
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    rows = [json.loads(line) for line in bench.rows["rte", "validation"].read_text().splitlines()]
    told = []
    for row in rows:
        inputs = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
        told.append(labels[int(model(**inputs).logits.argmax())] == row["label"])
    return sum(told) / len(told)


def test_what_cannot_be_fitted_is_one_line(bench, data, tmp_path, capsys):
    rows = tmp_path / "one.jsonl"
    lines = bench.rows["rte", "validation"].read_text().splitlines(keepends=True)
    rows.write_text("".join(line for line in lines if '"label": "entailment"' in line))
    words = ("--task_name", "rte", "--train_file", rows)
    assert refit(bench, bench.modules[1], tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert "too few rows of class 'not_entailment'; found 0, expected at least 2" in error
    assert error.endswith("give rows of every class\n")
    assert refit(bench, bench.modules[1], tmp_path / "out", *words, "--penalty", 0) == 2
    assert "--penalty" in capsys.readouterr().err
    module = library.load(bench.modules[1])
    huge = {n: 1e25 * t if n in module.adapter_tensors() else t for n, t in module.tensors.items()}
    library.save(replace(module, tensors=huge), tmp_path / "huge")
    words = ("--task_name", "rte", "--data_dir", data)
    assert refit(bench, tmp_path / "huge", tmp_path / "out", *words) == 3
    assert "the inputs of the last layer of row 0 are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refitted_module_cannot_be_rebuilt_and_says_so(bench, data, tmp_path, capsys):
    out = tmp_path / "refitted"
    assert refit(bench, bench.modules[1], out, "--task_name", "rte", "--data_dir", data) == 0
    assert run("rebuild", out) == 2
    assert "cannot be computed again" in capsys.readouterr().err
