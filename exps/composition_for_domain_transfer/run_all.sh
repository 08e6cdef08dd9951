#!/usr/bin/env bash
#SBATCH --job-name=domain_transfer
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# The whole experiment: for each pair of domains, method and seed, train classifier and language model
# of both, and move the classifier either way. Every value of the scripts called here can be set in the
# environment as well, e.g.
#   pairs="amazon_snippets:rotten_tomatoes" methods=lora model_name_or_path=flan-t5-small bash ...
# A rate given as learning_rate holds for every method and for both kinds of module; unset, each script
# has its own.

: "${model_name_or_path:=t5-base}"
: "${pairs:=yelp_polarity:amazon_polarity}"  # several, separated by spaces
: "${methods:=lora ia3 fft}"
: "${data_dir:=}"

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_domain_transfer
source "$here/common.sh"
export model_name_or_path data_dir
words methods lora ia3 fft

here=exps/composition_for_domain_transfer # common.sh has gone to the repository root
for pair in $pairs; do
  one=${pair%%:*} other=${pair##*:}
  for method in $methods; do
    for seed in $SEEDS; do
      for domain in "$one" "$other"; do
        child "$here/${method}_polarity_classify.sh" domain="$domain" seed="$seed"
        child "$here/${method}_polarity_lm.sh" domain="$domain" seed="$seed"
      done
      for direction in "$one $other" "$other $one"; do
        child "$here/vary_merge_analogy.sh" source="${direction% *}" target="${direction#* }" \
          adapter_config="$method" seed="$seed"
      done
    done
    seed=${SEEDS%% *}
    report_seeds "$(transfer_run "$method" "$one" "$other")" "$(transfer_run "$method" "$other" "$one")"
  done
done
