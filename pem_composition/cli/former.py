"""Flags of the paper's published programs, by the names that they have here.

A former flag is answered with its name: the first one that the program has. What has fallen away is
answered with the reason. The table in ``docs/reference_code.md`` says more.
"""

from __future__ import annotations

from collections.abc import Container

RENAMED: dict[str, tuple[str, ...]] = {
    # training and evaluation
    "dataset_name": ("task_name",),
    "evaluation_strategy": ("eval_strategy",),
    "load_adapter": ("init_from", "adapter", "adapters"),
    # texts
    "k": ("top_k",),
    "length": ("max_length",),
    "model_save_dir": ("save_path",),
    "num": ("num_samples",),
    "p": ("top_p",),
    "save_dir": ("output_file",),
    "scale": ("strength",),
    "input": ("texts",),
    "model_name": ("judge",),
    "save_to": ("output",),
    # instruction models
    "base_model": ("model_name_or_path",),
    "cutoff_len": ("max_seq_length",),
    "data_path": ("train_file",),
    "decoding_penalty": ("repetition_penalty",),
    "instructions": ("instruction_file",),
    "load_8bit": ("load_in_8bit",),
    "lora_target_modules": ("target_modules",),
    "lora_weights_list": ("adapters", "adapter"),
    "micro_batch_size": ("per_device_train_batch_size",),
    "num_epochs": ("num_train_epochs",),
    "prompt_template_name": ("template",),
    "val_set_size": ("validation_size",),
}
GONE = {
    "cache_dir": "downloads go where HF_HOME says",
    "model_type": "the model's own configuration says it",
    "no_cuda": "--use_cpu says it",
    "prefix": "write it into --prompt",
    "save_strategy": "--save_steps says how often",
    "stop_token": "a text ends with the model's end token",
    "train_adapter": "--adapter_config says what is trained, fft: the whole model",
    "xlm_language": "decoders alone write texts",
}


def answer(flag: str, known: Container[str]) -> str | None:
    """What to do instead of a former flag; None if it is none of them.

    Args:
        flag: its name without dashes.
        known: names of the program's flags, without dashes.
    """
    new = next((name for name in RENAMED.get(flag, ()) if name in known), None)
    if new is not None:
        return f"its name here is --{new}"
    return f"leave it out: {GONE[flag]}" if flag in GONE else None
