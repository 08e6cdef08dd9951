"""A base shared out between two processes trains the module, or the model, of one process."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from support import pem_process, sharded_gradients
from support.tiny_models import write_causal, write_text_to_text
from support.training_bench import (
    BAD,
    FILLER,
    GOOD,
    losses,
    ranks,
    refusal,
    results,
    write_documents,
)  # fmt: skip

from pem_composition.safe_files import sha256_file
from pem_composition.training import runs

pytestmark = pytest.mark.slow

MODULE, MODEL = "adapter_model.safetensors", "model.safetensors"
QUIET = {"lora_dropout": None, "max_steps": 6, "eval_steps": 3, "logging_steps": 1}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


WHOLE = QUIET | {"adapter_config": "fft", "learning_rate": 1e-3, "save_total_limit": 9}


@pytest.fixture(scope="module")
def cases(bench):
    """Changes of the flags by name: every objective, kind of module and way to save memory.

    And whole models: a new head and pooler; text to text; tied embeddings.
    """
    texts = [" ".join([*GOOD, *BAD, *FILLER, "negative", "positive", "Instruction : Response ="])]
    t5 = write_text_to_text(bench.folder / "f-t5", texts)
    gpt2, llama = (write_causal(bench.folder / f"f-{n}", n, texts) for n in ("gpt2", "llama"))
    prompt = bench.folder / "f-prompt.json"
    answers = {"negative": "sad w1", "positive": "good"}
    prompt.write_text(json.dumps({"template": "{sentence}", "answers": answers}))
    documents = write_documents(bench.folder / "f-documents.jsonl", 60, seed=5)
    asked = bench.folder / "f-asked.jsonl"
    rows = [{"instruction": a, "input": "", "output": b} for a, b in zip(GOOD, BAD, strict=True)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))

    def decoder(objective, base, file):
        files = {"train_file": file, "validation_file": file, "task_name": None}
        return {"objective": objective, "model_name_or_path": base, **files}

    answered = {
        "objective": "seq2seq", "model_name_or_path": t5, "prompt": prompt, "max_eval_samples": 20,
    }  # fmt: skip
    accumulated = STILL | {"gradient_accumulation_steps": 2}
    return {
        "classification, accumulated": QUIET | accumulated,
        "seq2seq, ia3": QUIET | answered | {"adapter_config": "ia3"},
        "causal_lm, bfloat16 base, recomputed": QUIET | decoder("causal_lm", gpt2, documents) | {
            "model_dtype": "bfloat16", "gradient_checkpointing": True,
        },
        "instruction": QUIET | decoder("instruction", llama, asked) | {"max_seq_length": 64},
        "classification, best step first": WHOLE | accumulated | {
            "learning_rate": 1e-2, "metric_for_best_model": "loss",
        },
        "seq2seq, whole": WHOLE | answered,
        "causal_lm, tied": WHOLE | decoder("causal_lm", gpt2, documents),
    }  # fmt: skip


@pytest.mark.parametrize("number", range(7))
def test_losses_and_weights_are_those_of_one_process(bench, cases, number):
    """What is published has the same files, tensors and shapes, and a model its configuration."""
    changes = list(cases.values())[number]
    config = bench.config(f"f-one-{number}", **changes, per_device_train_batch_size=8)
    one = runs.run(config).output_dir
    two = bench.pair(f"f-two-{number}", **changes, per_device_train_batch_size=4, fsdp=True)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert losses(one, name), name
        assert losses(two, name) == pytest.approx(losses(one, name), rel=1e-5), name
    file, most = (MODEL, 2e-5) if number > 3 else (MODULE, 1e-6)
    first, second = load_file(one / file), load_file(two / file)
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < most
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert results(one)["best_step"] == results(two)["best_step"]
    assert number != 4 or results(one)["best_step"] == 3
    if file == MODEL:
        assert (one / "config.json").read_text() == (two / "config.json").read_text()


def test_a_run_goes_on_with_as_many_processes_bit_for_bit_and_with_others(bench):
    """Dropout is on: the state of every process's generator comes back."""
    changes = QUIET | {"lora_dropout": 0.1, "save_total_limit": 9, "max_steps": 8}
    whole = bench.pair("f-whole", **changes, per_device_train_batch_size=4, fsdp=True)
    for name in ("f-stopped", "f-alone"):
        shutil.copytree(whole / "checkpoint-3", bench.folder / name / "checkpoint-3")
    again = bench.pair("f-stopped", **changes, per_device_train_batch_size=4, fsdp=True)
    assert sha256_file(again / MODULE) == sha256_file(whole / MODULE)
    assert losses(again) == losses(whole)
    lines = []
    config = bench.config("f-alone", **changes, per_device_train_batch_size=8)
    runs.run(config, lines.append)
    assert any(line.startswith("resuming") and "checkpoint-3" in line for line in lines)
    alone = losses(bench.folder / "f-alone")
    assert len(alone) == 8
    assert alone[:3] == losses(whole)[:3]


def test_a_model_goes_on_with_as_many_processes_bit_for_bit_and_with_others(bench):
    """Without --force_resume, from parts and from what one process wrote."""
    drops = {"max_steps": 4, "eval_steps": 2}
    whole = bench.pair("w-whole", **WHOLE | drops, per_device_train_batch_size=8, fsdp=True)
    names = sorted(p.name for p in (whole / "checkpoint-2" / "model_shards").iterdir())
    assert len(names) == 2
    assert all(n.endswith(".safetensors") for n in names)
    shutil.copytree(whole / "checkpoint-2", bench.folder / "w-again" / "checkpoint-2")
    again = bench.pair("w-again", **WHOLE | drops, per_device_train_batch_size=8, fsdp=True)
    assert sha256_file(again / MODEL) == sha256_file(whole / MODEL)
    assert losses(again) == losses(whole)
    changes = WHOLE | drops | STILL
    alone = runs.run(bench.config("w-alone", **changes, per_device_train_batch_size=16)).output_dir
    both = bench.pair("w-both", **changes, per_device_train_batch_size=8, fsdp=True)
    for source, name in ((alone, "w-shared-out"), (both, "w-brought-together")):
        shutil.copytree(source / "checkpoint-2", bench.folder / name / "checkpoint-2")
    lines = []
    config = bench.config("w-brought-together", **changes, per_device_train_batch_size=16)
    found = [
        runs.run(config, lines.append).output_dir,
        bench.pair("w-shared-out", **changes, per_device_train_batch_size=8, fsdp=True),
    ]
    said = (bench.folder / "w-shared-out.log").read_text().splitlines()
    assert all(any(line.startswith("resuming") for line in ls) for ls in (lines, said))
    first = load_file(alone / MODEL)
    for folder in found:
        assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
        second = load_file(folder / MODEL)
        assert max(float((first[n] - second[n]).abs().max()) for n in first) < 2e-5


def test_every_block_is_a_unit_and_tied_weights_get_the_gradients_of_all_their_uses(tmp_path):
    """Against the same model held whole."""
    names = ("roberta", "bart", "t5", "gpt2", "opt", "llama", "gemma")
    both = [
        pem_process.call(
            sharded_gradients.main, [tmp_path, *names], tmp_path / f"{i}.log", variables=rank
        )
        for i, rank in enumerate(ranks())
    ]
    assert [process.wait() for process in both] == [0, 0], both[0].errors[-3000:]
    printed = both[0].log.read_text().splitlines()
    found = [json.loads(line) for line in printed if line.startswith("{")]
    assert [f["name"] for f in found] == list(names)
    for f in found:
        assert f["names"] > 10, f
        assert f["worst"] < 1e-5, f
        assert len(f["blocks"]) >= 2, f
        assert all(f["blocks"]), f


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, r"--fsdp.*one process.*torchrun"),
        ({"adapter_config": "fft", "optim": "adafactor"}, r"--fsdp.*adafactor.*adamw_torch"),
        (
            {
                "adapter_config": "fft",
                "objective": "causal_lm",
                "task_name": None,
                "load_in_4bit": True,
            },
            r"--adapter_config fft: trains the base's weights, and quantised ones cannot be",
        ),
        ({"objective": "causal_lm", "task_name": None, "load_in_4bit": True}, r"--load_in_4bit"),
    ],
)
def test_what_is_not_shared_out_is_refused_by_name(bench, capsys, changes, expected):
    flags = bench.flags("f-refused", **{"lora_dropout": None, **changes}, fsdp=True)
    line = refusal(capsys, ["train", *(w for k, v in flags.items() for w in (f"--{k}", v))])
    assert re.search(expected, line), line
