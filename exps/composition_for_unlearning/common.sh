# shellcheck shell=bash
# shellcheck disable=SC2154  # the hyperparameters are set by the scripts that source this
# Shared by the scripts of this folder: the module of toxic text, the sweep over its negations.
#
# This is research on removing abilities. A module trained on toxic text is trained in order to be
# subtracted; it goes to $OUT/scratch, and its record and card say what it is for. Texts that models
# write are kept beside the results, to be looked at: quote figures, not texts.

# shellcheck source=exps/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

experiment=unlearning
PURPOSE="trained on toxic text: it exists to be subtracted from a model, not to be used as it is"

# of_model: results of one model.
of_model() {
  echo "$experiment/$(basename "$model_name_or_path")"
}

# toxic_run METHOD: the module that is subtracted, in the scratch folder.
toxic_run() {
  echo "scratch/$(of_model)/$1-toxic-s$seed"
}

# negation_run METHOD: name of the sweep.
negation_run() {
  echo "$(of_model)/$1-negation-s$seed"
}

# train_toxic METHOD MODULE...: train on toxic text. MODULE are flags that describe the module; the
# budget is the script's.
train_toxic() {
  local method=$1 run rows budget
  shift
  run=$(toxic_run "$method")
  # A file of texts is taken whole; of civil_comments the rows above the score.
  rows=(--train_file "$train_file")
  if [[ -z $train_file ]]; then rows=(--task_name civil_comments --score_above "$score_above"); fi
  budget=(--num_train_epochs "$num_train_epochs")
  if [[ -n $max_steps ]]; then budget=(--max_steps "$max_steps"); fi
  # shellcheck disable=SC2086  # extra_flags holds several words
  step "$run" "$PYTHON" -m pem_composition train --objective causal_lm \
    --model_name_or_path "$model_name_or_path" "${rows[@]}" --adapter_config "$method" "$@" \
    --seed "$seed" --learning_rate "$learning_rate" "${budget[@]}" \
    --per_device_train_batch_size "$per_device_train_batch_size" \
    --gradient_accumulation_steps "$gradient_accumulation_steps" \
    --max_seq_length "$max_seq_length" --weight_decay "$weight_decay" \
    --warmup_ratio "$warmup_ratio" --eval_strategy no --no-do_eval --purpose "$PURPOSE" \
    --output_dir "$OUT/$run" $extra_flags
}

# sweep_strengths METHOD: subtract the module at every strength of the grid; write, judge and read.
sweep_strengths() {
  local method=$1 run asked rest=()
  run=$(negation_run "$method")
  asked=(--prompt_file "$prompt_file")
  if [[ -n $max_prompts ]]; then asked+=(--max_prompts "$max_prompts"); fi
  if [[ -n $prompt ]]; then asked=(--prompt "$prompt"); fi
  if [[ -n $max_new_tokens ]]; then
    asked+=(--max_new_tokens "$max_new_tokens")
  else
    asked+=(--max_length "$max_length")
  fi
  if [[ -n $perplexity_tokens ]]; then rest+=(--perplexity_tokens "$perplexity_tokens"); fi
  if [[ -n $top_k ]]; then rest+=(--top_k "$top_k"); fi
  # shellcheck disable=SC2086  # grid and judge hold several words
  step "$run" "$PYTHON" -m pem_composition negation --adapters "$OUT/$(toxic_run "$method")" \
    --save_path "$OUT/$run" --grid $grid --evaluate --model_name_or_path "$model_name_or_path" \
    "${asked[@]}" --num_samples "$num_samples" --top_p "$top_p" \
    --temperature "$temperature" --seed "$seed" --judge $judge --threshold "$threshold" \
    --perplexity_file "$perplexity_file" --window "$window" --stride "$stride" \
    --max_ppl_increase "$max_ppl_increase" --bf16 "$bf16" "${rest[@]}"
}

# report_seeds METHOD: the sweeps of all seeds as one table and one plot.
report_seeds() {
  local sweeps=() one table
  table=$(of_model)/$1-negation-table
  for one in $SEEDS; do sweeps+=("$(of_model)/$1-negation-s$one"); done
  report_on "$table" "${sweeps[@]}"
}
