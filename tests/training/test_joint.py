"""Several tasks in one training: each row counts among its own task's outputs, and nowhere else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.training_bench import a_batch, numpy_cross_entropy, results, write_rows
from transformers import AutoModelForSequenceClassification, BartConfig, BartModel

from pem_composition import checkpoint
from pem_composition.arithmetic.head_policies import select
from pem_composition.cli import main
from pem_composition.errors import DataError
from pem_composition.training import runs

ROWS = {"sst2": (75, 20), "stsb": (60, 33)}  # for training, for validation


@pytest.fixture(scope="module")
def folder(bench):
    """A folder per task; single sentences with classes, and pairs with scores."""
    found = bench.folder / "tasks"
    for seed, (task, (train, dev)) in enumerate(ROWS.items()):
        (found / task).mkdir(parents=True)
        regression = task == "stsb"
        write_rows(found / task / "train.jsonl", train, seed=seed, regression=regression)
        write_rows(found / task / "dev.jsonl", dev, seed=10 + seed, regression=regression)
    return found


@pytest.fixture(scope="module")
def flags(folder):
    return {
        "task_name": None, "train_file": None, "validation_file": None, "data_dir": folder,
        "joint_tasks": tuple(ROWS),
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(bench, flags):
    return runs.run(bench.config("joint", **flags, max_steps=12, eval_steps=6)).output_dir


def test_a_row_counts_among_the_outputs_of_its_task(bench, flags):
    start, batch, loss = a_batch(bench.config("batch", **flags, hidden_dropout_prob=0.0))
    labels = batch.pop("labels")
    logits = start.model.eval()(**batch).logits.detach()
    assert logits.shape[1] == 3 and set(labels[:, 0].tolist()) == {0.0, 1.0}
    classes, scores = labels[:, 0] == 0, labels[:, 0] == 1
    entropy = numpy_cross_entropy(logits[classes, :2], labels[classes, 1].long())
    errors = (logits[scores, 2].double().numpy() - labels[scores, 1].double().numpy()) ** 2
    expected = (entropy * int(classes.sum()) + errors.sum()) / len(labels)
    assert loss({"logits": logits}, labels).item() == pytest.approx(expected, rel=1e-6)
    padded = torch.cat([labels, torch.full((2, 2), -100.0)])  # of another process's share
    longer = torch.cat([logits, torch.randn(2, 3)])
    assert loss({"logits": longer}, padded).item() == pytest.approx(expected, rel=1e-6)
    logits.requires_grad_()
    loss({"logits": logits}, labels).backward()
    assert not logits.grad[classes, 2].any() and not logits.grad[scores, :2].any()


def test_each_task_is_scored_as_its_part_of_the_head_alone(bench, folder, trained, tmp_path):
    scores = results(trained)
    losses = {}
    for task, (_, rows) in ROWS.items():
        words = ["--adapter", trained, "--task_name", task, "--head", task, "--data_dir", folder]
        words += ["--model_name_or_path", bench.base, "--max_seq_length", 32, "--do_predict"]
        assert main(["evaluate", *map(str, words), "--output_dir", str(tmp_path / task)]) == 0
        own = results(tmp_path / task)
        near = dict.fromkeys(("accuracy", "pearson", "spearmanr"), 1e-6)
        if task == "stsb":  # e in x moves r by |e| / |x - mean(x)| at most; x is of float32
            lines = (tmp_path / task / "predict_results_stsb.jsonl").read_text().splitlines()
            x = np.array([json.loads(line)["prediction"] for line in lines])
            near["pearson"] = np.finfo(np.float32).eps * np.abs(x).max() / x.std()
        for name in ("accuracy",) if task == "sst2" else ("pearson", "spearmanr"):
            expected = pytest.approx(own[f"eval_{name}"], rel=0, abs=near[name])
            assert scores[f"eval_{task}_{name}"] == expected
        losses[task] = own["eval_loss"] * rows
    assert scores["eval_mean"] == pytest.approx(
        (scores["eval_sst2_accuracy"] + scores["eval_stsb_pearson"]) / 2
    )
    assert scores["eval_loss"] == pytest.approx(sum(losses.values()) / 53, rel=1e-5)
    log = results(trained, "trainer_state.json")["log_history"]
    best = max((e for e in log if "eval_mean" in e), key=lambda e: e["eval_mean"])
    assert scores["best_step"] == best["step"]


def test_the_head_has_a_part_of_each_kind(trained):
    module = checkpoint.load(trained)
    classes, score = (select(module, task) for task in ROWS)
    assert classes.info.labels == ("negative", "positive") and score.info.labels == ()
    assert (classes.info.problem, score.info.problem) == ("classification", "regression")
    whole = module.head_tensors()["classifier.weight"]
    assert torch.equal(torch.cat([h.tensors["classifier.weight"] for h in (classes, score)]), whole)


@pytest.mark.slow
def test_two_processes_train_the_module_that_one_trains(bench, flags):
    steady = flags | {"lora_dropout": 0.0, "hidden_dropout_prob": 0.0, "max_steps": 10}
    steady |= {"attention_probs_dropout_prob": 0.0}
    one = runs.run(bench.config("one", **steady, per_device_train_batch_size=18)).output_dir
    two = bench.pair("two", **steady, per_device_train_batch_size=9)
    first, second = (load_file(f / "adapter_model.safetensors") for f in (one, two))
    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_initial_module_of_the_tasks_is_started_from(bench, flags, tmp_path):
    words = ["--model_name_or_path", bench.base, "--joint_tasks", *ROWS]
    assert main(["init", *map(str, words), "--output_dir", str(tmp_path / "init")]) == 0
    begun = flags | {"init_from": str(tmp_path / "init"), "max_steps": 1, "eval_steps": None}
    done = runs.run(bench.config("begun", **begun)).output_dir
    fresh = runs.run(bench.config("fresh", **flags | {"max_steps": 1, "eval_steps": None}))
    assert json.loads((done / "pem.json").read_text())["init"]
    assert (done / "adapter_model.safetensors").read_bytes() == (
        fresh.output_dir / "adapter_model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def bart(bench):
    """A base with encoder and decoder, which ends a sentence once and a pair twice."""
    folder = shutil.copytree(bench.base, bench.folder / "bart")
    config = BartConfig(
        vocab_size=52, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0,
        max_position_embeddings=66, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
    )  # fmt: skip
    BartModel(config).save_pretrained(folder)
    return folder


def test_a_classifier_that_reads_ends_refuses_sentences_beside_pairs(bench, flags, bart):
    model = AutoModelForSequenceClassification.from_pretrained(bart)
    ends = torch.tensor([[2, 5, 3, 6, 7, 8], [2, 5, 3, 6, 7, 3]])
    with pytest.raises(ValueError, match="same number of <eos> tokens"):
        model(ends)
    mixed = bench.config("mixed", **flags | {"model_name_or_path": bart, "max_steps": 1})
    with pytest.raises(DataError, match="found 1 or 2 end tokens in a row"):
        runs.run(mixed)
    assert not (bench.folder / "mixed").exists()


def test_a_classifier_that_reads_ends_trains_on_sentences_alone(bench, flags, folder, bart):
    (folder / "cola").mkdir()
    write_rows(folder / "cola" / "train.jsonl", 40, seed=5)
    write_rows(folder / "cola" / "dev.jsonl", 20, seed=15)
    alike = {"model_name_or_path": bart, "max_steps": 2, "joint_tasks": ("sst2", "cola")}
    done = runs.run(bench.config("sentences", **flags | alike, eval_steps=2)).output_dir
    assert results(done)["eval_samples"] == 40


def test_rows_of_one_task_are_no_rows_of_another(bench, flags, folder, tmp_path):
    alike = flags | {"data_dir": folder / "sst2", "joint_tasks": ("sst2", "cola")}
    with pytest.raises(DataError, match="--joint_tasks: several tasks read the same rows"):
        runs.run(bench.config("shared", **alike))
    for names, said in (
        (("sst2", "SST-2"), "--joint_tasks: one task in two spellings"),
        (("sst2", "sst9"), "--joint_tasks: unknown task; found 'sst9'"),
    ):
        with pytest.raises(DataError, match=said):
            runs.run(bench.config("named", **flags | {"joint_tasks": names}))
    lacking = tmp_path / "lacking"
    for task in ROWS:
        (lacking / task).mkdir(parents=True)
        (lacking / task / "train.jsonl").write_bytes((folder / task / "train.jsonl").read_bytes())
    (lacking / "sst2" / "dev.jsonl").write_bytes((folder / "sst2" / "dev.jsonl").read_bytes())
    with pytest.raises(DataError, match="stsb: no validation rows"):
        runs.run(bench.config("lacking", **flags | {"data_dir": lacking}))
    assert not (bench.folder / "lacking").exists()
