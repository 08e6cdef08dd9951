#!/usr/bin/env bash
#SBATCH --job-name=utility
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# What a negation costs elsewhere: tasks of the lm-evaluation-harness (extra [harness]) at every strength
# of a grid, in one process. The module is that of trainadapter.sh or fft.sh.

: "${model_name_or_path:=gpt2-large}"     # directory or hub name; smollm2-135m-instruct: pem offline list
: "${adapter_config:=lora}"               # lora, ia3 or fft
: "${seed:=42}"                           # of the module
: "${grid:=0.5 0.5 1}"                    # START STEP STOP: strengths; the base model and the module always
: "${harness_tasks:=lambada_openai hellaswag}"
: "${harness_include:=}"                  # folder of your own task files
: "${text_file:=}"                        # texts instead of tasks: guess the next word of each
: "${limit:=}"                            # only the first N rows of each task; empty: all
: "${batch_size:=8}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_unlearning
source "$here/common.sh"

if [[ -n $text_file ]]; then
  harness_tasks=next_word harness_include=$OUT/scratch/$experiment/next_word
  step "scratch/$experiment/next_word" "$PYTHON" exps/composition_for_unlearning/next_word.py \
    --text_file "$text_file" --output_dir "$harness_include"
fi
rest=()
if [[ -n $harness_include ]]; then rest+=(--harness_include "$harness_include"); fi
if [[ -n $limit ]]; then rest+=(--limit "$limit"); fi
run=$(of_model)/$adapter_config-utility-s$seed
# shellcheck disable=SC2086  # grid and harness_tasks hold several words
step "$run" "$PYTHON" -m pem_composition negation --adapters "$OUT/$(toxic_run "$adapter_config")" \
  --save_path "$OUT/$run" --grid $grid --evaluate --model_name_or_path "$model_name_or_path" \
  --harness_tasks $harness_tasks --batch_size "$batch_size" "${rest[@]}"
