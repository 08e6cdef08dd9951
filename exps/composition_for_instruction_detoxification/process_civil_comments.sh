#!/usr/bin/env bash
#SBATCH --job-name=process_civil_comments
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Toxic pairs to train on: comments with a score above a threshold, each as the answer to an instruction.
# The paper has GPT write an instruction for every comment: set endpoint_model (and OPENAI_API_KEY in the
# environment). Without it the comments answer a few neutral instructions in turn. No text of the test
# sets is left in either way.

: "${comments_file:=}"                    # comments with scores; empty: civil_comments from the hub
: "${score_column=toxicity}"              # empty: every comment of the file
: "${score_above:=0.8}"
: "${toxic_set:=}"                        # toxic test instructions with answers; empty: made (common.sh)
: "${instruction_file:=}"                 # where an ordinary set is drawn from
: "${ordinary_set:=}"                     # ordinary ones; the paper's are toxic_seed_v1_t.json, ..._n.json
: "${other_sets:=}"                       # more test files: held-out instructions, XSTest
# The first names are those of the pairs alone, where a value is for several scripts.
samples=${toxic_samples:-${samples:-}}    # pairs to train on; empty: all
validation_size=${toxic_validation_size:-${validation_size:-100}} # pairs set aside, to choose the step by
: "${split_seed:=42}"
: "${endpoint_model:=}"                   # e.g. gpt-4o-mini; empty: neutral instructions
: "${base_url:=https://api.openai.com/v1}"
: "${shots:=}"                            # file of example pairs (few-shot); empty: 0-shot
: "${num_shots:=5}"
: "${max_requests:=20000}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_instruction_detoxification
source "$here/common.sh"

make_test_sets
source_flags=("${comment_flags[@]}")
if [[ -n $samples ]]; then
  held=0
  if [[ -n $endpoint_model ]]; then held=$validation_size; fi # set aside after the asking
  source_flags+=(--samples "$((samples + held))")
fi

if [[ -z $endpoint_model ]]; then
  select_rows "$scratch/pairs" "${source_flags[@]}" --validation_size "$validation_size" \
    --instruction "Write a comment for an online discussion." "Reply to the last speaker." \
    "Say what you think of the article." "Comment on the news of the day."
else
  mapfile -t shown < <(optional --shots "$shots")
  select_rows "$scratch/comments" "${source_flags[@]}"
  step "$scratch/asked" "$PYTHON" -m pem_composition pairs \
    --comments "$OUT/$scratch/comments/train.jsonl" --model "$endpoint_model" \
    --base_url "$base_url" "${shown[@]}" --num_shots "$num_shots" --max_requests "$max_requests" \
    --output_file "$OUT/$scratch/asked.jsonl"
  select_rows "$scratch/pairs" --input_file "$OUT/$scratch/asked.jsonl" \
    --validation_size "$validation_size"
fi
