"""A base shared out between two processes trains the module of one process."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from support.tiny_models import write_causal, write_text_to_text
from support.training_bench import BAD, FILLER, GOOD, losses, refusal, write_documents

from pem_composition.safe_files import sha256_file
from pem_composition.training import runs

pytestmark = pytest.mark.slow

MODULE = "adapter_model.safetensors"
QUIET = {"lora_dropout": None, "max_steps": 6, "eval_steps": 3, "logging_steps": 1}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def cases(bench):
    """Changes of the flags by name: every objective, kind of module and way to save memory."""
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

    return {
        "classification, accumulated": STILL | {"gradient_accumulation_steps": 2},
        "seq2seq, ia3": {
            "objective": "seq2seq", "model_name_or_path": t5, "prompt": prompt,
            "adapter_config": "ia3", "max_eval_samples": 20,
        },
        "causal_lm, bfloat16 base, recomputed": decoder("causal_lm", gpt2, documents) | {
            "model_dtype": "bfloat16", "gradient_checkpointing": True,
        },
        "instruction": decoder("instruction", llama, asked) | {"max_seq_length": 64},
    }  # fmt: skip


@pytest.mark.parametrize("number", range(4))
def test_losses_and_module_are_those_of_one_process(bench, cases, number):
    changes = QUIET | list(cases.values())[number]
    config = bench.config(f"f-one-{number}", **changes, per_device_train_batch_size=8)
    one = runs.run(config).output_dir
    two = bench.pair(f"f-two-{number}", **changes, per_device_train_batch_size=4, fsdp=True)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert losses(one, name), name
        assert losses(two, name) == pytest.approx(losses(one, name), rel=1e-5), name
    first, second = load_file(one / MODULE), load_file(two / MODULE)
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-6


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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, r"--fsdp.*one process.*torchrun"),
        ({"adapter_config": "fft", "lora_dropout": None}, r"--fsdp.*fft.*lora or ia3"),
        ({"objective": "causal_lm", "task_name": None, "load_in_4bit": True}, r"--load_in_4bit"),
    ],
)
def test_what_is_not_shared_out_is_refused_by_name(bench, capsys, changes, expected):
    flags = bench.flags("f-refused", **{"lora_dropout": None, **changes}, fsdp=True)
    line = refusal(capsys, ["train", *(w for k, v in flags.items() for w in (f"--{k}", v))])
    assert re.search(expected, line), line
