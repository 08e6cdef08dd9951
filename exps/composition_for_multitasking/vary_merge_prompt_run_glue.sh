#!/usr/bin/env bash
#SBATCH --job-name=vary_merge_prompt_run_glue
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Merge the modules of two tasks, or of more, at every point of a grid and score each on all tasks.
# Two modules: weights (t, 1 - t), curves and the frontier of one task against the other. Three and
# more: grid="0 0.25 1" are all weights in steps of 0.25 that sum to 1. Best by the mean over the tasks.

: "${model_name_or_path:=t5-base}"
: "${tasks:=mnli rte}"
adapter_config=${methods:-${adapter_config:-lora ia3 fft}} # one sweep each, in one process
: "${seed:=42}"
: "${grid:=0 0.05 1}"
: "${space:=parameter delta}"              # the paper's sum of tensors, the exact sum of updates
: "${prompt:=}"                            # template for all tasks, or one per task; empty: their own
: "${max_seq_length:=512}"
: "${max_invalid:=0.1}"                   # a row of the best point with so few invalid answers; 1: off
: "${max_eval_samples:=}"                  # score only N rows of each, stratified; empty: all
: "${controls:=true}"                      # rows of what the selected merge has to beat
: "${bf16:=false}"                        # true: compute in bfloat16, where the processor has it

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_multitasking
source "$here/common.sh"

words adapter_config lora ia3 fft
for method in $adapter_config; do sweep_tasks "$method"; done
