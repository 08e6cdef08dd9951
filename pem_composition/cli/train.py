"""``pem train``: train a module on one task; resumes, and stops cleanly when asked to."""

from __future__ import annotations

import os

from pem_composition import launch, signals
from pem_composition.training import processes, runs
from pem_composition.training.training_flags import TrainConfig as Config

__all__ = ["EXAMPLES", "HELP", "NAME", "Config", "run"]

NAME = "train"
HELP = "train a LoRA or (IA)^3 module, or the whole model, on one task, or on text"
EXAMPLES = """
  pem train --model_name_or_path roberta-base --task_name rte --max_steps 1500 \\
      --learning_rate 1e-3 --output_dir runs/rte
  pem train --model_name_or_path minilm --train_file half0.jsonl --validation_file dev.jsonl \\
      --task_name sst2 --init_from runs/init --output_dir runs/half0
  pem train --model_name_or_path roberta-base --joint_tasks rte sst2 stsb --data_dir glue \\
      --max_steps 1500 --output_dir runs/joint
  pem train --objective seq2seq --model_name_or_path flan-t5-small --task_name rte \\
      --data_dir glue --init_from runs/init --output_dir runs/rte
  pem train --objective seq2seq --target next_block --model_name_or_path flan-t5-small \\
      --train_file reviews.jsonl --block_size 128 --output_dir runs/reviews
  pem train --objective causal_lm --model_name_or_path gpt2-large --train_file comments.jsonl \\
      --score_column toxicity --score_above 0.8 --max_seq_length 256 --output_dir scratch/toxic
"""


def say(line: str) -> None:
    """Print a line at once, so that it stands where it belongs in a log."""
    print(line, flush=True)


def run(config: Config) -> int:
    """Train, evaluate, write; 75 if a signal asked to stop, 3 if the loss is not finite."""
    missing = processes.missing_workers(os.environ, processes.parent_command())
    if missing > 1:
        say(f"accelerate launch --cpu started one process; starting {missing}")
        return processes.run_workers(missing, processes.main_command())

    runs.run(config, say, signals.current())
    launch.leave_group()
    return 0
