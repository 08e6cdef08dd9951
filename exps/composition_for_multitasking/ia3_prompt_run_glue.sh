#!/usr/bin/env bash
#SBATCH --job-name=ia3_prompt_run_glue
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train an (IA)^3 module on one task, text to text: the row in the task's prompt, the answer as words.
# The reference's example: t5-base, RTE, rate 5e-4, batch 4 on two GPUs, 150 steps. Vectors start at
# one and need a larger rate than factors do.

: "${model_name_or_path:=t5-base}"        # directory or hub name; flan-t5-small: see pem offline list
: "${task_name:=rte}"                     # a GLUE task, snli, or a domain of sentiment
: "${data_dir:=}"                         # folder of local files; empty: by name (hub, package index)
: "${prompt:=}"                           # template by name or JSON file; empty: the task's own
: "${samples:=}"                          # training rows, stratified; empty: all
: "${validation_size:=500}"               # of the training rows, to select on
: "${split_seed:=42}"
: "${seed:=42}"
: "${ia3_placement:=peft}"                 # peft (the paper's) or reference (its released code's)
: "${learning_rate:=2e-3}"
: "${max_steps:=1500}"
: "${per_device_train_batch_size:=8}"
: "${max_seq_length:=512}"
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${eval_steps:=0}"                      # 0: no evaluation while training, the last step is kept
: "${extra_flags:=}"                      # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_multitasking
source "$here/common.sh"

train_prompted ia3 --ia3_placement "$ia3_placement"
