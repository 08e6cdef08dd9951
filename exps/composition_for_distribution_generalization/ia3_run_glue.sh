#!/usr/bin/env bash
#SBATCH --job-name=ia3_run_glue
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train an (IA)^3 module on one half of a task's training set (split_data.sh makes the halves).
# The paper's grid, roberta-base: learning_rate {1e-5 5e-5 1e-4 5e-4 1e-3}, max_steps {1500 3000},
# batch size {16 32 64 128}, weight decay 0.01. Its checkpoint names show for RTE: rate 2e-2, 1500
# steps, batch 64; the vectors start at one and need a larger rate than factors do.

: "${model_name_or_path:=roberta-base}"   # directory or hub name; minilm: see pem offline list
: "${task_name:=rte}"
: "${half:=0}"                             # 0, 1, or all for both halves together
: "${seed:=42}"
: "${ia3_placement:=peft}"                 # peft (the paper's) or reference (its released code's)
: "${learning_rate:=2e-2}"
: "${max_steps:=1500}"
: "${per_device_train_batch_size:=64}"
: "${max_seq_length:=128}"
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${eval_steps:=100}"                     # 0: no evaluation while training, the last step is kept
: "${extra_flags:=}"                       # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_distribution_generalization
source "$here/common.sh"

train_half ia3 --ia3_placement "$ia3_placement"
