#!/usr/bin/env bash
#SBATCH --job-name=instruction_detoxification
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# The whole experiment: instruction module, toxic pairs, toxic module, table, and the table's mean over
# seeds. Every value of the scripts called here can be set in the environment, e.g. a small model:
#   model_name_or_path=smollm2-135m-instruct load_flags= extra_flags= instruction_file=alpaca.jsonl \
#     comments_file=comments.jsonl toxic_set=toxic.jsonl ordinary_set=ordinary.jsonl SEEDS=42 bash .../run_all.sh

: "${model_name_or_path:=huggyllama/llama-7b}"
adapter_config=${method:-${adapter_config:-lora}}

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_instruction_detoxification
source "$here/common.sh"
export model_name_or_path adapter_config

here=exps/composition_for_instruction_detoxification # common.sh has gone to the repository root
child "$here/process_civil_comments.sh"
tables=()
for seed in $SEEDS; do
  child "$here/finetune.sh" seed="$seed"
  child "$here/toxic_finetune.sh" seed="$seed"
  child "$here/generate.sh" seed="$seed"
  tables+=("$(table_run)")
done
report_on "$(of_model "$experiment")/$adapter_config-table" "${tables[@]}"
