#!/usr/bin/env bash
#SBATCH --job-name=vary_merge_analogy
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Move a classifier to another domain at every point of a grid and score each there, in one process:
#   t * classifier of source + (1 - t) * (language model of target - language model of source)
# The reference's weights t: 0.84 0.86 0.88 0.90 0.92 0.94 1.

: "${model_name_or_path:=t5-base}"
: "${source:=yelp_polarity}"
: "${target:=amazon_polarity}"
: "${data_dir:=}"                          # as in the training scripts
: "${adapter_config:=lora}"                # lora, ia3 or fft
: "${seed:=42}"
: "${language_step:=}"                     # checkpoint of the language models (--save_steps); empty: the last
: "${grid:=0 0.1 1 0.8 0.02 1}"            # ranges START STEP STOP of t, together
: "${space:=parameter delta}"              # the paper's sum of tensors, the exact sum of updates
: "${max_seq_length:=128}"
: "${max_invalid:=0.1}"                   # a row of the best point with so few invalid answers; 1: off
: "${controls:=true}"                      # rows of what the selected analogy has to beat
: "${max_eval_samples:=}"                  # score only N rows of each, stratified; empty: all
: "${bf16:=false}"                        # true: compute in bfloat16, where the processor has it

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_domain_transfer
source "$here/common.sh"

sweep_analogy "$adapter_config" "$source" "$target"
