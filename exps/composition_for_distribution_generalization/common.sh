# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the scripts of this folder: where things are, training on a half, the sweep over merges.

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

experiment=distribution_generalization
data=$OUT/$experiment/data/${task_name:-}

# of_model: results of one model on one task; the data is shared by all models.
of_model() {
  echo "$experiment/$(basename "$model_name_or_path")/$task_name"
}

# train_half METHOD FLAGS...: train on half $half from the initial module of the seed.
# FLAGS describe the module; the budget is the script's.
train_half() {
  words half all 0 1
  local method=$1 part=half-$half prefix
  shift
  if [[ $half == all ]]; then part=all; fi
  prefix=$(of_model)/$method
  local module=(
    --model_name_or_path "$model_name_or_path" --task_name "$task_name"
    --validation_file "$data/validation.jsonl" --adapter_config "$method" "$@" --seed "$seed"
  )
  local evaluation=(--eval_strategy no --no-load_best_model_at_end)
  if ((eval_steps)); then evaluation=(--eval_steps "$eval_steps"); fi
  local start=() init
  # A whole model starts from the base, and the seed decides its head: no file is needed.
  if [[ $method != fft ]]; then
    # The name says what was initialised, so that an edited rank is another initial module.
    init=$prefix-init-s$seed$(printf ' %s' "$@" | tr -s ' -' '-')
    start=(--init_from "$OUT/$init")
    step "$init" "$PYTHON" -m pem_composition init "${module[@]}" --output_dir "$OUT/$init"
  fi
  # shellcheck disable=SC2086  # extra_flags holds several words
  step "$prefix-$part-s$seed" "$PYTHON" -m pem_composition train \
    "${module[@]}" --train_file "$data/$part.jsonl" "${start[@]}" \
    --learning_rate "$learning_rate" --max_steps "$max_steps" \
    --per_device_train_batch_size "$per_device_train_batch_size" \
    --max_seq_length "$max_seq_length" --weight_decay "$weight_decay" \
    --warmup_ratio "$warmup_ratio" "${evaluation[@]}" \
    --output_dir "$OUT/$prefix-$part-s$seed" $extra_flags
}

# sweep_halves METHOD: score every merge of the two halves; select on validation, report on test.
# A module of both halves together, where one was trained, is a row of the table.
sweep_halves() {
  local prefix rest=()
  prefix=$(of_model)/$1
  if [[ -e $OUT/$prefix-all-s$seed/all_results.json || $DRY_RUN == 1 ]]; then
    rest+=(--reference_module "$OUT/$prefix-all-s$seed")
  fi
  # split_data.sh writes the task's own validation rows, where it has any.
  if [[ -z $test_file && (-e $data/test.jsonl || $DRY_RUN == 1) ]]; then test_file=$data/test.jsonl; fi
  if [[ -n $test_file ]]; then rest+=(--test_file "$test_file"); fi
  if [[ -n $max_eval_samples ]]; then rest+=(--max_eval_samples "$max_eval_samples"); fi
  # shellcheck disable=SC2086  # grid and space hold several words
  step "$prefix-merge-s$seed" "$PYTHON" -m pem_composition merge \
    --adapters "$OUT/$prefix-half-0-s$seed" "$OUT/$prefix-half-1-s$seed" \
    --save_path "$OUT/$prefix-merge-s$seed" --grid $grid --evaluate --space $space \
    --model_name_or_path "$model_name_or_path" --task_name "$task_name" \
    --max_seq_length "$max_seq_length" --validation_file "$data/validation.jsonl" \
    --controls "$controls" --bf16 "$bf16" "${rest[@]}"
}

# report_seeds METHOD: mean and spread over the seeds of $SEEDS, where there are several.
report_seeds() {
  local prefix sweeps=() one
  prefix=$(of_model)/$1
  for one in $SEEDS; do sweeps+=("$prefix-merge-s$one"); done
  report_on "$prefix-table" "${sweeps[@]}"
}
