#!/usr/bin/env bash
#SBATCH --job-name=multitasking
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# The whole experiment: for each method and seed, train on each task and sweep the merges. Every value
# of the scripts called here can be set in the environment as well, e.g.
#   tasks="sst2 cola" methods=lora model_name_or_path=flan-t5-small bash .../run_all.sh
# A rate given as learning_rate holds for every method; unset, each method's script has its own.

: "${model_name_or_path:=t5-base}"
: "${tasks:=mnli rte}"
: "${methods:=lora ia3 fft}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_multitasking
source "$here/common.sh"
export model_name_or_path tasks
words methods lora ia3 fft

here=exps/composition_for_multitasking # common.sh has gone to the repository root
for method in $methods; do
  for seed in $SEEDS; do
    for task_name in $tasks; do
      child "$here/${method}_prompt_run_glue.sh" task_name="$task_name" seed="$seed"
    done
    child "$here/vary_merge_prompt_run_glue.sh" adapter_config="$method" methods= seed="$seed"
  done
  seed=${SEEDS%% *}
  report_seeds "$(merged_run "$method")"
done
