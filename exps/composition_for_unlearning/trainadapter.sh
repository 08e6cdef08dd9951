#!/usr/bin/env bash
#SBATCH --job-name=trainadapter
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
# Train a module on toxic text in order to subtract it (runscore.sh): research on removing abilities.
# The reference's gpt2-large: (IA)^3, rate 5e-3, 10 epochs, batch 16, the comments of civil_comments
# with a toxicity above 0.8. Its loss counts the padding too: extra_flags=--loss_on_padding.

: "${model_name_or_path:=gpt2-large}"     # directory or hub name; smollm2-135m-instruct: pem offline list
: "${adapter_config:=lora}"               # lora or ia3
: "${train_file:=}"                       # toxic texts, e.g. toxic_comments/toxic.jsonl; empty: civil_comments
: "${score_above:=0.8}"                   # of civil_comments
: "${seed:=42}"
: "${lora_r:=8}"
: "${lora_alpha:=8}"
: "${lora_dropout:=0}"
: "${ia3_placement:=peft}"                # reference: before the activation
: "${learning_rate:=}"                    # empty: 5e-3 for (IA)^3, 5e-4 for LoRA
: "${num_train_epochs:=10}"
: "${max_steps:=}"                        # instead of the epochs
: "${per_device_train_batch_size:=2}"
: "${gradient_accumulation_steps:=8}"
: "${max_seq_length:=256}"                # tokens; longer texts are cut
: "${weight_decay:=0}"
: "${warmup_ratio:=0.06}"
: "${extra_flags:=}"                      # any other flags of pem train

here=$(dirname "${BASH_SOURCE[0]}")
# sbatch runs a copy of this script; submit from the repository root.
[[ -e $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/exps/composition_for_unlearning
source "$here/common.sh"

words adapter_config lora ia3
if [[ $adapter_config == ia3 ]]; then
  : "${learning_rate:=5e-3}"
  train_toxic ia3 --ia3_placement "$ia3_placement"
else
  : "${learning_rate:=5e-4}"
  train_toxic lora --lora_r "$lora_r" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout"
fi
