#!/usr/bin/env bash
#SBATCH --job-name=fft
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Fine-tune the whole model on toxic text in order to subtract the change: research on removing
# abilities. The reference's gpt2-large: rate 1e-5, 5 epochs, batch 32, weight decay 0.01.

: "${model_name_or_path:=gpt2-large}"     # directory or hub name; smollm2-135m-instruct: pem offline list
: "${train_file:=}"                       # toxic texts, e.g. toxic_comments/toxic.jsonl; empty: civil_comments
: "${score_above:=0.8}"                   # of civil_comments
: "${seed:=42}"
: "${learning_rate:=1e-5}"
: "${num_train_epochs:=5}"
: "${max_steps:=}"                        # instead of the epochs
: "${per_device_train_batch_size:=2}"
: "${gradient_accumulation_steps:=16}"
: "${max_seq_length:=256}"                # tokens; longer texts are cut
: "${weight_decay:=0.01}"
: "${warmup_ratio:=0.06}"
: "${extra_flags:=}"                      # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_unlearning
source "$here/common.sh"

train_toxic fft
