#!/usr/bin/env bash
# Make the environment if needed and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

# The tests need no network; these turn an accidental look-up into an immediate error.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# What is compiled is kept, the asserts of tests too: half of what every process needs to begin.
unset PYTHONDONTWRITEBYTECODE

# Folders of tests lie in memory where there is room for them and programs in it may run.
memory=/dev/shm
if [[ -z ${PYTEST_DEBUG_TEMPROOT:-} && -w $memory ]] &&
  (($(df -Pk "$memory" | awk 'END { print $4 }') > 4000000)) &&
  probe=$(mktemp "$memory/probe.XXXXXX"); then
  printf '#!/bin/sh\n' >"$probe" && chmod +x "$probe"
  if "$probe" 2>/dev/null; then export PYTEST_DEBUG_TEMPROOT=$memory; fi
  rm -f "$probe"
fi

# One process per core, at most four, each with one thread; -n 0 runs the tests in this one.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -q -n logical --maxprocesses 4 --dist worksteal "$@"
