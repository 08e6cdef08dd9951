#!/usr/bin/env bash
#SBATCH --job-name=dataset_split_merge
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Merge the two halves' modules at every point of a grid and score each, in one process.
# The reference loops `for set0 in $(seq 0 20 100)` over merge.py --search_step $set0 $((100 - set0))
# and run_glue.py --do_eval; the grid 0 0.2 1 is those points.

: "${model_name_or_path:=roberta-base}"
: "${task_name:=rte}"
: "${adapter_config:=lora}"                # lora or ia3
: "${seed:=42}"
: "${grid:=0 0.05 1}"                      # START STEP STOP: weights (t, 1 - t) of halves 0 and 1
: "${space:=parameter delta}"              # the paper's sum of tensors, the exact sum of updates
: "${max_seq_length:=128}"
: "${test_file:=}"                         # report on; empty: the task's own validation rows
: "${max_eval_samples:=}"                  # score only N rows of each, stratified; empty: all
: "${controls:=true}"                      # rows of what the selected merge has to beat
: "${bf16:=false}"                        # true: compute in bfloat16, where the processor has it

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_distribution_generalization
source "$here/common.sh"

sweep_halves "$adapter_config"
