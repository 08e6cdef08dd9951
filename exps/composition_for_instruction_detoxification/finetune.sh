#!/usr/bin/env bash
#SBATCH --job-name=finetune
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Tune a module on instructions, as Alpaca-LoRA does. The values are the reference's for LLaMA-7B: rank 16 on
# q, k, v and o, 10 epochs of alpaca-cleaned at rate 3e-4, 128 rows per step, 512 tokens, the loss on the
# whole text, the base in 8 bits. docs/large_models.md has other ways to hold and launch it.

: "${model_name_or_path:=huggyllama/llama-7b}"
: "${instruction_file:=}"                # rows instruction, input, output; empty: alpaca_cleaned (hub)
: "${toxic_set:=}"                        # toxic test instructions with answers; empty: made (common.sh)
: "${comments_file:=}" "${score_column=toxicity}" "${score_above:=0.8}" # where a toxic set is drawn from
: "${ordinary_set:=}"                     # ordinary ones; the paper's are toxic_seed_v1_t.json, ..._n.json
: "${other_sets:=}"                       # more test files: held-out instructions, XSTest
: "${samples:=}"                         # training rows; empty: all
: "${validation_size:=2000}"
: "${split_seed:=42}"
: "${seed:=42}"
adapter_config=${method:-${adapter_config:-lora}} # or ia3, for which the two forms are one sum
: "${lora_r:=16}"
: "${lora_alpha:=16}"
: "${lora_dropout:=0.05}"
: "${target_modules:=q_proj k_proj v_proj o_proj}"
: "${template:=sections}"                 # or chat, or a JSON file with the wording of another module
: "${train_on_inputs:=1}"                # 1: the loss counts the prompt too; 0: the answer alone
: "${max_seq_length:=512}"
: "${learning_rate:=3e-4}"
: "${num_train_epochs:=10}"
: "${max_steps:=}"                       # instead of epochs
: "${warmup_steps=100}"                  # empty: 6 % of the steps
: "${per_device_train_batch_size:=8}"
: "${gradient_accumulation_steps:=16}"
: "${eval_steps:=100}"                   # 0: no evaluation while training, the last step is kept
: "${load_flags=--load_in_8bit --model_dtype float16}" # empty: the base in float32
: "${extra_flags=--fp16}"                 # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_instruction_detoxification
source "$here/common.sh"

make_test_sets
source_flags=("${instruction_flags[@]}")
if [[ -n $samples ]]; then source_flags+=(--samples "$samples"); fi
select_rows "$experiment/data" "${source_flags[@]}" --validation_size "$validation_size"
tune "$(instruction_run)" "$experiment/data"
