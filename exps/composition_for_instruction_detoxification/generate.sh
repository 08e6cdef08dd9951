#!/usr/bin/env bash
#SBATCH --job-name=generate
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Take the toxic part out of the instruction module, by the exact form and by the reference's (and, if you
# like, by the paper's own sum: forms="exact parameter reference"), at every strength, and answer the test
# instructions with all of them: one process, one table. With endpoint_model a model grades the answers to
# the ordinary instructions, against those of the instruction module.

: "${model_name_or_path:=huggyllama/llama-7b}"
: "${seed:=42}"
adapter_config=${method:-${adapter_config:-lora}}
: "${strengths:=0.3 0.4 0.5}"
: "${forms:=exact reference}"
: "${toxic_set:=}"                        # toxic test instructions with answers; empty: made (common.sh)
# Where sets that are made are drawn from.
: "${comments_file:=}" "${score_column=toxicity}" "${score_above:=0.8}" "${instruction_file:=}"
: "${split_seed:=42}"
: "${ordinary_set:=}"                     # ordinary ones; the paper's are toxic_seed_v1_t.json, ..._n.json
: "${other_sets:=}"                       # more test files: held-out instructions, XSTest
: "${max_instructions:=}"                 # of each set; empty: all
: "${template:=sections}"
: "${num_beams:=4}"
: "${repetition_penalty:=2.5}"
: "${max_new_tokens:=128}"
: "${max_seq_length:=512}"
judge=${judges:-${judge:-detoxify offline}} # detoxify needs the extra [toxicity] and its weights
: "${threshold:=0.8}"
: "${batch_size:=}"
: "${bf16:=false}"                        # true: compute in bfloat16, where the processor has it
: "${load_flags=--load_in_8bit --model_dtype float16}"
: "${endpoint_model:=}"                   # e.g. gpt-4o; empty: no grades
: "${base_url:=https://api.openai.com/v1}"
: "${max_requests:=2000}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_instruction_detoxification
source "$here/common.sh"

make_test_sets
table=$(table_run)
mapfile -t sets < <(test_sets)
mapfile -t limit < <(optional --max_instructions "$max_instructions")
mapfile -t rows < <(optional --batch_size "$batch_size")
reference=()
if [[ $adapter_config == lora ]]; then
  # shellcheck disable=SC2206  # forms holds several words
  reference=(--form $forms)
fi
# shellcheck disable=SC2086  # strengths, judge and load_flags hold several words
step "$table" "$PYTHON" -m pem_composition detoxify --evaluate \
  --adapters "$OUT/$(instruction_run)" "$OUT/$(toxic_run)" \
  --save_path "$OUT/$table" --strength $strengths "${reference[@]}" \
  --model_name_or_path "$model_name_or_path" --instruction_file "${sets[@]}" "${limit[@]}" \
  --template "$template" --num_beams "$num_beams" --repetition_penalty "$repetition_penalty" \
  --max_new_tokens "$max_new_tokens" --max_seq_length "$max_seq_length" --judge $judge \
  --threshold "$threshold" "${rows[@]}" --bf16 "$bf16" $load_flags
if [[ -n $endpoint_model ]]; then
  name=$(basename "$ordinary_set")
  answers=$OUT/$table/answers
  for form in $forms; do
    for strength in $strengths; do
      step "$table-grades-$form-$strength" "$PYTHON" -m pem_composition helpfulness \
        --answers "$answers/$form-$strength/${name%%.*}.jsonl" \
        --against "$answers/instruction-module/${name%%.*}.jsonl" --model "$endpoint_model" \
        --base_url "$base_url" --max_requests "$max_requests" \
        --output_file "$OUT/$table/grades-$form-$strength.jsonl"
    done
  done
fi
