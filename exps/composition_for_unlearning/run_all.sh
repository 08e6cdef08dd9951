#!/usr/bin/env bash
#SBATCH --job-name=unlearning
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# The whole experiment: for each method and seed, train a module on toxic text and subtract it at every
# strength. Research on removing abilities. Every value of the scripts called here can be set in the
# environment as well, e.g.
#   model_name_or_path=smollm2-135m-instruct train_file=toxic_comments/toxic.jsonl judge=offline \
#     methods="lora ia3" max_steps=200 num_samples=200 perplexity_tokens=16384 bash .../run_all.sh
# A rate given as learning_rate holds for every method; unset, each has its own.

: "${model_name_or_path:=gpt2-large}"
: "${methods:=lora ia3 fft}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_unlearning
source "$here/common.sh"

export model_name_or_path
words methods lora ia3 fft

here=exps/composition_for_unlearning # common.sh has gone to the repository root
for method in $methods; do
  for seed in $SEEDS; do
    if [[ $method == fft ]]; then
      child "$here/fft.sh" seed="$seed"
    else
      child "$here/trainadapter.sh" adapter_config="$method" seed="$seed"
    fi
    child "$here/runscore.sh" adapter_config="$method" seed="$seed"
  done
  report_seeds "$method"
done
