"""Flags are checked before anything is loaded, and the key holds what decides the result."""

from __future__ import annotations

import pytest

from pem_composition.cli import parser
from pem_composition.errors import PEMError, UsageError
from pem_composition.training.training_flags import TrainConfig

BASE = {"model_name_or_path": "m", "output_dir": "o", "task_name": "rte"}
JOINT = {"task_name": None, "joint_tasks": ("rte", "sst2")}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"learning_rate": 0.0}, ("--learning_rate", "0.0", "> 0")),
        ({"learning_rate": float("nan")}, ("--learning_rate", "nan", "finite")),
        ({"lora_r": 0}, ("--lora_r", "found 0", ">= 1")),
        ({"lora_dropout": 1.0}, ("--lora_dropout", "< 1")),
        (
            {"max_steps": 10, "num_train_epochs": 2.0},
            ("--max_steps", "--num_train_epochs", "10 and 2.0"),
        ),
        ({"bf16": True, "fp16": True}, ("--bf16", "--fp16")),
        ({"eval_strategy": "epoch", "eval_steps": 5}, ("--eval_steps", "epoch")),
        ({"eval_strategy": "steps"}, ("--eval_strategy", "--eval_steps N")),
        ({"adapter_config": "fft", "target_modules": ("query",)}, ("--target_modules", "fft")),
        ({"adapter_config": "ia3", "freeze": "lora_A"}, ("--freeze", "lora_A", "lora")),
        ({"adapter_config": "fft", "freeze": "lora_A"}, ("--freeze", "lora_A", "lora")),
        ({"freeze": "lora_B"}, ("--freeze", "lora_B", "--init_from")),
        ({"do_train": False, "init_from": "m", "freeze": "lora_B"}, ("--freeze", "--do_train")),
        ({"task_name": None}, ("--task_name", "--train_file")),
        ({"max_train_samples": 0}, ("--max_train_samples", ">= 1")),
        ({"do_train": False}, ("--do_train", "--init_from")),
        (JOINT | {"joint_tasks": ("rte",)}, ("--joint_tasks", "two tasks or more")),
        (JOINT | {"joint_tasks": ("rte", "rte")}, ("--joint_tasks", "each once")),
        (JOINT | {"task_name": "rte"}, ("--task_name", "--joint_tasks names several")),
        (JOINT | {"train_file": "f"}, ("--train_file", "folder per task")),
        (JOINT | {"do_predict": True}, ("--do_predict", "--joint_tasks")),
        (JOINT | {"adapter_config": "fft"}, ("--joint_tasks", "fft", "lora or ia3")),
        (JOINT | {"objective": "seq2seq"}, ("--joint_tasks", "seq2seq", "classification")),
    ],
)
def test_an_unusable_flag_is_named_with_what_was_found_and_expected(flags, words):
    with pytest.raises(UsageError) as error:
        TrainConfig(**(BASE | flags))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_key_ignores_places_and_bookkeeping_but_not_what_changes_the_result():
    plain = TrainConfig(**BASE).result_fields()
    same = {
        "output_dir": "p",
        "logging_steps": 3,
        "save_steps": 7,
        "dataloader_num_workers": 2,
        "disable_tqdm": True,
    }
    assert TrainConfig(**(BASE | same)).result_fields() == plain
    assert TrainConfig(**(BASE | {"ia3_placement": "reference"})).result_fields() == plain
    for change in (
        {"learning_rate": 1.0},
        {"seed": 1},
        {"lora_r": 4},
        {"max_seq_length": 64},
        {"eval_steps": 5},
        {"freeze": "lora_A"},
    ):
        assert TrainConfig(**(BASE | change)).result_fields() != plain


def test_the_flags_of_the_example_programs_are_read():
    argv = (
        "--model_name_or_path m --task_name rte --adapter_config ia3 --do_train --do_eval "
        "--max_seq_length 64 --per_device_train_batch_size 4 --learning_rate 5e-3 --max_steps 3 "
        "--overwrite_output_dir true "
        "--no-load_best_model_at_end --target_modules query key --output_dir o"
    )
    config = parser.parse(TrainConfig, argv.split(), "pem train")
    assert config.adapter_config == "ia3" and config.max_steps == 3 and config.learning_rate == 5e-3
    assert config.overwrite_output_dir and not config.load_best_model_at_end
    assert config.target_modules == ("query", "key")


SEQ2SEQ, BLOCKS = {"objective": "seq2seq"}, {"objective": "seq2seq", "target": "next_block"}
CAUSAL, INSTRUCTION = {"objective": "causal_lm"}, {"objective": "instruction"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target": "label"}, ("--target", "has no effect without --objective seq2seq")),
        ({"prompt": "rte"}, ("--prompt", "has no effect without --objective seq2seq")),
        ({"block_size": 8}, ("--block_size", "--target next_block")),
        (SEQ2SEQ | {"block_size": 8}, ("--block_size", "--target next_block")),
        (BLOCKS | {"prompt": "rte"}, ("--prompt", "has no effect without --target label")),
        (BLOCKS | {"block_size": 0}, ("--block_size", ">= 1")),
        ({"score_above": 0.5}, ("--score_above", "--objective causal_lm")),
        ({"score_column": "toxicity"}, ("--score_column", "--objective causal_lm")),
        ({"truncate": False}, ("--no-truncate", "--objective causal_lm")),
        ({"loss_on_padding": True}, ("--loss_on_padding", "--objective causal_lm")),
        (CAUSAL | {"target": "label"}, ("--target", "--objective seq2seq")),
        (CAUSAL | {"score_above": float("nan")}, ("--score_above", "finite")),
        ({"template": "chat"}, ("--template", "--objective instruction")),
        ({"train_on_inputs": True}, ("--train_on_inputs", "--objective instruction")),
        ({"load_in_8bit": True}, ("--load_in_8bit", "causal_lm or instruction")),
        ({"device_map": "auto"}, ("--device_map", "causal_lm or instruction")),
        (INSTRUCTION | {"load_in_8bit": True, "load_in_4bit": True},
         ("--load_in_4bit: contradicts --load_in_8bit",)),
        (INSTRUCTION | {"load_in_4bit": True, "adapter_config": "fft"},
         ("--adapter_config fft", "quantised ones cannot be")),
        (INSTRUCTION | {"score_above": 0.5}, ("--score_above", "causal_lm")),
    ],
)  # fmt: skip
def test_flags_of_another_objective_are_refused(flags, words):
    with pytest.raises(PEMError) as error:
        TrainConfig(**(BASE | flags))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.exit_code == 2
