#!/usr/bin/env bash
#SBATCH --job-name=ia3_polarity_classify
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train an (IA)^3 classifier of a domain's reviews: the text as it is, the answer negative or positive.
# The paper's t5-base and t5-small: rate 2e-3, batch 128.

: "${model_name_or_path:=t5-base}"        # directory or hub name; flan-t5-small: see pem offline list
: "${domain:=yelp_polarity}"              # a task of reviews, or a folder of data_dir
: "${data_dir:=}"                         # folder of local domains; one that is not there: by name
: "${samples:=}"                          # training rows, stratified; empty: all
: "${validation_size:=500}"               # of the training rows, to select on
: "${split_seed:=42}"
: "${seed:=42}"
: "${ia3_placement:=peft}"                 # peft (the paper's) or reference (its released code's)
: "${learning_rate:=2e-3}"
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

train_classifier ia3 --ia3_placement "$ia3_placement"
