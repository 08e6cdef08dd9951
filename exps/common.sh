# shellcheck shell=bash
# Shared by the experiment scripts; source it first. Paths are relative to the repository root.
#
#   OUT      where results go (outputs)
#   SEEDS    seeds of run_all.sh ("42 43 44")
#   DRY_RUN  1: print the commands instead of running them
#   PYTHON   interpreter (.venv/bin/python if it is there, else python3)
#
# Every program skips work it has finished with the same flags and inputs, and takes up what was
# interrupted; so a script can simply be run again, and an edited value redoes only what depends on it.

set -euo pipefail
program=$0
if [[ $program != /* ]]; then program=$PWD/$program; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${OUT:=outputs}" "${SEEDS:=42 43 44}" "${DRY_RUN:=0}"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
export OUT SEEDS DRY_RUN PYTHON

# Once, in the script that was started: a misspelt hyperparameter would change nothing and say nothing.
if [[ -z ${PEM_HYPERPARAMETERS:-} && -f $program ]]; then
  "$PYTHON" -m exps.hyperparameters "$program" "${scripts:-}" "$@" || exit "$?"
  export PEM_HYPERPARAMETERS=checked
fi

# words NAME WORD...: every word of the variable must be one of these.
words() {
  local name=$1 word known
  shift
  known=$(printf ' or %s' "$@")
  for word in ${!name}; do
    if [[ " $* " != *" $word "* ]]; then
      echo "${program##*/}: $name: found '$word', expected${known# or}" >&2
      exit 2
    fi
  done
}

EXIT_PREEMPTED=75

# attended COMMAND...: run it so that a signal to this script reaches it, and return its exit code.
# Slurm sends USR1 to the batch shell only (--signal=B:USR1@120), and bash delivers a trapped signal
# during `wait`, not while a foreground command runs. Ctrl-C becomes TERM: training then saves.
# A command that died of the signal was not yet able to note it; that is EXIT_PREEMPTED, too.
attended() {
  local child='' code caught=0 passed=''
  trap 'caught=1 passed=USR1; pass "$child" USR1' USR1
  trap 'caught=1 passed=TERM; pass "$child" TERM' TERM INT
  "$@" &
  child=$!
  if ((caught)); then pass "$child" "$passed"; fi
  while
    caught=0 code=0
    wait "$child" || code=$?
    ((caught))
  do :; done
  between_steps
  killed=0
  if [[ -n $passed ]] && ((code == 128 + $(kill -l USR1) || code == 128 + $(kill -l TERM))); then
    killed=1 code=$EXIT_PREEMPTED
  fi
  return "$code"
}

# pass PID SIGNAL: send the signal, if there is a process by now.
pass() {
  if [[ -n $1 ]]; then kill -"$2" "$1" 2>/dev/null || true; fi
}

# Between two commands a signal finds nothing to save.
between_steps() {
  trap 'requeue; exit "$EXIT_PREEMPTED"' USR1 TERM INT
}

# step NAME COMMAND...: run the command, keep its output in OUT/logs/NAME.log and its exit code.
step() {
  local name=$1 code=0 log writer
  shift
  printf '%q ' "$@"
  printf '\n'
  if [[ $DRY_RUN == 1 ]]; then return; fi
  mkdir -p "$(dirname "$OUT/logs/$name.log")"
  # Not a pipe: the command must be this shell's own child to get its signals.
  exec {log}> >(exec tee -ia "$OUT/logs/$name.log")
  writer=$!
  attended "$@" >&"$log" 2>&1 || code=$?
  exec {log}>&-
  wait "$writer" || true
  if ((code == EXIT_PREEMPTED)); then requeue; fi
  if ((code)); then
    echo "step $name: exit code $code, log in $OUT/logs/$name.log" >&2
    exit "$code"
  fi
}

# Give the job back to Slurm, which starts the same script again; outside Slurm, say how to go on.
requeue() {
  if [[ -n ${SLURM_JOB_ID:-} ]] && command -v scontrol >/dev/null; then
    echo "preempted: requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID" || true
  else
    echo "preempted: run the same command again to go on from the last checkpoint" >&2
  fi
}

# child SCRIPT [NAME=VALUE...]: run another experiment script with these variables.
child() {
  local script=$1 code=0
  shift
  attended env "$@" bash "$script" || code=$?
  if ((killed)); then requeue; fi # the script has not
  if ((code)); then exit "$code"; fi
}

# optional FLAG VALUE: the two words, or nothing where the value is empty; read with mapfile.
optional() {
  if [[ -n $2 ]]; then printf '%s\n' "$1" "$2"; fi
}

between_steps
