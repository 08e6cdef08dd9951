#!/usr/bin/env bash
# Why the exact sum wins: what the paper's sum of factors adds to it, against drift, learning rate, rank and
# number of modules. Trains LoRA modules of several tasks for every setting, from common initial factors and
# with heads that were fitted first; measures and scores both sums. Eight settings of MiniLM take about an
# hour on one core.
#
#   data_dir=GLUE bash scripts/cross_terms.sh

: "${data_dir:?folder of GLUE tasks}"
: "${model_name_or_path:=minilm}" "${tasks:=sst2 qqp mnli snli}"
# rank:rate:steps:seed
: "${settings:=8:1e-3:150:42 8:1e-3:150:43 8:1e-3:150:44 8:3e-4:150:42 8:3e-3:150:42 2:1e-3:150:42 32:1e-3:150:42 8:1e-3:50:42}"
: "${samples:=4000}" "${probe:=2000}" "${max_eval_samples:=250}" "${per_device_train_batch_size:=16}"
: "${max_seq_length:=64}" "${grid:=0.2 0.2 1}"

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../exps/common.sh"

root=cross_terms/$(basename "$model_name_or_path")
for task in $tasks; do
  step "$root/data/$task" "$PYTHON" -m pem_composition split --task_name "$task" --data_dir "$data_dir" \
    --samples "$samples" --validation_size 500 --output_dir "$OUT/$root/data/$task" --overwrite
done
for setting in $settings; do
  IFS=: read -r rank rate steps seed <<<"$setting"
  run=$root/r$rank-$rate-$steps-s$seed
  modules=() validation=() test=()
  for task in $tasks; do
    data=$OUT/$root/data/$task start=$root/init-r$rank-s$seed-$task
    module=(
      --model_name_or_path "$model_name_or_path" --task_name "$task" --adapter_config lora
      --lora_r "$rank" --lora_alpha $((2 * rank)) --lora_dropout 0 --seed "$seed"
    )
    step "$start" "$PYTHON" -m pem_composition init "${module[@]}" \
      --validation_file "$data/validation.jsonl" --output_dir "$OUT/$start"
    step "$start-head" "$PYTHON" -m pem_composition refit --adapter "$OUT/$start" \
      --model_name_or_path "$model_name_or_path" --task_name "$task" --train_file "$data/all.jsonl" \
      --max_samples "$probe" --seed "$seed" --max_seq_length "$max_seq_length" \
      --output_dir "$OUT/$start-head" --overwrite
    step "$run-$task" "$PYTHON" -m pem_composition train "${module[@]}" --init_from "$OUT/$start-head" \
      --train_file "$data/all.jsonl" --validation_file "$data/validation.jsonl" --learning_rate "$rate" \
      --max_steps "$steps" --eval_strategy no --no-load_best_model_at_end --no-do_eval \
      --max_seq_length "$max_seq_length" --per_device_train_batch_size "$per_device_train_batch_size" \
      --output_dir "$OUT/$run-$task"
    modules+=("$OUT/$run-$task") validation+=("$data/validation.jsonl") test+=("$data/test.jsonl")
  done
  # shellcheck disable=SC2086  # tasks and grid hold several words
  step "$run-search" "$PYTHON" -m pem_composition search --adapters "${modules[@]}" --head per-task \
    --model_name_or_path "$model_name_or_path" --task_name $tasks --validation_file "${validation[@]}" \
    --test_file "${test[@]}" --save_path "$OUT/$run-search" --methods sum --space parameter delta \
    --coefficients shared --sampler grid --grid $grid --goal mean --controls true \
    --max_eval_samples "$max_eval_samples" --max_seq_length "$max_seq_length"
  step "$run" "$PYTHON" scripts/cross_terms.py --init "$OUT/$start" --modules "${modules[@]}" \
    --search "$OUT/$run-search" --output "$OUT/$run/table.csv"
done
