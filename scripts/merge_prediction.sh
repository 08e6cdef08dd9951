#!/usr/bin/env bash
# Does what pem compare measures before a merge predict what the merge does? Trains modules of two
# skewed halves of a task with several rates, budgets and initial modules, merges every module of
# half 0 with every one of half 1 at equal weights in both spaces, and correlates. 48 modules of
# MiniLM and 192 pairs take about two hours on one core.
#
#   data_dir=GLUE bash scripts/merge_prediction.sh

: "${data_dir:?folder of GLUE tasks}"
: "${model_name_or_path:=minilm}" "${tasks:=sst2 mnli rte}" "${init_seeds:=42 43}"
: "${settings:=3e-4:120 1e-3:60 1e-3:120 3e-3:120}" # rate:steps
: "${samples:=4000}" "${max_eval_samples:=500}" "${per_device_train_batch_size:=16}"
: "${max_seq_length:=64}"

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../exps/common.sh"

root=$OUT/merge_prediction
for task in $tasks; do
  data=$root/$task/data
  if [[ ! -e $data/half-0.jsonl ]]; then
    size=()
    if [[ $task != rte ]]; then size=(--samples "$samples"); fi # RTE is smaller than that
    step "merge_prediction/$task/data" "$PYTHON" -m pem_composition split --task_name "$task" \
      --data_dir "$data_dir" --share 0.8 "${size[@]}" --output_dir "$data"
  fi
  first=() second=()
  for seed in $init_seeds; do
    init=$root/$task/init-$seed
    step "merge_prediction/$task/init-$seed" "$PYTHON" -m pem_composition init \
      --model_name_or_path "$model_name_or_path" --task_name "$task" --adapter_config lora \
      --seed "$seed" --output_dir "$init"
    for setting in $settings; do
      for half in 0 1; do
        run=half-$half-i$seed-r${setting%:*}-s${setting#*:}
        step "merge_prediction/$task/$run" "$PYTHON" -m pem_composition train \
          --model_name_or_path "$model_name_or_path" --task_name "$task" --adapter_config lora \
          --train_file "$data/half-$half.jsonl" --init_from "$init" --seed "$seed" \
          --learning_rate "${setting%:*}" --max_steps "${setting#*:}" --eval_strategy no \
          --no-load_best_model_at_end --no-do_eval \
          --disable_tqdm --max_seq_length "$max_seq_length" \
          --per_device_train_batch_size "$per_device_train_batch_size" \
          --output_dir "$root/$task/$run"
        if ((half)); then second+=("$root/$task/$run"); else first+=("$root/$task/$run"); fi
      done
    done
  done
  step "merge_prediction/$task/pairs" "$PYTHON" scripts/merge_prediction.py pairs \
    --model_name_or_path "$model_name_or_path" --task_name "$task" --data_dir "$data_dir" \
    --max_eval_samples "$max_eval_samples" --max_seq_length "$max_seq_length" --first "${first[@]}" --second "${second[@]}" \
    --output "$root/$task/pairs.jsonl"
done
files=()
for task in $tasks; do files+=("$root/$task/pairs.jsonl"); done
step merge_prediction/table "$PYTHON" scripts/merge_prediction.py table "${files[@]}"
