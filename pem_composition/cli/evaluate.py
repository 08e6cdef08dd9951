"""``pem evaluate``: score a model, alone or with a module attached, on one split of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from pem_composition.module import PEM
    from pem_composition.tasks.data import TaskData
    from pem_composition.tasks.glue import Task

NAME = "evaluate"
HELP = "score a model with or without a module: metrics, standard error, shares, AUC"
EXAMPLES = """
  pem evaluate --model_name_or_path minilm --adapter runs/merged --task_name sst2 \\
      --validation_file dev.jsonl --output_dir runs/merged/eval
  pem evaluate --model_name_or_path runs/fft --task_name rte --data_dir data/glue
"""
NO_ADAPTER = "none"


@dataclass(frozen=True)
class Config:
    """Flags of ``pem evaluate``."""

    model_name_or_path: str = field(metadata={"help": "base model, or a fully fine-tuned one"})
    adapter: str = flag(NO_ADAPTER, "module directory to attach, or none")
    task_name: str | None = flag(None, "GLUE task, e.g. rte")
    validation_file: str | None = flag(
        None, "rows to score: .jsonl .json .csv .tsv .parquet, also gzipped"
    )
    test_file: str | None = flag(None, "test rows, with --split test")
    data_dir: str | None = flag(
        None, "folder with train/dev files, or with one such folder per task"
    )
    split: Literal["validation", "test"] = flag("validation", "rows to score")
    output_dir: str | None = flag(
        None, "where eval_results.json and all_results.json go; default: printed only"
    )
    max_seq_length: int = flag(128, "tokens per example; longer ones are cut")
    pad_to_max_length: bool = flag(
        False, "pad every example to --max_seq_length instead of to its batch"
    )
    seed: int = flag(42, "seed of a head that neither model nor module brings")
    max_eval_samples: int | None = flag(None, "at most N rows, stratified by label")
    per_device_eval_batch_size: int = flag(64, "rows per batch")
    allow_base_mismatch: bool = flag(False, "score a module of another base model all the same")
    use_cpu: bool = flag(False, "do not use a GPU")

    def __post_init__(self) -> None:
        if self.task_name is None and not (self.validation_file or self.test_file):
            raise UsageError.build(
                "--task_name", "no rows to score", do="give a task or --validation_file"
            )
        for name in ("per_device_eval_batch_size", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError.build(
                    f"--{name}", "cannot be used", found=value, expected="a number >= 1"
                )


def run(config: Config) -> int:
    """Score, print a table, write the result files."""
    from pem_composition.training import results

    data = read_data(config)
    for note in data.notes:
        print(note)
    scores = evaluate(config, data)
    print(table(scores))
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "test" if config.split == "test" else "eval"
        results.write_results(folder, {prefix: {f"{prefix}_{k}": v for k, v in scores.items()}})
    return 0


def read_data(config: Config) -> TaskData:
    """The rows to score."""
    from pem_composition.tasks.data import load_task

    data = load_task(
        config.task_name,
        validation_file=config.validation_file,
        test_file=config.test_file,
        data_dir=config.data_dir,
        splits=[config.split],
        max_eval_samples=config.max_eval_samples,
        max_predict_samples=config.max_eval_samples,
    )
    data.require(config.split)
    return data


def evaluate(config: Config, data: TaskData) -> dict[str, Any]:
    """Load the model, attach the module, score every row; the scores of ``pem train``.

    Raises:
        IncompatibleModules: the module does not fit the model or the task.
        CheckpointError, DataError: a file that cannot be used.
    """
    from pem_composition.evaluation import models

    module = load_module(config, data.task) if config.adapter != NO_ADAPTER else None
    import torch
    import transformers

    from pem_composition.adapters import attach
    from pem_composition.evaluation import classify
    from pem_composition.training.scoring import Scorer

    transformers.set_seed(config.seed)
    model, tokenizer, info = models.load_base(config.model_name_or_path, data.task)
    if module is not None:
        attach(model, module)
    if info["missing_keys"] and (module is None or not module.head_tensors()):
        print(f"note: the head is newly initialised (--seed {config.seed}), not trained")
    limit = models.max_input_length(model.config, tokenizer) or config.max_seq_length
    length = min(config.max_seq_length, limit)
    rows = classify.encode(tokenizer, data.require(config.split), max_seq_length=length)
    pad_to = length if config.pad_to_max_length else None
    scorer = Scorer(data.task, rows, batch_size=config.per_device_eval_batch_size, pad_to=pad_to)
    return scorer(model.to("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"))


def load_module(config: Config, task: Task) -> PEM:
    """The module to attach, checked against task and base.

    Raises:
        IncompatibleModules: it was trained on another base model, or its head is for another task.
    """
    from pem_composition import checkpoint
    from pem_composition.evaluation import models

    base = models.resolve(config.model_name_or_path)
    module = checkpoint.load(config.adapter, base=base)
    check_labels(config.adapter, module, task)
    here, there = checkpoint.base_identity(base).fingerprint, module.base.fingerprint
    if here and there and here != there and not config.allow_base_mismatch:
        raise IncompatibleModules.build(
            f"--adapter {config.adapter}",
            "belongs to another base model",
            found=f"{module.base.name} ({there[:12]})",
            expected=f"{config.model_name_or_path} ({here[:12]})",
            do="give its own base, or add --allow_base_mismatch",
        )
    return module


def check_labels(where: str, module: PEM, task: Task) -> None:
    """Refuse a module whose head orders the classes otherwise than the task.

    Raises:
        IncompatibleModules: with both orders.
    """
    if module.head is not None and module.head.labels and module.head.labels != task.labels:
        raise IncompatibleModules.build(
            f"--adapter {where}",
            f"its head does not answer task {task.name}",
            found=" ".join(module.head.labels),
            expected=" ".join(task.labels) or "a score",
            do="evaluate it on the task it was trained on",
        )


def table(scores: Mapping[str, Any]) -> str:
    """The scores as a small table."""
    shares = {f"share {word}": share for word, share in scores["predicted_shares"].items()}
    plain = {k: v for k, v in scores.items() if k not in ("predicted_shares", "degenerate")}
    rows = {k: v for k, v in (plain | shares).items() if v is not None}
    width = max(len(name) for name in rows)
    lines = [
        f"{name:<{width}}  {v:.4f}" if isinstance(v, float) else f"{name:<{width}}  {v}"
        for name, v in rows.items()
    ]
    if scores["degenerate"]:
        lines.append("degenerate: nearly every row gets the same class")
    return "\n".join(lines)
