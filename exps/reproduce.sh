#!/usr/bin/env bash
# Measure one row of a table in docs/results again, from nothing, and compare:
#   bash exps/reproduce.sh halves/minilm-sst2-lora-42        (python scripts/results.py list TABLE)
# Rows whose command needs data say so: GLUE is a folder with one folder per task (SNLI among them), REVIEWS one
# with a folder per domain, PAIRS one with toxic.jsonl and nontoxic.jsonl; CIVIL_COMMENTS, ALPACA and RTP
# (RealToxicityPrompts) are files.
# Exit code 1 where a value differs by more than its error allows.

here=$(dirname "${BASH_SOURCE[0]}")
scripts=exps # it takes a row as argument, and no hyperparameters of its own
source "$here/common.sh"

if (($# != 1)) || [[ ! -e scripts/results.py ]]; then
  echo "reproduce.sh: expected one row, in a clone of the repository (python scripts/results.py list)" >&2
  exit 2
fi
mapfile -t found < <("$PYTHON" scripts/results.py command "$1")
if ((${#found[@]} != 2)); then exit 2; fi
export OUT=$OUT/reproduce
unset PEM_HYPERPARAMETERS # the script that is called checks its own
for name in GLUE REVIEWS PAIRS CIVIL_COMMENTS ALPACA RTP TEXTS; do
  if [[ ${found[0]} != *"\$$name"* ]]; then unset "$name"; fi # PAIRS is another script's mistyped pairs
done
step "reproduce-${1//\//-}" bash -euc "pem() { \"\$PYTHON\" -m pem_composition \"\$@\"; }; ${found[0]}"
if [[ $DRY_RUN == 1 ]]; then exit; fi
"$PYTHON" scripts/results.py compare "$1" "$OUT/${found[1]}"
