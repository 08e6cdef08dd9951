#!/usr/bin/env bash
#SBATCH --job-name=split_data
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Two halves of a training set with different class shares, and validation rows carved out before.
# The paper's rule: a share (80 %) of the key class's rows goes to half 0, the rest to half 1, and the
# other classes fill both halves to equal size. Writes half-0, half-1, all, validation, and test
# (the task's own validation rows, for reporting) .jsonl.

: "${task_name:=rte}"        # cola sst2 mrpc stsb qqp mnli qnli rte wnli, or rotten_tomatoes
: "${data_dir:=}"            # folder of local GLUE files; empty: by name (hub, or package index)
: "${key_class:=}"           # word or number; empty: the task's class 0
: "${share:=0.8}"
: "${samples:=}"             # rows of both halves together; empty: all
: "${validation_size:=500}"
: "${split_seed:=42}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_distribution_generalization
source "$here/common.sh"

mapfile -t choice < <(
  optional --data_dir "$data_dir" && optional --key_class "$key_class" && optional --samples "$samples"
)
step "$experiment/split/$task_name" "$PYTHON" -m pem_composition split \
  --task_name "$task_name" "${choice[@]}" --share "$share" --validation_size "$validation_size" \
  --seed "$split_seed" --output_dir "$data" --overwrite
