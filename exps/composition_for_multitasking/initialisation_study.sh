#!/usr/bin/env bash
#SBATCH --job-name=initialisation_study
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# What it is worth that all modules start from the same numbers: the experiment with one initial module
# per seed and with one per module, and how far each module moved from its own (pem inspect --init).
# Takes the values of run_all.sh.

: "${model_name_or_path:=t5-base}"
: "${tasks:=mnli rte}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_multitasking
source "$here/common.sh"
export model_name_or_path tasks

here=exps/composition_for_multitasking # common.sh has gone to the repository root
for same_init in 1 0; do
  child "$here/run_all.sh" methods=lora same_init="$same_init"
  # shellcheck disable=SC2086  # tasks holds several words
  for seed in $SEEDS; do show_drift lora $tasks; done
done
