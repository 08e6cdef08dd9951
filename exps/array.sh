#!/usr/bin/env bash
#SBATCH --output=%x-%A_%a.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# One job of a list: task N runs line N. `bash exps/.../run_all.sh --slurm` writes the list and submits
# this. Two minutes before its time is over a task gets USR1, saves, and is requeued where it stopped.

trap 'early=1' USR1 TERM # what common.sh does about signals it does only from its end on
cd "$SLURM_SUBMIT_DIR" || exit 2
mapfile -t lines <"$1"
export OUT=${1%/jobs/*} PEM_LIST=$1 PEM_HYPERPARAMETERS=checked
source exps/common.sh
if [[ -n ${early:-} ]]; then requeue && exit "$EXIT_PREEMPTED"; fi
eval "${lines[$SLURM_ARRAY_TASK_ID]}"
