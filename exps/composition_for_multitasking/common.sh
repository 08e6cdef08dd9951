# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the scripts of this folder: training on a task with its prompt, the sweep over merges.

# shellcheck source=exps/text_to_text.sh
source "$(dirname "${BASH_SOURCE[0]}")/../text_to_text.sh"

experiment=multitasking

# train_prompted METHOD MODULE...: train on $task_name, asked with its prompt.
train_prompted() {
  local method=$1 from=(--task_name "$task_name") what asked=()
  shift
  if [[ -n $data_dir ]]; then from+=(--data_dir "$data_dir"); fi
  split_rows "$task_name" "${from[@]}"
  if [[ -n $prompt ]]; then asked=(--prompt "$prompt"); fi
  # shellcheck disable=SC2034  # read by train_text
  what=(
    --task_name "$task_name" --train_file "$(rows_of "$task_name")/all.jsonl"
    --validation_file "$(rows_of "$task_name")/validation.jsonl" "${asked[@]}"
    --max_seq_length "$max_seq_length"
  )
  train_text "$method" "$task_name" "$@"
}

# merged_run METHOD: name of the sweep over the modules of $tasks.
merged_run() {
  run_of "$1" "merge-${tasks// /+}"
}

# sweep_tasks METHOD: score every merge of the modules of $tasks on all of them, in one process.
sweep_tasks() {
  local method=$1 task run modules=() validation=() test=() rest=()
  run=$(merged_run "$method")
  for task in $tasks; do
    modules+=("$OUT/$(run_of "$method" "$task")")
    validation+=("$(rows_of "$task")/validation.jsonl")
    test+=("$(rows_of "$task")/test.jsonl")
  done
  if [[ -n $max_eval_samples ]]; then rest+=(--max_eval_samples "$max_eval_samples"); fi
  # shellcheck disable=SC2206  # one prompt per word
  if [[ -n $prompt ]]; then rest+=(--prompt $prompt); fi
  # shellcheck disable=SC2086  # grid, space and tasks hold several words
  step "$run" "$PYTHON" -m pem_composition merge --adapters "${modules[@]}" --save_path "$OUT/$run" \
    --grid $grid --evaluate --space $space --objective seq2seq \
    --model_name_or_path "$model_name_or_path" --task_name $tasks \
    --validation_file "${validation[@]}" --test_file "${test[@]}" \
    --max_seq_length "$max_seq_length" \
    --max_invalid "$max_invalid" --controls "$controls" --bf16 "$bf16" "${rest[@]}"
}
