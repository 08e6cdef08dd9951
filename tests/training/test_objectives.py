"""What holds of a run whatever its objective."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.objective_benches import ClassBench
from support.tiny_models import write_causal, write_text_to_text
from support.training_bench import a_batch, losses, ranks

from pem_composition.training import runs

pytestmark = pytest.mark.slow

QUIET = {"eval_strategy": "no", "eval_steps": None}


@pytest.fixture(scope="module")
def benches(bench, causal, text):
    """Name of an objective -> its runs, and the name that they are known by there."""
    return {
        "classes": (ClassBench(bench), None), "gpt2": (causal, "gpt2"), "llama": (causal, "llama"),
        "answers": (text, "answers"), "blocks": (text, "blocks"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("objective", ["gpt2", "llama", "answers"])
def test_gradients_are_finite_and_the_modules_alone(benches, objective, kind):
    own, name = benches[objective]
    changes = {"adapter_config": kind, "lora_dropout": None}
    start, batch, loss = a_batch(own.config("gradients", name, **changes))
    labels = batch.pop("labels")
    loss(start.model.train()(**batch), labels).backward()
    moved = {n: p.grad for n, p in start.model.named_parameters() if p.grad is not None}
    assert len(moved) == len(start.weights.initial.tensors) > 0
    assert not start.weights.initial.head_tensors()
    assert all("lora_" in n or "ia3" in n for n in moved)
    assert all(torch.isfinite(g).all() for g in moved.values())
    assert all(g.abs().max() > 0 for n, g in moved.items() if "lora_A" not in n)  # B is zero yet


@pytest.mark.parametrize("objective", ["gpt2", "answers"])
def test_a_resumed_run_equals_the_uninterrupted_one(benches, objective):
    """Dropout of base and module is on; the random state is part of the checkpoint."""
    own, name = benches[objective]
    write = write_causal if objective == "gpt2" else write_text_to_text
    words = ("gpt2", own.texts) if objective == "gpt2" else (own.texts,)
    changes = {
        "model_name_or_path": write(own.folder / f"{objective}-dropout", *words, dropout=0.1),
        "lora_dropout": 0.1, "max_steps": 12, "save_steps": 5, "eval_steps": 12,
        "save_total_limit": 9,
    }  # fmt: skip
    whole = runs.run(own.config(f"{objective}-whole", name, **changes)).output_dir
    stopped = own.folder / f"{objective}-stopped"
    shutil.copytree(whole / "checkpoint-5", stopped / "checkpoint-5")
    lines = []
    runs.run(own.config(stopped.name, name, **changes), lines.append)
    assert any("resuming from" in line and "checkpoint-5" in line for line in lines)
    names = ["adapter_model.safetensors", "adapter_config.json"]
    assert all((whole / n).read_bytes() == (stopped / n).read_bytes() for n in names)
    assert losses(whole) == losses(stopped)
    assert runs.run(own.config(whole.name, name, **changes)).skipped


@pytest.mark.parametrize(
    ("objective", "metric"), [("gpt2", "eval_perplexity"), ("answers", "eval_accuracy")]
)
def test_two_processes_train_to_the_losses_of_one(benches, objective, metric):
    """Rows do not divide and targets differ in length: each process has other token counts."""
    own, name = benches[objective]
    quick = {"max_steps": 14, "eval_steps": 7, "logging_steps": 1, "lora_dropout": None}
    changes = quick | {"per_device_train_batch_size": 16}
    one = runs.run(own.config(f"{objective}-one", name, **changes)).output_dir
    changes = quick | {"per_device_train_batch_size": 8}
    pair = [own.start(f"{objective}-two", name, rank, **changes) for rank in ranks()]
    assert [child.wait() for child in pair] == [0, 0], pair[0].text()[-2000:]
    for logged in ("loss", "grad_norm", "eval_loss", metric):
        first, second = losses(one, logged), losses(own.folder / f"{objective}-two", logged)
        assert len(first) == len(second) > 0
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), logged


@pytest.mark.parametrize("objective", ["classes", "gpt2", "answers", "blocks"])
def test_layout_and_accumulation_change_nothing_but_rounding(benches, objective):
    own, name = benches[objective]
    quick = {**QUIET, "lora_dropout": None, "max_steps": 6, "learning_rate": 1e-3}
    plain = runs.train(own.config(f"{objective}-plain", name, **quick))
    variants = {
        "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        "padded": {"pad_to_max_length": True},
        "recomputed": {"gradient_checkpointing": True},
    }
    if objective == "gpt2":
        variants["uncut"] = {"truncate": False}
    for variant, changes in variants.items():
        other = runs.train(own.config(f"{objective}-{variant}", name, **(quick | changes)))
        for tensor in plain.tensors:
            torch.testing.assert_close(
                other.tensors[tensor], plain.tensors[tensor], rtol=2e-3, atol=2e-5,
                msg=f"{variant}: {tensor}",
            )  # fmt: skip
