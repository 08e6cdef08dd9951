#!/usr/bin/env bash
#SBATCH --job-name=distribution_generalization
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# The whole experiment: for each task, method and seed, train on half 0, half 1 (and all rows) and
# sweep the merges. Every value of the scripts called here can be set in the environment as well, e.g.
#   tasks="rte sst2" methods=lora model_name_or_path=roberta-base bash .../run_all.sh
# A rate given as learning_rate holds for every method; unset, each method's script has its own.

: "${model_name_or_path:=roberta-base}"
: "${tasks:=cola sst2 mrpc stsb mnli qnli rte}"
: "${methods:=lora ia3 fft}"
: "${halves:=all 0 1}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_distribution_generalization
source "$here/common.sh"
export model_name_or_path
words methods lora ia3 fft
words halves all 0 1

here=exps/composition_for_distribution_generalization # common.sh has gone to the repository root
for task_name in $tasks; do
  child "$here/split_data.sh" task_name="$task_name"
  for method in $methods; do
    merge=dataset_split_merge.sh
    if [[ $method == fft ]]; then merge=ftdataset_split_merge.sh; fi
    for seed in $SEEDS; do
      for half in $halves; do
        child "$here/${method}_run_glue.sh" task_name="$task_name" half="$half" seed="$seed"
      done
      child "$here/$merge" task_name="$task_name" adapter_config="$method" seed="$seed"
    done
    report_seeds "$method"
  done
done
