#!/usr/bin/env bash
#SBATCH --job-name=many_tasks_fft
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Fine-tune the whole model and a head on one task.

: "${model_name_or_path:=roberta-base}"    # directory or hub name; granite-roberta-30m: pem offline list
: "${task_name:=rte}"                      # a GLUE task or snli
: "${data_dir:=}"                          # folder of local files; empty: by name
: "${samples:=}"                           # training rows, stratified; empty: all
: "${validation_size:=500}"                # of the training rows, to select on
: "${split_seed:=42}"
: "${seed:=42}"
: "${probe=2000}"                          # rows that the head is fitted on first; empty: it is drawn
: "${learning_rate:=5e-5}"
: "${max_steps:=1500}"
: "${per_device_train_batch_size:=16}"
: "${max_seq_length:=64}"
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${extra_flags:=}"                       # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_of_many_tasks
source "$here/common.sh"

train_task fft
