#!/usr/bin/env bash
#SBATCH --job-name=many_tasks
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# The whole experiment: for each kind of module and seed, a module for every task with a head of its
# own, then every merging method on all of them. Every value of the scripts called here can be set in
# the environment as well, e.g.
#   model_name_or_path=granite-roberta-30m data_dir=/path/to/glue modules="lora:8 ia3" bash .../run_all.sh

: "${model_name_or_path:=roberta-base}"
: "${tasks:=rte mnli snli qqp sst2 cola stsb}"
: "${modules:=lora:8 lora:16 ia3}"         # kind, and for LoRA the rank
: "${probe=2000}"                          # rows that each head is fitted on first; empty: it is drawn
: "${controls:=true}"                      # rows of what the selected merge has to beat
: "${joint=one all}"                       # with controls, modules on all tasks together: steps of one, of all

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_of_many_tasks
source "$here/common.sh"
if [[ $controls != true ]]; then joint=; fi
export model_name_or_path tasks controls joint probe
for adapter_config in $modules; do
  adapter_config=${adapter_config%%:*}
  words adapter_config lora ia3 fft
done

here=exps/composition_of_many_tasks # common.sh has gone to the repository root
for module in $modules; do
  adapter_config=${module%%:*} lora_r=${module##*:}
  if [[ $adapter_config != lora ]]; then lora_r=8; fi
  together=$joint
  if [[ $adapter_config == fft ]]; then together=; fi # one module on all tasks is LoRA or (IA)^3
  searches=()
  for seed in $SEEDS; do
    for task_name in $tasks; do
      child "$here/${adapter_config}_train.sh" task_name="$task_name" seed="$seed" lora_r="$lora_r"
    done
    for steps in $together; do
      child "$here/joint_train.sh" joint="$steps" adapter_config="$adapter_config" \
        seed="$seed" lora_r="$lora_r"
    done
    child "$here/merge_methods.sh" joint="$together" adapter_config="$adapter_config" \
      seed="$seed" lora_r="$lora_r"
    searches+=("$(run_of search)")
  done
  report_on "$experiment/$(basename "$model_name_or_path")/$(method_name)/table" "${searches[@]}"
done
