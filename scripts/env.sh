#!/usr/bin/env bash
# Source this: it makes .venv (or brings it up to date) and sets PYTHON to its interpreter.
# A PYTHON that is set already is used as it is, without any installing.
# Nothing is done when setup.py, requirements.txt and constraints.txt are those of the last install,
# and it had the extras that are wanted: those in EXTRAS, or all that tests and docs need.
#
# torch is installed from the index pip is configured for. For the CPU build on a machine whose index
# carries several: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, as pip documents them.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The first interpreter that runs and is new enough; 3.11 first, because the constraints come from it.
find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "scripts/env.sh: no Python 3.11 or newer found; install one and put it on PATH" >&2
  return 2
}

# told WHAT COMMAND...: the command, with a line every five seconds, so that nobody thinks it hangs.
# A subshell: its clock stops with it, and an interactive shell reports no jobs.
told() (
  what=$1 self=$BASHPID
  shift
  echo "environment: $what"
  SECONDS=0
  while sleep 5 && kill -0 "$self" 2>/dev/null; do echo "environment: $what, $SECONDS s"; done &
  clock=$!
  trap 'kill "$clock" 2>/dev/null' EXIT
  "$@"
)

make_environment() {
  local venv=$repository/.venv python
  if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python) || return
    echo "environment: creating .venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
      rm -rf "$venv"
      echo "scripts/env.sh: $python -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2
      return 2
    fi
  fi
  python=$venv/bin/python

  # The path is part of the stamp: a moved clone has an editable install that points elsewhere.
  local stamp=$venv/.installed wanted extras=${EXTRAS:-plot search offline docs dev} had='' extra
  wanted=$(cd "$repository" && { pwd; cat setup.py requirements.txt constraints.txt; } |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [[ -e $stamp && $(head -n 1 "$stamp") == "$wanted" ]]; then
    had=" $(tail -n 1 "$stamp") "
    for extra in $extras; do
      if [[ $had != *" $extra "* ]]; then break; fi
      extra=
    done
    if [[ -z $extra ]]; then return; fi
    extras+=$had
  fi
  # shellcheck disable=SC2086  # several words
  extras=$(printf '%s\n' $extras | sort -u | paste -sd ' ')
  # pip compiles one file after the other; here all cores do, and what no program of ours imports as
  # a whole (tests, the hundreds of models) is left to the first import.
  local pip=("$python" -m pip install -qq --disable-pip-version-check --no-compile
    -c "$repository/constraints.txt")
  told "1/3 torch (the largest download)" "${pip[@]}" setuptools torch==2.13.0 || return
  told "2/3 the other packages" "${pip[@]}" --no-build-isolation \
    -e "${repository}[${extras// /,}]" || return
  # A file that does not compile is a template of its package, or fails where it is imported.
  told "3/3 compiling" "$python" -m compileall -qq -j 0 -x '/tests/|/transformers/models/' \
    "$venv"/lib/python*/site-packages || true
  printf '%s\n' "$wanted" "$extras" >"$stamp"
  echo "environment: ready, $venv"
}

if [[ -z ${PYTHON:-} ]]; then
  make_environment || return
  PYTHON=$repository/.venv/bin/python
fi
export PYTHON
