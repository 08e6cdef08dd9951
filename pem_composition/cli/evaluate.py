"""``pem evaluate``: score a model, alone or with a module attached, on one split of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pem_composition import launch
from pem_composition.cli.flags import ROW_FLAGS, AnswerKindFlags, DeviceFlags, HarnessFlags
from pem_composition.cli.texting import NO_ADAPTER
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, refuse_idle, required, seed_flag
from pem_composition.safe_files import files_added
from pem_composition.training import results
from pem_composition.training.task_model import TaskModel
from pem_composition.training.training_flags import (
    ANSWERING,
    DEFAULT_BLOCK,
    FileFlags,
    check_objective,
)

NAME = "evaluate"
HELP = "score a model with or without a module: metrics, standard error, shares, AUC"
EXAMPLES = """
  pem evaluate --model_name_or_path minilm --adapter runs/merged --task_name sst2 \\
      --validation_file dev.jsonl --output_dir runs/merged/eval
  pem evaluate --model_name_or_path runs/fft --task_name rte --data_dir data/glue
  pem evaluate --model_name_or_path flan-t5-small --objective seq2seq --task_name sst2 \\
      --data_dir data/glue --answers free
  pem evaluate --model_name_or_path smollm2-135m-instruct --adapter runs/merged \\
      --harness_tasks my_task --harness_include tasks --limit 100
"""
MISMATCHED = "validation_mismatched"
# Prefix and suffix of a score's name in the result files, as run_glue.py has them.
RESULT_NAMES = {"validation": ("eval", ""), MISMATCHED: ("eval", "_mm"), "test": ("test", "")}


@dataclass(frozen=True)
class Config(AnswerKindFlags, DeviceFlags, FileFlags, HarnessFlags):
    """Flags of ``pem evaluate``."""

    model_name_or_path: str = required("base model, or a fully fine-tuned one")
    adapter: str = flag(NO_ADAPTER, "module directory to attach, or none")
    head: str | None = flag(
        None, "which head of a module that has several (merged with --head per-task or concat)"
    )
    prompt: str | None = flag(
        None, "seq2seq: template and answers, by name or JSON file; default: the task's own"
    )
    answers: Literal["scoring", "constrained", "free"] | None = flag(
        None,
        "seq2seq: the likeliest answer (scoring, the default), beam search that writes nothing "
        "else (constrained), or greedy generation, in which other words are wrong (free)",
    )
    split: tuple[Literal["validation", "validation_mismatched", "test"], ...] = flag(
        ("validation",),
        "rows to score, of one split or several: MNLI has validation and validation_mismatched "
        "(default: validation)",
    )
    do_predict: bool = flag(
        False,
        "write the prediction for every row to --output_dir (predict_results_<task>.txt, and "
        ".jsonl with probabilities); rows may lack labels with --split test",
    )
    output_dir: str | None = flag(
        None, "where eval_results.json and all_results.json go; default: printed only"
    )
    pad_to_max_length: bool = flag(
        False, "pad every example to --max_seq_length instead of to its batch"
    )
    seed: int = seed_flag("seed of a head that neither model nor module brings")
    allow_base_mismatch: bool = flag(False, "score a module of another base model all the same")

    def __post_init__(self) -> None:
        if self.head is not None and self.adapter == NO_ADAPTER:
            raise UsageError.build("--head", "is a module's", do="add --adapter DIR")
        self.check_harness(*ROW_FLAGS, "answers", "do_predict", "head")
        if self.harness_tasks:
            return
        if self.task_name is None and not (self.validation_file or self.test_file):
            raise UsageError.build(
                "--task_name", "no rows to score", do="give a task or --validation_file"
            )
        check_objective(self)
        labelled = self.objective in ANSWERING and not self.next_block
        if self.do_predict and (self.output_dir is None or not labelled):
            raise UsageError.build(
                "--do_predict", "writes classes or scores of rows to a folder",
                found="no --output_dir" if labelled else "rows without classes",
                do="add --output_dir OUT" if labelled else "leave --do_predict out",
            )  # fmt: skip
        asked = self.objective == "seq2seq" and not self.next_block
        refuse_idle(self, "answers", "--objective seq2seq --target label", has=asked)


def run(config: Config) -> int:
    """Score, print a table, write the result files."""
    if config.harness_tasks and not launch.is_main():
        return 0  # the harness shares nothing
    if config.harness_tasks:
        return _run_harness(config, config.harness_tasks)
    asked = TaskModel(
        model=config.model_name_or_path,
        adapter=None if config.adapter == NO_ADAPTER else config.adapter,
        head=config.head,
        objective=config.objective,
        next_block=config.next_block,
        prompt=config.prompt,
        template=config.template,
        answers=config.answers,
        max_seq_length=config.max_seq_length,
        block_size=config.block_size or DEFAULT_BLOCK,
        seed=config.seed,
        allow_base_mismatch=config.allow_base_mismatch,
    )
    most = config.max_eval_samples
    files = config.row_files(config.split, max_eval_samples=most, max_predict_samples=most)
    data = asked.read(
        config.task_name, files, config.reading(asked.own_classes), scored=not config.do_predict
    )
    for note in data.notes:
        print(note)
    from pem_composition.training import evaluation

    found = evaluation.evaluate(
        asked, data, config.split, batch_size=config.per_device_eval_batch_size,
        pad=config.pad_to_max_length, predict=config.do_predict, bf16=config.bf16,
        use_cpu=config.use_cpu,
    )  # fmt: skip
    launch.leave_group()
    if not launch.is_main():
        return 0
    splits: dict[str, dict[str, Any]] = {}
    for split, answered in found.items():
        prefix, suffix = RESULT_NAMES[split]
        if len(found) > 1:
            print(f"{split}:")
        print(table(answered.scores) if answered.scores else "predicted, not scored: no labels")
        scores = {f"{prefix}_{k}{suffix}": v for k, v in answered.scores.items()}
        splits[prefix] = splits.get(prefix, {}) | scores
    if config.output_dir is not None:
        folder, told = Path(config.output_dir), []
        with files_added(folder) as added:
            results.write_results(added, {k: v for k, v in splits.items() if v}, earlier=folder)
            for split, answered in found.items() if config.do_predict else ():
                name = data.task.name + ("-mm" if split == MISMATCHED else "")
                told.append(evaluation.write_predictions(added, name, answered.predictions).name)
        for name in told:
            print(f"predictions: {folder / name}")
    return 0


def _run_harness(config: Config, names: tuple[str, ...]) -> int:
    """The same for tasks of the lm-evaluation-harness; its samples go beside the results."""
    from pem_composition.evaluation import harness

    tasks = harness.read(names, **config.harness_options)
    found = harness.evaluate(
        config.model_name_or_path,
        tasks,
        adapter=None if config.adapter == NO_ADAPTER else config.adapter,
        allow_base_mismatch=config.allow_base_mismatch,
        use_cpu=config.use_cpu,
        batch_size=config.per_device_eval_batch_size,
        bf16=config.bf16,
    )
    scores: dict[str, Any] = {}
    for task, answered in zip(tasks, found, strict=True):
        print(f"{task.name} ({len(task.rows)} rows):")
        for metric, score in answered.scores.items():
            error = answered.stderr[metric]
            print(f"  {metric}  {score:.4f}" + ("" if error is None else f" +- {error:.4f}"))
            scores[f"eval_{task.name}_{metric}"] = score
            scores[f"eval_{task.name}_{metric}_stderr"] = error
        scores[f"eval_{task.name}_harness"] = task.identity
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        with files_added(folder) as added:
            results.write_results(added, {"eval": scores}, earlier=folder)
            for task, answered in zip(tasks, found, strict=True):
                harness.write_samples(added / f"samples_{task.name}.jsonl", answered.samples)
    return 0


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
