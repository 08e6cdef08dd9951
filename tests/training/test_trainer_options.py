"""Optimizers, label smoothing and early stopping give the plain Trainer's numbers.

Every step takes all rows, so that the order in which they are drawn makes no difference.
"""

from __future__ import annotations

import json

import pytest
import torch
from support.training_bench import make_base, results, write_rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from pem_composition.cli import main
from pem_composition.errors import UsageError
from pem_composition.training import runs
from pem_composition.training.training_flags import OPTIMIZERS, TrainConfig

pytestmark = pytest.mark.slow

ROWS, RATE = 16, 3e-3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A whole model without dropout, with its head, and rows."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("options")
    base = make_base(folder / "base", dropout=0.0)
    argv = ["init", "--adapter_config", "fft", "--model_name_or_path", base, "--task_name", "sst2"]
    assert main([str(a) for a in [*argv, "--output_dir", folder / "init"]]) == 0
    write_rows(folder / "train.jsonl", ROWS, seed=3)
    write_rows(folder / "dev.jsonl", ROWS, seed=4)
    return folder


def config(start, output, **changes) -> TrainConfig:
    own = {
        "model_name_or_path": str(start / "base"), "task_name": "sst2",
        "train_file": str(start / "train.jsonl"), "validation_file": str(start / "dev.jsonl"),
        "output_dir": str(output), "adapter_config": "fft", "init_from": str(start / "init"),
        "max_steps": 6, "eval_steps": 1, "per_device_train_batch_size": ROWS, "warmup_steps": 0,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "logging_steps": 1,
        "disable_tqdm": True, "load_best_model_at_end": False,
    }  # fmt: skip
    return TrainConfig(**own | changes)


def plain(start, output, *, callbacks=(), **options) -> Trainer:
    """The same run by the Trainer alone."""
    tokenizer = AutoTokenizer.from_pretrained(start / "init")
    model = AutoModelForSequenceClassification.from_pretrained(start / "init")
    rows = {
        name: [
            {**tokenizer(row["sentence"]), "labels": row["label"]}
            for row in map(json.loads, (start / f"{name}.jsonl").read_text().splitlines())
        ]
        for name in ("train", "dev")
    }
    arguments = {
        "output_dir": str(output), "max_steps": 6, "per_device_train_batch_size": ROWS,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.01,
        "adam_beta2": 0.98, "adam_epsilon": 1e-6, "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(**arguments | options), DataCollatorWithPadding(tokenizer),
        rows["train"], rows["dev"], callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return trainer


def log(history, name):
    return [entry[name] for entry in history if name in entry]


@pytest.mark.parametrize(
    "options",
    [*({"optim": name} for name in OPTIMIZERS), {"label_smoothing_factor": 0.2}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_give_the_plain_trainer_s_numbers(start, tmp_path, options):
    oracle = plain(start, tmp_path / "plain", **options)
    folder = runs.run(config(start, tmp_path / "own", **options)).output_dir
    found = results(folder, "trainer_state.json")["log_history"]
    expected = log(oracle.state.log_history, "loss")
    assert log(found, "loss") == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 6, "the model learns"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = {"input_ids": torch.tensor([[2, 5, 9, 20, 3], [2, 8, 11, 30, 3]])}
    with torch.no_grad():
        own, plain_ones = (m.eval()(**batch).logits for m in (model, oracle.model))
    torch.testing.assert_close(own, plain_ones, rtol=1e-3, atol=1e-4)


STOPS = {"early_stopping_patience": 2, "load_best_model_at_end": True, "max_steps": 30}


@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_training_stops_where_the_plain_trainer_stops(start, tmp_path, threshold):
    oracle = plain(
        start, tmp_path / "plain", callbacks=[EarlyStoppingCallback(2, threshold)], max_steps=30,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=False, per_device_eval_batch_size=ROWS,
    )  # fmt: skip
    options = {**STOPS, "metric_for_best_model": "loss", "early_stopping_threshold": threshold}
    folder = runs.run(config(start, tmp_path / "own", **options)).output_dir
    state = results(folder, "trainer_state.json")
    assert 2 < oracle.state.global_step < 30, "it stops, and not at once"
    assert state["global_step"] == oracle.state.global_step
    assert results(folder)["best_step"] == oracle.state.best_global_step
    assert results(folder)["eval_loss"] == pytest.approx(oracle.state.best_metric, rel=1e-4)


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(start, tmp_path):
    options = {**STOPS, "metric_for_best_model": "loss", "save_total_limit": None}
    whole = runs.run(config(start, tmp_path / "whole", **options)).output_dir
    end = results(whole, "trainer_state.json")["global_step"]
    for step in (end - 1, end):  # a checkpoint of the step before the last, and of the last
        folder = tmp_path / f"cut-{step}"
        runs.run(config(start, folder, **options))
        for path in folder.iterdir():
            number = path.name.removeprefix("checkpoint-")
            if path.is_file():
                path.unlink()
            elif number.isdecimal() and int(number) > step:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        again = runs.run(config(start, folder, **options)).output_dir
        assert results(again, "trainer_state.json")["global_step"] == end
        assert results(again)["best_step"] == results(whole)["best_step"]


REFUSED = {
    "threshold alone": ({"early_stopping_threshold": 0.1}, "early_stopping_patience"),
    "no evaluation": ({"early_stopping_patience": 1, "eval_strategy": "no", "eval_steps": None,
                       "load_best_model_at_end": True}, "has no effect without"),
    "not the best": ({"early_stopping_patience": 1}, "has no effect without"),
    "patience 0": ({"early_stopping_patience": 0}, "a number >= 1"),
    "negative": ({"label_smoothing_factor": -0.1}, ">= 0 and < 1"),
    "unknown": ({"optim": "adamw_bnb_8bit"}, "adamw_torch_fused, adamw_torch, adafactor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_without_effect_or_out_of_range_are_refused(start, tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        config(start, tmp_path, **changes)


def test_smoothing_of_a_regression_is_refused(start, tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", 8, seed=1, regression=True)
    own = {"task_name": "stsb", "train_file": str(rows), "validation_file": None, "init_from": None}
    with pytest.raises(UsageError, match="a regression has no classes"):
        runs.run(
            config(start, tmp_path / "out", label_smoothing_factor=0.1, eval_steps=None, **own)
        )


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 has an effect there")
def test_a_precision_without_effect_is_named_and_true(start, tmp_path):
    said: list[str] = []
    runs.train(config(start, tmp_path / "half", fp16=True), said.append)
    runs.train(config(start, tmp_path / "whole"), said.append)
    assert sum("--fp16 does nothing on a processor" in line for line in said) == 1
    whole, half = (results(tmp_path / name)["train_loss"] for name in ("whole", "half"))
    assert whole == half


def test_flags_of_another_kind_of_module_are_said_to_do_nothing(start, tmp_path):
    own = {"adapter_config": "ia3", "lora_r": 4, "lora_alpha": 16.0, "init_from": None}
    assert [line.split()[1] for line in config(start, tmp_path, **own).idle_notes()] == [
        "--lora_r", "--lora_alpha",
    ]  # fmt: skip
    assert config(start, tmp_path, adapter_config="lora", lora_r=4).idle_notes() == []
    own = {"adapter_config": "lora", "ia3_placement": "reference", "init_from": None}
    text = config(start, tmp_path, objective="seq2seq", **own).idle_notes()
    assert text == [
        "note: --ia3_placement does nothing with --objective seq2seq --adapter_config lora"
    ]


def test_a_checkpoint_to_resume_from_that_is_not_there_is_named(start, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: no checkpoint; found no such directory"):
        runs.run(config(start, tmp_path / "out", resume_from_checkpoint=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()
