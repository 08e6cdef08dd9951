# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the scripts of this folder: rows, modules, statistics of each task.

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

experiment=many_tasks

# rows_of TASK: folder of its rows; written by split_rows.
rows_of() {
  echo "$OUT/$experiment/data/$1"
}

# split_rows TASK: divide its training rows into all.jsonl (to train on) and validation.jsonl (to
# select on); test.jsonl is the task's own validation rows (to report on).
split_rows() {
  local name=$1 where=()
  if [[ -n $data_dir ]]; then where=(--data_dir "$data_dir"); fi
  if [[ -n $samples ]]; then where+=(--samples "$samples"); fi
  step "$experiment/split/$name" "$PYTHON" -m pem_composition split --task_name "$name" \
    "${where[@]}" --validation_size "$validation_size" --seed "$split_seed" \
    --output_dir "$(rows_of "$name")" --overwrite
}

# method_name: lora-r8, ia3, lora-r8-probe2000
method_name() {
  local name=$adapter_config
  if [[ $adapter_config == lora ]]; then name+=-r$lora_r; fi
  echo "$name${probe:+-probe$probe}"
}

# run_of NAME: what belongs to this model, method and seed.
run_of() {
  echo "$experiment/$(basename "$model_name_or_path")/$(method_name)/s$seed/$1"
}

# train_task METHOD FLAGS...: train on $task_name from the initial module of the seed, with a head of
# its own. All modules of a seed share the initial factors: the paper's sum needs them aligned.
# probe: the head begins as the best linear one on the base (LP-FT, arXiv 2202.10054).
train_task() {
  adapter_config=$1
  shift
  local run module init start
  run=$(run_of "$task_name")
  split_rows "$task_name"
  module=(
    --model_name_or_path "$model_name_or_path" --task_name "$task_name"
    --validation_file "$(rows_of "$task_name")/validation.jsonl"
    --adapter_config "$adapter_config" "$@" --seed "$seed"
  )
  # Equal seeds draw equal factors; the head is the task's, so each task has its initial module.
  init=$(run_of "init-$task_name")$(printf ' %s' "$@" | tr -s ' -' '-')
  step "$init" "$PYTHON" -m pem_composition init "${module[@]}" --output_dir "$OUT/$init"
  start=$init
  if [[ -n $probe ]]; then
    start=$(run_of "probe-$task_name")
    step "$start" "$PYTHON" -m pem_composition refit --adapter "$OUT/$init" \
      --model_name_or_path "$model_name_or_path" --task_name "$task_name" \
      --train_file "$(rows_of "$task_name")/all.jsonl" --max_samples "$probe" --seed "$seed" \
      --max_seq_length "$max_seq_length" --output_dir "$OUT/$start" --overwrite
  fi
  # shellcheck disable=SC2046,SC2086  # several words
  step "$run" "$PYTHON" -m pem_composition train "${module[@]}" --init_from "$OUT/$start" \
    --train_file "$(rows_of "$task_name")/all.jsonl" $(training "$max_steps") \
    --output_dir "$OUT/$run" $extra_flags
}

# training STEPS: how every module of this experiment is trained, its rows aside.
training() {
  echo "--learning_rate $learning_rate --max_steps $1 --max_seq_length $max_seq_length" \
    "--per_device_train_batch_size $per_device_train_batch_size --weight_decay $weight_decay" \
    "--warmup_ratio $warmup_ratio --eval_strategy no --no-load_best_model_at_end"
}

# train_joint: one module on the rows of all $tasks, from the initial factors of the seed.
train_joint() {
  local run task kind=() steps=$max_steps
  run=$(run_of "joint-$joint")
  for task in $tasks; do
    split_rows "$task"
    step "$experiment/rows/$task" ln -sf all.jsonl "$(rows_of "$task")/train.jsonl"
  done
  if [[ $joint == all ]]; then steps=$((max_steps * $(wc -w <<<"$tasks"))); fi
  : "${learning_rate:=$([[ $adapter_config == lora ]] && echo 2e-3 || echo 1e-2)}"
  if [[ $adapter_config == lora ]]; then
    kind=(--lora_r "$lora_r" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout")
  fi
  # shellcheck disable=SC2046,SC2086  # several words
  step "$run" "$PYTHON" -m pem_composition train --model_name_or_path "$model_name_or_path" \
    --joint_tasks $tasks --data_dir "$OUT/$experiment/data" --adapter_config "$adapter_config" \
    "${kind[@]}" --seed "$seed" $(training "$steps") --output_dir "$OUT/$run" $extra_flags
}

# scored_flags: the array `scored` names modules, model, tasks and rows of a search or of learning.
scored_flags() {
  local task
  scored=(--adapters)
  for task in $tasks; do scored+=("$OUT/$(run_of "$task")"); done
  # shellcheck disable=SC2206  # one task per word
  scored+=(--model_name_or_path "$model_name_or_path" --head per-task --task_name $tasks)
  scored+=(--validation_file)
  for task in $tasks; do scored+=("$(rows_of "$task")/validation.jsonl"); done
  scored+=(--max_seq_length "$max_seq_length" --bf16 "$bf16")
  if [[ -n $max_eval_samples ]]; then scored+=(--max_eval_samples "$max_eval_samples"); fi
}
