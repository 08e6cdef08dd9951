"""Under which title ``--help`` shows a flag; a name means the same in every program.

Titles stand in the order of the table; a flag that is not in it is the program's own and stands
first, beside those that must be given.
"""

from __future__ import annotations

OWN = "what it does"
GROUPS: dict[str, tuple[str, ...]] = {
    "modules and output": (
        "adapters", "adapter", "module", "save_path", "output_dir", "output_file", "output",
        "overwrite", "overwrite_output_dir", "format", "dtype", "head", "adatasks", "adaconfig",
        "dropout_list", "purpose", "json",
    ),
    "rows": (
        "task_name", "joint_tasks", "train_file", "validation_file", "test_file", "data_dir",
        "split", "text_column_names", "label_column_name", "labels", "do_regression",
        "max_train_samples", "max_eval_samples", "max_samples", "score_column", "score_above",
    ),
    "lm-evaluation-harness": ("harness_tasks", "harness_include", "num_fewshot", "limit"),
    "model": (
        "model_name_or_path", "model", "base", "allow_base_mismatch", "load_in_8bit",
        "load_in_4bit", "model_dtype",
    ),
    "how the model answers": (
        "objective", "target", "prompt", "template", "answers", "max_seq_length", "block_size",
        "pad_to_max_length", "metric_for_best_model", "max_invalid", "reference_module",
        "controls", "joint_module", "refit", "refit_select",
        "train_on_inputs", "truncate", "loss_on_padding",
    ),
    "texts": (
        "prompt_file", "max_prompts", "num_samples", "max_new_tokens", "max_length",
        "temperature", "top_k", "top_p", "greedy", "num_beams", "repetition_penalty",
        "instruction_file", "max_instructions", "judge", "threshold", "perplexity_file",
        "guard_file", "perplexity_tokens", "guard_tokens", "window", "stride", "start_token",
        "max_ppl_increase", "set_name",
    ),
    "endpoint": (
        "backend", "served_model_name", "base_url", "api_key_env", "max_reply_tokens",
        "max_requests", "max_tokens", "parallel", "max_retries", "timeout", "retry_refused",
    ),
    "kind of module": (
        "adapter_config", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
        "ia3_placement", "init_from", "freeze",
    ),
    "optimisation": (
        "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "gradient_accumulation_steps", "warmup_ratio", "warmup_steps", "lr_scheduler_type",
        "weight_decay", "max_grad_norm", "label_smoothing_factor", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "group_by_length", "optim", "adam_beta1", "adam_beta2",
        "adam_epsilon",
    ),
    "evaluation while training": (
        "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps",
        "load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold",
    ),
    "checkpoints and reports": (
        "save_steps", "save_total_limit", "resume_from_checkpoint", "ignore_checkpoints",
        "force_resume", "logging_steps", "report_to", "disable_tqdm",
    ),
    "device, speed and seeds": (
        "device", "use_cpu", "bf16", "fp16", "device_map", "fsdp", "gradient_checkpointing",
        "batch_size", "per_device_eval_batch_size", "dataloader_num_workers", "seed", "data_seed",
    ),
}  # fmt: skip
TITLES = {name: title for title, names in GROUPS.items() for name in names}
PLACES = {name: place for place, name in enumerate(TITLES)}
