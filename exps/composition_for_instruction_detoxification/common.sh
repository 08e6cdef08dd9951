# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the scripts of this folder: where things are, the module's shape, training.
#
# Toxic comments, pairs and modules go to $OUT/scratch: they exist to be subtracted from a model, and
# to nothing else. Do not publish them, and do not answer anybody with such a module.

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

experiment=instruction_detoxification
scratch=scratch/$experiment
if [[ -n ${adapter_config:-} ]]; then words adapter_config lora ia3; fi

# of_model FOLDER: results of one model there.
of_model() {
  echo "$1/$(basename "$model_name_or_path")"
}

# instruction_run, toxic_run, table_run: names of the two modules of the seed, and of their table.
instruction_run() {
  echo "$(of_model "$experiment")/$adapter_config-instruction-s$seed"
}
toxic_run() {
  echo "$(of_model "$scratch")/$adapter_config-toxic-s$seed"
}
table_run() {
  echo "$(of_model "$experiment")/$adapter_config-table-s$seed"
}

# sources: comment_flags and instruction_flags, the rows that the scripts draw from.
sources() {
  comment_flags=(--task_name civil_comments)
  if [[ -n $comments_file ]]; then comment_flags=(--input_file "$comments_file"); fi
  if [[ -n $score_column ]]; then
    comment_flags+=(--score_column "$score_column" --score_above "$score_above")
  fi
  instruction_flags=(--task_name alpaca_cleaned)
  if [[ -n $instruction_file ]]; then instruction_flags=(--input_file "$instruction_file"); fi
}

# make_test_sets: a set that is not given is drawn from the sources: 100 toxic comments to be
# finished, 100 instructions. Sets toxic_set, ordinary_set, and held_out, the comments whose halves stand
# in the former.
make_test_sets() {
  local folder=$scratch/test samples=100
  sources
  held_out=()
  if [[ -z $toxic_set ]]; then
    toxic_set=$OUT/$folder/toxic.jsonl
    held_out=("$OUT/$folder/comments/train.jsonl")
    drawn "$folder/comments" "${comment_flags[@]}" --samples "$samples"
    drawn "$folder/pairs" --input_file "${held_out[0]}" \
      --instruction "Finish this comment: {beginning}"
    step "$folder/toxic" cp "$OUT/$folder/pairs/train.jsonl" "$toxic_set"
  fi
  if [[ -z $ordinary_set ]]; then
    folder=$experiment/test
    ordinary_set=$OUT/$folder/ordinary.jsonl
    drawn "$folder/instructions" "${instruction_flags[@]}" --samples "$samples"
    step "$folder/ordinary" cp "$OUT/$folder/instructions/train.jsonl" "$ordinary_set"
  fi
}

# drawn NAME FLAGS...: pem select into OUT/NAME.
drawn() {
  step "$1" "$PYTHON" -m pem_composition select "${@:2}" --seed "$split_seed" --output_dir "$OUT/$1" \
    --overwrite
}

# test_sets: the files that no training row may overlap with, one per line.
test_sets() {
  printf '%s\n' "$toxic_set" "$ordinary_set"
  # shellcheck disable=SC2086  # other_sets holds several words
  if [[ -n $other_sets ]]; then printf '%s\n' $other_sets; fi
}

# select_rows NAME FLAGS...: OUT/NAME/train.jsonl and validation.jsonl without texts of the test sets.
select_rows() {
  local sets
  mapfile -t sets < <(test_sets)
  drawn "$@" --exclude "${sets[@]}" ${held_out[@]+"${held_out[@]}"}
}

# module_flags: what describes the module and how the base is held, read with mapfile.
module_flags() {
  local shape=(--adapter_config "$adapter_config")
  if [[ $adapter_config == lora ]]; then
    shape+=(--lora_r "$lora_r" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout")
    # shellcheck disable=SC2206  # target_modules holds several words
    shape+=(--target_modules $target_modules)
  fi
  # shellcheck disable=SC2086  # load_flags holds several words
  printf '%s\n' --objective instruction --model_name_or_path "$model_name_or_path" \
    "${shape[@]}" $load_flags
}

# tune RUN ROWS FLAGS...: train on the folder ROWS; the budget is the script's. AdamW and schedule are
# those of the Hugging Face Trainer, which the reference uses as they are.
tune() {
  local run=$1 rows=$2 module budget evaluation=(--eval_strategy no --no-do_eval) inputs=()
  shift 2
  mapfile -t module < <(module_flags)
  budget=(--num_train_epochs "$num_train_epochs")
  if [[ -n $max_steps ]]; then budget=(--max_steps "$max_steps"); fi
  if [[ -n $warmup_steps ]]; then budget+=(--warmup_steps "$warmup_steps"); fi
  if ((eval_steps)); then
    evaluation=(--validation_file "$OUT/$rows/validation.jsonl" --eval_steps "$eval_steps")
  fi
  if ((train_on_inputs)); then inputs=(--train_on_inputs); fi
  # shellcheck disable=SC2086  # extra_flags holds several words
  step "$run" "$PYTHON" -m pem_composition train "${module[@]}" "$@" \
    --train_file "$OUT/$rows/train.jsonl" "${evaluation[@]}" "${inputs[@]}" \
    --template "$template" --max_seq_length "$max_seq_length" --learning_rate "$learning_rate" \
    "${budget[@]}" --per_device_train_batch_size "$per_device_train_batch_size" \
    --gradient_accumulation_steps "$gradient_accumulation_steps" --group_by_length \
    --lr_scheduler_type linear --weight_decay 0 --adam_beta2 0.999 --adam_epsilon 1e-8 \
    --seed "$seed" --output_dir "$OUT/$run" $extra_flags
}
