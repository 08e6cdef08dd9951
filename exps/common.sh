# shellcheck shell=bash
# Shared by the experiment scripts; source it first. Paths are relative to the repository root.
#
#   OUT      where results go (outputs)
#   SEEDS    seeds of run_all.sh ("42 43 44")
#   DRY_RUN  1: print the commands instead of running them
#   PYTHON   interpreter (.venv/bin/python if it is there, else python3)
#
# `bash exps/.../run_all.sh --slurm [SBATCH FLAG...]` submits what would be run as arrays of jobs (jobs.py).
#
# Every program skips work it has finished with the same flags and inputs, and takes up what was
# interrupted; so a script can simply be run again, and an edited value redoes only what depends on it.

set -euo pipefail
program=$0
if [[ $program != /* ]]; then program=$PWD/$program; fi
cd "${BASH_SOURCE[0]%/*}/.." # no substitution where a signal may come: its child would run the trap
: "${OUT:=outputs}" "${SEEDS:=42 43 44}" "${DRY_RUN:=0}"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
export OUT SEEDS DRY_RUN PYTHON

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
# After a signal the code is EXIT_PREEMPTED, whatever the command's: there is no time for more, and bash
# (5.2) can lose the end of a command while a trap interrupts the wait, and would then wait for ever.
attended() {
  local child='' code=0 passed=''
  pass_on
  "$@" &
  child=$!
  if [[ -n $passed ]]; then pass "$passed"; fi
  wait "$child" || code=$?
  between_steps
  if [[ -n $passed ]]; then
    pass_on
    while kill -0 "$child" 2>/dev/null; do sleep 0.1 || true; done
    between_steps
    code=$EXIT_PREEMPTED
  fi
  return "$code"
}

# pass_on: from now on signals go to $child.
pass_on() {
  trap 'pass USR1' USR1
  trap 'pass TERM' TERM INT
}

# pass SIGNAL: send the signal, if there is a process by now.
pass() {
  passed=$1
  if [[ -n $child ]]; then kill -"$1" "$child" 2>/dev/null || true; fi
}

# Between two commands a signal finds nothing to save.
between_steps() {
  trap 'requeue; exit "$EXIT_PREEMPTED"' USR1 TERM INT
}

# step NAME COMMAND...: run the command, keep its output in OUT/logs/NAME.log and its exit code.
step() {
  local name=$1 code=0 command found log writer state=
  if [[ -n ${PEM_JOBS:-} ]]; then
    noted step "$@"
    return
  fi
  shift
  printf -v command '%q ' "$@"
  echo "$command"
  if [[ $DRY_RUN == 1 ]]; then return; fi
  if [[ -n ${PEM_LIST:-} ]]; then claim "$name"; fi
  if [[ -n $state ]] && read -r found <"$state" && [[ $found == "${command% }" ]]; then
    echo "done by another job of this list"
    exec {claimed}>&-
    return
  fi
  log=$OUT/logs/$name.log
  mkdir -p "${log%/*}"
  # Not a pipe: the command must be this shell's own child to get its signals. The log outlives them.
  exec {log}> >(trap '' TERM USR1 && exec tee -ia "$OUT/logs/$name.log")
  writer=$!
  attended "$@" >&"$log" 2>&1 || code=$?
  exec {log}>&-
  wait "$writer" || true
  if ((code == EXIT_PREEMPTED)); then requeue; fi
  if ((code)); then
    echo "step $name: exit code $code, log in $OUT/logs/$name.log" >&2
    exit "$code"
  fi
  if [[ -n $state ]]; then
    echo "$command" >"$state"
    exec {claimed}>&-
  fi
}

# claim NAME: wait until no other job of the list is at this step, which several have in common (the
# rows of a task, an initial module); sets state, the file that holds the step's command once it is done.
claim() {
  local code=0
  state=$PEM_LIST.steps/${1//\//-}
  exec {claimed}>>"$state"
  attended flock "$claimed" || code=$?
  if ((code == EXIT_PREEMPTED)); then
    requeue
    exit "$code"
  fi
  if ((code)); then
    echo "step $1: $state cannot be locked; expected a file system whose locks hold between machines" >&2
    exit "$code"
  fi
}

# noted step|child WORD...: note for exps/jobs.py what would be run, and with which variables.
noted() {
  {
    printf '%s\0' "$#" "$@"
    env -0
    printf '\0'
  } >>"$PEM_JOBS"
}

# Give the job back to Slurm, which starts the same script again; outside Slurm, say how to go on.
# A script that another one called leaves it to that one.
requeue() {
  if [[ -n ${PEM_CALLED:-} ]]; then return; fi
  if [[ -n ${SLURM_JOB_ID:-} ]] && command -v scontrol >/dev/null; then
    # The last task of an array has the array's number as its SLURM_JOB_ID, which names all its tasks.
    local job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    echo "preempted: requeueing job $job" >&2
    scontrol requeue "$job" || true
  else
    echo "preempted: run the same command again to go on from the last checkpoint" >&2
  fi
}

# child SCRIPT [NAME=VALUE...]: run another experiment script with these variables.
child() {
  local script=$1 code=0
  if [[ -n ${PEM_JOBS:-} ]]; then
    noted child "$@"
    return
  fi
  shift
  attended env PEM_CALLED=1 "$@" bash "$script" || code=$?
  if ((code == EXIT_PREEMPTED)); then requeue; fi
  if ((code)); then exit "$code"; fi
}

# optional FLAG VALUE: the two words, or nothing where the value is empty; read with mapfile.
optional() {
  if [[ -n $2 ]]; then printf '%s\n' "$1" "$2"; fi
}

# report_on TABLE RUN...: results of several runs as one table, the mean and the spread between them.
report_on() {
  local run folders=()
  for run in "${@:2}"; do folders+=("$OUT/$run"); done
  if ((${#folders[@]} > 1)); then
    step "$1" "$PYTHON" -m pem_composition report --results "${folders[@]}" --save_path "$OUT/$1"
  fi
}

between_steps

if [[ ${1:-} == --slurm && -z ${scripts:-} ]]; then
  exec "$PYTHON" -m exps.jobs "$program" "${@:2}"
fi

# Once, in the script that was started: a misspelt hyperparameter would change nothing and say nothing.
if [[ -z ${PEM_HYPERPARAMETERS:-} && -f $program ]]; then
  "$PYTHON" -m exps.hyperparameters "$program" "${scripts:-}" "$@" || exit "$?"
  export PEM_HYPERPARAMETERS=checked
fi
