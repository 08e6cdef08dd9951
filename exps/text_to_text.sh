# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the two text-to-text experiments: rows, initial modules, training, reports.

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${same_init:=1}" # 1: all modules of a seed start from one initial module; 0: each from its own
export same_init

# rows_of NAME: folder of the rows of a task or domain; written by split_rows.
rows_of() {
  echo "$OUT/$experiment/data/$1"
}

# split_rows NAME FLAGS...: divide its training rows into all.jsonl (to train on) and validation.jsonl
# (to select on); test.jsonl is the task's own validation rows (to report on).
split_rows() {
  local name=$1 limit=()
  shift
  if [[ -n $samples ]]; then limit=(--samples "$samples"); fi
  step "$experiment/split/$name" "$PYTHON" -m pem_composition split "$@" "${limit[@]}" \
    --validation_size "$validation_size" --seed "$split_seed" \
    --output_dir "$(rows_of "$name")" --overwrite
}

# of_model: results of one model.
of_model() {
  echo "$experiment/$(basename "$model_name_or_path")"
}

# run_of METHOD NAME: what was trained on NAME, by the seed and by what it started from.
run_of() {
  local own=
  if ((!same_init)); then own=-own-init; fi
  echo "$(of_model)/$1-$2-s$seed$own"
}

# initial_seed NAME: seed of its initial module: one for all, or with same_init=0 one drawn from NAME.
initial_seed() {
  if ((same_init)); then
    echo "$seed"
  else
    echo "$((seed * 1000 + $(cksum <<<"$1" | cut -d' ' -f1) % 1000))"
  fi
}

# initial_of METHOD NAME MODULE...: the initial module; an edited rank is another one.
initial_of() {
  local method=$1 name=$2
  shift 2
  echo "$(of_model)/$method-init-s$(initial_seed "$name")$(printf ' %s' "$@" | tr -s ' -' '-')"
}

# train_text METHOD NAME MODULE...: train on NAME with the flags of the array `what` (rows and target).
# MODULE are flags that describe the module; the budget is the script's.
train_text() {
  local method=$1 name=$2 run init first start=() evaluation=(--eval_strategy no --no-do_eval)
  shift 2
  run=$(run_of "$method" "$name") first=$(initial_seed "$name")
  local module=(
    --objective seq2seq --model_name_or_path "$model_name_or_path" --adapter_config "$method" "$@"
    --seed "$first"
  )
  # A whole model starts from the base, and nothing in it is new.
  if [[ $method != fft ]]; then
    init=$(initial_of "$method" "$name" "$@")
    start=(--init_from "$OUT/$init")
    step "$init" "$PYTHON" -m pem_composition init "${module[@]}" --output_dir "$OUT/$init"
  fi
  if ((eval_steps)); then evaluation=(--eval_steps "$eval_steps"); fi
  # shellcheck disable=SC2086  # extra_flags holds several words
  step "$run" "$PYTHON" -m pem_composition train "${module[@]}" "${what[@]}" "${start[@]}" \
    --data_seed "$seed" --learning_rate "$learning_rate" --max_steps "$max_steps" \
    --per_device_train_batch_size "$per_device_train_batch_size" --weight_decay "$weight_decay" \
    --warmup_ratio "$warmup_ratio" "${evaluation[@]}" --output_dir "$OUT/$run" $extra_flags
}

# report_seeds RUN...: the sweeps of all seeds as one table; RUN are the names of the first seed's.
report_seeds() {
  local name one sweeps
  for name in "$@"; do
    sweeps=()
    for one in $SEEDS; do sweeps+=("${name/-s${SEEDS%% *}/-s$one}"); done
    report_on "$name-table" "${sweeps[@]}"
  done
}

# show_drift METHOD NAME...: how far training moved the modules of the seed from their initial ones.
show_drift() {
  local method=$1 name modules=()
  shift
  for name in "$@"; do modules+=("$OUT/$(run_of "$method" "$name")"); done
  step "$(run_of "$method" drift)" "$PYTHON" -m pem_composition inspect -a "${modules[@]}" --init own
}
