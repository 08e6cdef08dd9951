# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the scripts of this folder: classifiers and language models of a domain, the analogies.

# shellcheck source=exps/text_to_text.sh
source "$(dirname "${BASH_SOURCE[0]}")/../text_to_text.sh"

experiment=domain_transfer

# task_of DOMAIN: its task. A folder of that name in data_dir holds reviews, of whatever origin.
task_of() {
  if [[ -n $data_dir && -d $data_dir/$1 ]]; then echo polarity; else echo "$1"; fi
}

# split_domain: the rows of $domain.
split_domain() {
  local from
  from=(--task_name "$(task_of "$domain")")
  if [[ ${from[1]} != "$domain" ]]; then from+=(--data_dir "$data_dir/$domain"); fi
  split_rows "$domain" "${from[@]}"
}

# train_classifier METHOD MODULE...: reviews of $domain as they are, answered negative or positive.
train_classifier() {
  local method=$1 what
  shift
  split_domain
  # shellcheck disable=SC2034  # read by train_text
  what=(
    --task_name "$(task_of "$domain")" --prompt polarity
    --train_file "$(rows_of "$domain")/all.jsonl"
    --validation_file "$(rows_of "$domain")/validation.jsonl" --max_seq_length "$max_seq_length"
  )
  train_text "$method" "$domain-cls" "$@"
}

# train_language METHOD MODULE...: the reviews of $domain without labels, block i read, i + 1 written.
train_language() {
  local method=$1 what
  shift
  split_domain
  # shellcheck disable=SC2034  # read by train_text
  what=(
    --target next_block --block_size "$block_size"
    --train_file "${text_file:-$(rows_of "$domain")/all.jsonl}"
    --validation_file "$(rows_of "$domain")/validation.jsonl"
  )
  train_text "$method" "$domain-lm" "$@"
}

# language_model METHOD DOMAIN: its folder, or with language_step that of its checkpoint.
language_model() {
  echo "$OUT/$(run_of "$1" "$2-lm")${language_step:+/checkpoint-$language_step}"
}

# transfer_run METHOD SOURCE TARGET: name of the sweep.
transfer_run() {
  run_of "$1" "$2-to-$3${language_step:+-lm-$language_step}"
}

# sweep_analogy METHOD SOURCE TARGET: t * SOURCE classifier + (1 - t) * (TARGET LM - SOURCE LM) on the
# reviews of TARGET; TARGET's own classifier, where there is one, is a row of the table.
sweep_analogy() {
  local method=$1 source=$2 target=$3 run own rest=()
  run=$(transfer_run "$method" "$source" "$target")
  own=$OUT/$(run_of "$method" "$target-cls")
  if [[ -e $own/all_results.json || $DRY_RUN == 1 ]]; then rest+=(--reference_module "$own"); fi
  if [[ -n $max_eval_samples ]]; then rest+=(--max_eval_samples "$max_eval_samples"); fi
  # shellcheck disable=SC2086  # grid and space hold several words
  step "$run" "$PYTHON" -m pem_composition analogy --adapters "$OUT/$(run_of "$method" "$source-cls")" \
    "$(language_model "$method" "$target")" "$(language_model "$method" "$source")" \
    --save_path "$OUT/$run" --grid $grid --evaluate --space $space --objective seq2seq \
    --model_name_or_path "$model_name_or_path" --task_name "$(task_of "$target")" \
    --prompt polarity --validation_file "$(rows_of "$target")/validation.jsonl" \
    --test_file "$(rows_of "$target")/test.jsonl" --max_seq_length "$max_seq_length" \
    --max_invalid "$max_invalid" --controls "$controls" --bf16 "$bf16" "${rest[@]}"
}
