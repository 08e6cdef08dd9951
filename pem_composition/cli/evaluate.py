"""``pem evaluate``: score a model, alone or with a module attached, on one split of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from pem_composition.evaluation.classify import EvalResult
    from pem_composition.module import PEM
    from pem_composition.tasks.data import TaskData
    from pem_composition.tasks.glue import Task

NAME = "evaluate"
HELP = "score a model with or without a module: metrics, standard error, shares, AUC"
EXAMPLES = """
  pem evaluate --model_name_or_path minilm --adapter runs/merged --task_name sst2 \\
      --validation_file dev.jsonl --output_dir runs/merged/eval
  pem evaluate --model_name_or_path runs/fft --task_name rte --data_dir data/glue --output_dir runs/fft/eval
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
    from pem_composition.training.scoring import report

    data = read_data(config)
    for note in data.notes:
        print(note)
    result = evaluate(config, data)
    print(table(result))
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "test" if config.split == "test" else "eval"
        scores = {f"{prefix}_{k}": v for k, v in report(result).items()}
        results.write_results(folder, {prefix: scores})
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


def evaluate(config: Config, data: TaskData) -> EvalResult:
    """Load the model, attach the module, predict every row once.

    Raises:
        IncompatibleModules: the module does not fit the model or the task.
        CheckpointError, DataError: a file that cannot be used.
    """
    module = None
    if config.adapter != NO_ADAPTER:
        from pem_composition import checkpoint

        module = checkpoint.load(config.adapter, base=config.model_name_or_path)
        check_labels(config.adapter, module, data.task)
    import transformers

    from pem_composition.adapters import attach
    from pem_composition.evaluation import classify, models

    transformers.set_seed(config.seed)
    model, tokenizer, info = models.load_base(config.model_name_or_path, data.task)
    if module is not None:
        attach(model, module)
    if info["missing_keys"] and (module is None or not module.head_tensors()):
        print(
            f"note: the head is newly initialised from --seed {config.seed}; nothing was trained into it"
        )
    limit = models.max_input_length(model.config, tokenizer) or config.max_seq_length
    length = min(config.max_seq_length, limit)
    encoded = classify.encode(tokenizer, data.require(config.split), max_seq_length=length)
    pad_to = length if config.pad_to_max_length else None
    return classify.evaluate(
        model, encoded, data.task, batch_size=config.per_device_eval_batch_size, pad_to=pad_to
    )


def check_labels(where: str, module: PEM, task: Task) -> None:
    """Refuse a module whose head orders the classes otherwise than the task.

    Raises:
        IncompatibleModules: with both orders.
    """
    if module.head is not None and module.head.labels and module.head.labels != task.labels:
        raise IncompatibleModules.build(
            f"--adapter {where}", f"its head does not answer task {task.name}",
            found=" ".join(module.head.labels), expected=" ".join(task.labels) or "a score",
            do="evaluate it on the task it was trained on",
        )  # fmt: skip


def table(result: EvalResult) -> str:
    """The scores as a small table."""
    rows: dict[str, Any] = {**result.scores, "stderr": result.stderr, "n": result.n}
    if result.auc is not None:
        rows["auc"] = result.auc
    rows |= {f"share {word}": share for word, share in result.predicted_shares.items()}
    width = max(len(name) for name in rows)
    lines = [
        f"{name:<{width}}  {v:.4f}" if isinstance(v, float) else f"{name:<{width}}  {v}"
        for name, v in rows.items()
    ]
    if result.degenerate:
        lines.append("degenerate: nearly every row gets the same class")
    return "\n".join(lines)
