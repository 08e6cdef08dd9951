#!/usr/bin/env bash
#SBATCH --job-name=distribution_generalization
#SBATCH --array=0-6
#SBATCH --output=%x-%A_%a.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Distribution generalization on a Slurm cluster, one array task per GLUE task:
#   sbatch scripts/slurm/array.sh            (from the repository root; add --gres, --partition, --time)
# Two minutes before its time is over a task gets USR1, saves, and is requeued where it stopped.

: "${tasks:=cola sst2 mrpc stsb mnli qnli rte}"   # as many as --array has

cd "$SLURM_SUBMIT_DIR" || exit 2
source exps/common.sh

read -ra list <<<"$tasks"
child exps/composition_for_distribution_generalization/run_all.sh "tasks=${list[$SLURM_ARRAY_TASK_ID]}"
