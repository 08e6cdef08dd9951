#!/usr/bin/env bash
#SBATCH --job-name=lora_polarity_classify
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train a LoRA classifier of a domain's reviews: the text as it is, the answer negative or positive.
# The paper's t5-base: rate 5e-4, batch 128, one epoch, dropout 0.1, r 8; t5-small: rate 8e-4, r 32.

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
: "${max_seq_length:=128}"
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${eval_steps:=0}"                      # 0: no evaluation while training, the last step is kept
: "${extra_flags:=}"                      # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_domain_transfer
source "$here/common.sh"

train_classifier lora --lora_r "$lora_r" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout"
