#!/usr/bin/env bash
#SBATCH --job-name=initialisation_study
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# What it is worth that all modules start from the same numbers: the experiment with one initial module
# per seed and with one per module, and how far each module moved from its own (pem inspect --init).
# Takes the values of run_all.sh.

: "${model_name_or_path:=t5-base}"
: "${pairs:=yelp_polarity:amazon_polarity}"  # several, separated by spaces

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_domain_transfer
source "$here/common.sh"
export model_name_or_path pairs

here=exps/composition_for_domain_transfer # common.sh has gone to the repository root
for same_init in 1 0; do
  child "$here/run_all.sh" methods=lora same_init="$same_init"
  modules=()
  for domain in ${pairs//:/ }; do modules+=("$domain-cls" "$domain-lm"); done
  for seed in $SEEDS; do show_drift lora "${modules[@]}"; done
done
