"""One point of a coefficient sweep the reference's way: everything again, in processes of its own.

The reference's loop starts, for every coefficient, a process that loads the base model once per
module, merges and saves, and a second one that loads the model and the merged module, tokenises
the rows, pads them to 128 tokens and evaluates them in batches of 8 with the Trainer. Written here
with our modules and a current transformers; called by sweep.py, one process per stage.

    python scripts/benchmarks/process_per_point.py merge MODEL A B OUT T
    python scripts/benchmarks/process_per_point.py evaluate MODEL OUT ROWS.jsonl
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path


def merge(model: str, a: str, b: str, out: str, t: str) -> None:
    """Stage one: the base model is loaded once per module."""
    from transformers import AutoModel

    import pem_composition as pem

    modules = []
    for path in (a, b):
        AutoModel.from_pretrained(model)
        modules.append(pem.load(path))
    pem.combine(modules, [float(t), 1 - float(t)]).save(out, overwrite=True)


def evaluate(model: str, module: str, rows: str) -> None:
    """Stage two: Trainer, batches of 8, every row padded to 128 tokens."""
    import numpy as np
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
    )

    import pem_composition as pem

    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as scratch:
        data = load_dataset("json", data_files=rows, split="train", cache_dir=scratch)
        data = data.map(
            lambda batch: tokenizer(
                batch["sentence1"],
                batch["sentence2"],
                padding="max_length",
                truncation=True,
                max_length=128,
            ),
            batched=True,
        )
        args = TrainingArguments(scratch, per_device_eval_batch_size=8, report_to=[], use_cpu=True)
        trainer = Trainer(
            network,
            args,
            eval_dataset=data,
            compute_metrics=lambda p: {
                "accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))
            },
        )
        with pem.attach(network, pem.load(module)):
            print(json.dumps(trainer.evaluate()))
        Path(scratch, "done").touch()


if __name__ == "__main__":
    {"merge": merge, "evaluate": evaluate}[sys.argv[1]](*sys.argv[2:])
