#!/usr/bin/env bash
#SBATCH --job-name=many_tasks_merge
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Merge the modules of all tasks by every method, each at its best setting on the validation rows:
# statistics of each module (Fisher, RegMean), learned coefficients, one search per method, the table.

: "${model_name_or_path:=roberta-base}"
: "${tasks:=rte mnli snli qqp sst2 cola stsb}"
: "${adapter_config:=lora}"                # lora, ia3 or fft
: "${lora_r:=8}"                           # which modules; the rank of the results is free
: "${probe=2000}"                          # which modules: with this setting of their training
: "${seed:=42}"
: "${methods:=}"                           # of pem search; empty: all that the kind of module has
: "${settings=density=0.1:0.9}"            # dimensions besides coefficients; empty: defaults
: "${coefficients:=shared}"                # each, shared or fixed
: "${coefficients_range:=0.1 1.5}"
: "${goal:=normalised}"
: "${sampler:=tpe}"
: "${trials:=15}"                          # of each method
: "${grid:=}"                              # with sampler=grid: coefficients, START STEP STOP, all of them tried
: "${workers:=1}"
: "${statistics_samples:=256}"             # rows of each task for Fisher and Gram
: "${learned=adamerging cat nsc}"          # methods of pem learn; empty: none; fft has none, (IA)^3 no nsc
: "${learn_rate:=}"                        # empty: each method's own
: "${learn_steps:=100}"
: "${learn_samples:=256}"                  # validation rows of each task that coefficients learn from
: "${max_seq_length:=64}"
: "${max_eval_samples:=}"                  # score only N rows of each task, stratified; empty: all
: "${controls:=true}"                      # rows of what the selected merge has to beat
: "${joint:=}"                             # with controls, modules of joint_train.sh: one all
: "${refit:=}"                             # training rows of each task for new last layers; empty: none
: "${refit_select:=false}"                 # true: also choose by scores with new last layers
: "${bf16:=false}"                         # true: score and learn in bfloat16

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_of_many_tasks
source "$here/common.sh"

if [[ -z $methods ]]; then
  methods="sum magnitude ties dare dare_ties della breadcrumbs sce negmerge karcher fisher"
  if [[ $adapter_config == lora ]]; then
    methods+=" tsv iso_c iso_cts wudi actmat svc knots ctm robustmerge lego regmean ssr"
  fi
fi

# statistics WHAT TASK: pem fisher or pem gram of a module on its training rows; a subspace is what
# the modules of all tasks see of them.
statistics() {
  local run program=$1 others=() task
  run=$(run_of "$1-$2")
  if [[ -e $OUT/$run/$1.safetensors ]]; then return; fi
  if [[ $1 == subspace ]]; then
    program=gram others=(--merge_with)
    for task in $tasks; do
      if [[ $task != "$2" ]]; then others+=("$OUT/$(run_of "$task")"); fi
    done
  fi
  step "$run" "$PYTHON" -m pem_composition "$program" "${others[@]}" \
    --model_name_or_path "$model_name_or_path" \
    --adapter "$OUT/$(run_of "$2")" --task_name "$2" --train_file "$(rows_of "$2")/all.jsonl" \
    --max_samples "$statistics_samples" --max_seq_length "$max_seq_length" \
    --output_dir "$OUT/$run" --overwrite
}

files=()
for pair in fisher:fisher:--fisher_list regmean:gram:--gram_list ssr:subspace:--subspace_list; do
  IFS=: read -r method what flag <<<"$pair"
  if [[ " $methods " != *" $method "* ]]; then continue; fi
  files+=("$flag")
  for task in $tasks; do
    statistics "$what" "$task"
    files+=("$OUT/$(run_of "$what-$task")")
  done
done

scored_flags
compare=()
mapfile -t rate < <(optional --learning_rate "$learn_rate")
for method in $learned; do
  if [[ $adapter_config == fft || $method:$adapter_config == nsc:ia3 ]]; then continue; fi
  run=$(run_of "$method")
  if [[ ! -e $OUT/$run/learned.json ]]; then
    step "$run" "$PYTHON" -m pem_composition learn "${scored[@]}" --method "$method" \
      --max_eval_samples "$learn_samples" --max_steps "$learn_steps" --seed "$seed" "${rate[@]}" \
      --save_path "$OUT/$run" --overwrite
  fi
  compare+=("$OUT/$run")
done
if ((${#compare[@]})); then compare=(--compare "${compare[@]}"); fi

extra=()
if [[ $controls == true ]]; then
  for steps in $joint; do extra+=(--joint_module "$OUT/$(run_of "joint-$steps")"); done
fi
if [[ -n $refit ]]; then
  extra+=(--refit "$refit" --refit_select "$refit_select" --train_file)
  for task in $tasks; do extra+=("$(rows_of "$task")/all.jsonl"); done
fi
test=()
for task in $tasks; do test+=("$(rows_of "$task")/test.jsonl"); done
dimensions=()
# shellcheck disable=SC2206  # several dimensions, one per word
if [[ -n $settings ]]; then dimensions=(--search $settings); fi
# shellcheck disable=SC2206  # several coefficients, one per word
if [[ -n $grid ]]; then dimensions+=(--grid $grid); fi
run=$(run_of search)
# shellcheck disable=SC2086  # methods and the range hold several words
step "$run" "$PYTHON" -m pem_composition search "${scored[@]}" --test_file "${test[@]}" \
  --save_path "$OUT/$run" --methods $methods "${dimensions[@]}" \
  --coefficients "$coefficients" --coefficients_range $coefficients_range --goal "$goal" \
  --sampler "$sampler" --trials "$trials" --seed "$seed" --workers "$workers" \
  --controls "$controls" "${extra[@]}" "${files[@]}" "${compare[@]}"
