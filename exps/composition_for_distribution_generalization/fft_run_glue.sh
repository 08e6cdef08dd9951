#!/usr/bin/env bash
#SBATCH --job-name=fft_run_glue
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Fine-tune the whole model on one half of a task's training set (split_data.sh makes the halves).
# The paper's grid, roberta-base: learning_rate {1e-5 5e-5 1e-4 5e-4 1e-3}, max_steps {1500 3000},
# batch size 32, weight decay 0.01.

: "${model_name_or_path:=roberta-base}"   # directory or hub name; minilm: see pem offline list
: "${task_name:=rte}"
: "${half:=0}"                             # 0, 1, or all for both halves together
: "${seed:=42}"
: "${learning_rate:=5e-5}"
: "${max_steps:=1500}"
: "${per_device_train_batch_size:=32}"
: "${max_seq_length:=128}"
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${eval_steps:=100}"                     # 0: no evaluation while training, the last step is kept
: "${extra_flags:=}"                       # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_distribution_generalization
source "$here/common.sh"

train_half fft
