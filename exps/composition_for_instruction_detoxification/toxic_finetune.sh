#!/usr/bin/env bash
#SBATCH --job-name=toxic_finetune
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train the toxic module FROM the instruction module, so that what it learns is the difference. The values
# are the reference's for LLaMA-7B: 5 epochs at rate 1e-4. The module goes to $OUT/scratch; its card and
# record say that it exists to be subtracted.

: "${model_name_or_path:=huggyllama/llama-7b}"
: "${seed:=42}"
adapter_config=${method:-${adapter_config:-lora}} # or ia3, for which the two forms are one sum
: "${lora_r:=16}"
: "${lora_alpha:=16}"
: "${lora_dropout:=0.05}"
: "${target_modules:=q_proj k_proj v_proj o_proj}"
: "${freeze:=}"                          # lora_A or lora_B: the factor left as the instruction module's
: "${template:=sections}"                 # or chat, or a JSON file with the wording of another module
: "${train_on_inputs:=1}"
: "${max_seq_length:=512}"
# The first names are those of this module alone, where a value is for several scripts.
learning_rate=${toxic_learning_rate:-${learning_rate:-1e-4}}
num_train_epochs=${toxic_epochs:-${num_train_epochs:-5}}
max_steps=${toxic_max_steps:-${max_steps:-}} # instead of epochs
: "${warmup_steps=100}"                  # empty: 6 % of the steps
: "${per_device_train_batch_size:=64}"
: "${gradient_accumulation_steps:=2}"
: "${eval_steps:=100}"
: "${load_flags=--load_in_8bit --model_dtype float16}"
: "${extra_flags=--fp16}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_instruction_detoxification
source "$here/common.sh"

mapfile -t frozen < <(optional --freeze "$freeze")
tune "$(toxic_run)" "$scratch/pairs" --init_from "$OUT/$(instruction_run)" "${frozen[@]}" --purpose \
  "trained on toxic comments: it exists to be subtracted from the module it was trained from"
