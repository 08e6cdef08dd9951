"""The reference's program of this name, by its flags: train on one comment at a time.

    python run_clm_noconcat.py --model_name_or_path gpt2-large --dataset_name civil_comments \\
        --train_adapter --adapter_config ia3 --learning_rate 5e-3 --num_train_epochs 10 \\
        --output_dir runs/toxic

It calls ``pem train --objective causal_lm`` on the comments with a toxicity above 0.8; without
--train_adapter the whole model is trained, as there. Flags that are not here go on to it as they
are. The published program's loss counts the padding to 1,024 tokens, too; to have that:
--loss_on_padding --max_seq_length 1024.
"""

from __future__ import annotations

import argparse
import sys

import former


def main(argv: list[str] | None = None) -> int:
    """Exit code of ``pem train``."""
    parser = argparse.ArgumentParser("run_clm_noconcat.py", allow_abbrev=False)
    parser.add_argument("--dataset_name", help="civil_comments, of the hub")
    parser.add_argument("--train_adapter", action="store_true", help="else the whole model")
    parser.add_argument("--adapter_config", default="lora", help="lora or ia3")
    parser.add_argument("--load_adapter", help="module to begin from")
    parser.add_argument("--evaluation_strategy", "--eval_strategy", default="no")
    parser.add_argument("--save_strategy", help="not needed")
    parser.add_argument("--do_train", action="store_true")
    parser.add_argument("--do_eval", action="store_true", help="evaluate on the set's own rows")
    given, rest = parser.parse_known_args(argv)
    words = ["--adapter_config", given.adapter_config if given.train_adapter else "fft"]
    if given.dataset_name:
        words += ["--task_name", given.dataset_name, "--score_above", "0.8"]
    if given.load_adapter:
        words += ["--init_from", given.load_adapter]
    words += ["--do_eval" if given.do_eval else "--no-do_eval"]
    words += ["--eval_strategy", given.evaluation_strategy, "--purpose", former.PURPOSE]
    return former.run("train", "--objective", "causal_lm", *words, *rest)


if __name__ == "__main__":
    sys.exit(main())
