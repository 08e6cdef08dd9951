#!/usr/bin/env bash
# Make the environment if needed and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

# The tests need no network; these turn an accidental look-up into an immediate error.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# One process per core, at most four, each with one thread; -n 0 runs the tests in this one.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -q -n logical --maxprocesses 4 --dist worksteal "$@"
