#!/usr/bin/env bash
#SBATCH --job-name=lora_polarity_lm
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train a LoRA language model of a domain: reviews joined and cut into blocks, block i read, block i + 1 written.
# The paper's t5-base: rate 5e-4, batch 128, one epoch, r 8.

: "${model_name_or_path:=t5-base}"        # directory or hub name; flan-t5-small: see pem offline list
: "${domain:=yelp_polarity}"              # a task of reviews, or a folder of data_dir
: "${data_dir:=}"                         # folder of local domains; one that is not there: by name
: "${samples:=}"                          # training rows, stratified; empty: all
: "${validation_size:=500}"               # of the training rows, to select on
: "${split_seed:=42}"
: "${seed:=42}"
: "${lora_r:=8}"
: "${lora_alpha:=8}"
: "${lora_dropout:=0.1}"
: "${learning_rate:=5e-4}"
: "${max_steps:=1500}"
: "${per_device_train_batch_size:=32}"
: "${block_size:=128}"                     # tokens
: "${text_file:=}"                          # reviews, labels unused; empty: the training rows
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${eval_steps:=0}"                      # 0: no evaluation while training, the last step is kept
: "${extra_flags:=}"                      # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_domain_transfer
source "$here/common.sh"

train_language lora --lora_r "$lora_r" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout"
