#!/usr/bin/env bash
#SBATCH --job-name=run_glue
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train one module on a task's whole training set and evaluate it on the task's dev rows.
# The reference's values: roberta-base, LoRA, rate 1e-4, batch 32, 200 epochs of 1,000 MNLI rows,
# evaluation every 16 steps.

: "${model_name_or_path:=roberta-base}"   # directory or hub name; minilm: see pem offline list
: "${task_name:=rte}"                      # cola sst2 mrpc stsb qqp mnli qnli rte wnli
: "${data_dir:=}"                          # folder of local GLUE files; empty: by name from the hub
: "${adapter_config:=lora}"                # lora, ia3 or fft
: "${learning_rate:=1e-4}"
: "${num_train_epochs:=20}"
: "${per_device_train_batch_size:=32}"
: "${max_seq_length:=128}"
: "${seed:=42}"
: "${extra_flags:=}"                       # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps
source "$here/common.sh"

run=glue/$(basename "$model_name_or_path")/$task_name/$adapter_config-s$seed
mapfile -t place < <(optional --data_dir "$data_dir")
# shellcheck disable=SC2086  # extra_flags holds several words
step "$run" "$PYTHON" -m pem_composition train \
  --model_name_or_path "$model_name_or_path" --task_name "$task_name" "${place[@]}" \
  --adapter_config "$adapter_config" --learning_rate "$learning_rate" \
  --num_train_epochs "$num_train_epochs" --max_seq_length "$max_seq_length" \
  --per_device_train_batch_size "$per_device_train_batch_size" --seed "$seed" \
  --output_dir "$OUT/$run" $extra_flags
