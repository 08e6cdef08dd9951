#!/usr/bin/env bash
#SBATCH --job-name=many_tasks_joint
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train one module on the rows of all tasks together, with a head that has a part for each: what sees
# all data at once, a row of the table of merges.

: "${model_name_or_path:=roberta-base}"    # directory or hub name; granite-roberta-30m: pem offline list
: "${tasks:=rte mnli snli qqp sst2 cola stsb}"
: "${adapter_config:=lora}"                # lora or ia3
: "${joint:=one}"                          # one: the steps of one module; all: those of all modules
: "${data_dir:=}"                          # folder of local files; empty: by name
: "${samples:=}"                           # training rows of each task, stratified; empty: all
: "${validation_size:=500}"                # of the training rows, to select on
: "${split_seed:=42}"
: "${seed:=42}"
: "${lora_r:=8}"
: "${lora_alpha:=16}"
: "${lora_dropout:=0}"
: "${probe=2000}"                          # which modules it stands beside; its own head is drawn
: "${learning_rate:=}"                     # empty: 2e-3 for LoRA, 1e-2 for (IA)^3
: "${max_steps:=1500}"                     # of one module
: "${per_device_train_batch_size:=16}"
: "${max_seq_length:=64}"
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${extra_flags:=}"                       # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_of_many_tasks
source "$here/common.sh"
words joint one all
words adapter_config lora ia3

train_joint
