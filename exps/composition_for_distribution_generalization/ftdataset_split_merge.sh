#!/usr/bin/env bash
#SBATCH --job-name=ftdataset_split_merge
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Merge the two halves' fully fine-tuned models at every point of a grid and score each.
# The reference loops `for set0 in $(seq 0 50 100)`; the grid 0 0.5 1 is those points. A difference of
# whole models has one space: the sum of tensors is the sum of updates.

: "${model_name_or_path:=roberta-base}"
: "${task_name:=rte}"
: "${seed:=42}"
: "${grid:=0 0.05 1}"                      # START STEP STOP: weights (t, 1 - t) of halves 0 and 1
: "${space:=parameter}"
: "${max_seq_length:=128}"
: "${test_file:=}"                         # report on; empty: the task's own validation rows
: "${max_eval_samples:=}"                  # score only N rows of each, stratified; empty: all
: "${controls:=true}"                      # rows of what the selected merge has to beat
: "${bf16:=false}"                        # true: compute in bfloat16, where the processor has it

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_distribution_generalization
source "$here/common.sh"

sweep_halves fft
