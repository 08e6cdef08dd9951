"""``pem evaluate``: score a model, alone or with a module attached, on one split of a task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pem_composition.cli import common
from pem_composition.cli.flags import HarnessFlags
from pem_composition.errors import IncompatibleModules, UsageError
from pem_composition.evaluation.own_classes import (
    Classes,
    in_order_of,
    of_model,
    of_module,
    order_of,
)
from pem_composition.training import results
from pem_composition.training.config import (
    DEFAULT_BLOCK,
    RowFlags,
    check_objective,
    flag,
    refuse_idle,
    required,
)

if TYPE_CHECKING:
    from pem_composition.evaluation.models import LoadedBase
    from pem_composition.module import PEM
    from pem_composition.objectives import Objective
    from pem_composition.tasks.data import Example, TaskData
    from pem_composition.tasks.glue import Task
    from pem_composition.training.scoring import Scorer

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
NO_ADAPTER = "none"
MISMATCHED = "validation_mismatched"
# What says nothing about the tasks of the harness.
ROW_FLAGS = (
    "task_name", "validation_file", "test_file", "data_dir", "prompt", "answers", "target",
    "block_size", "do_predict", "max_eval_samples", "head", "text_column_names",
    "label_column_name", "labels", "do_regression",
)  # fmt: skip
# Prefix and suffix of a score's name in the result files, as run_glue.py has them.
RESULT_NAMES = {"validation": ("eval", ""), MISMATCHED: ("eval", "_mm"), "test": ("test", "")}


class Answered(NamedTuple):
    """Scores of one split, none where labels are missing, and the prediction for each row."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class Config(RowFlags, HarnessFlags):
    """Flags of ``pem evaluate``."""

    model_name_or_path: str = required("base model, or a fully fine-tuned one")
    adapter: str = flag(NO_ADAPTER, "module directory to attach, or none")
    head: str | None = flag(
        None, "which head of a module that has several (merged with --head per-task or concat)"
    )
    task_name: str | None = flag(None, "GLUE task, e.g. rte")
    validation_file: str | None = flag(
        None, "rows to score: .jsonl .json .csv .tsv .parquet, also packed (.gz .bz2 .xz .zip)"
    )
    test_file: str | None = flag(None, "test rows, with --split test")
    data_dir: str | None = flag(
        None, "folder with train/dev files, or with one such folder per task"
    )
    objective: Literal["classification", "seq2seq"] = flag(
        "classification", "how the model answers: by a head, or text to text"
    )
    target: Literal["label", "next_block"] | None = flag(
        None, "seq2seq: the answer of the row's label (default: label), or a domain's text"
    )
    prompt: str | None = flag(
        None, "seq2seq: template and answers, by name or JSON file; default: the task's own"
    )
    answers: Literal["scoring", "constrained", "free"] | None = flag(
        None,
        "seq2seq: the likeliest answer (scoring, the default), beam search that writes nothing "
        "else (constrained), or greedy generation, in which other words are wrong (free)",
    )
    block_size: int | None = flag(
        None, f"next_block: tokens per block of text (default: {DEFAULT_BLOCK})", least=1
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
    max_seq_length: int = flag(128, "tokens per example; longer ones are cut", least=1)
    pad_to_max_length: bool = flag(
        False, "pad every example to --max_seq_length instead of to its batch"
    )
    seed: int = flag(42, "seed of a head that neither model nor module brings")
    max_eval_samples: int | None = flag(None, "at most N rows, stratified by label", least=1)
    per_device_eval_batch_size: int | None = flag(
        None, "rows per batch (default: 16 on a CPU, 64 on a GPU)", least=1
    )
    bf16: bool = flag(False, "compute in bfloat16: faster where the processor has it")
    allow_base_mismatch: bool = flag(False, "score a module of another base model all the same")
    use_cpu: bool = flag(False, "do not use a GPU")

    def __post_init__(self) -> None:
        if self.head is not None and self.adapter == NO_ADAPTER:
            raise UsageError.build("--head", "is a module's", do="add --adapter DIR")
        self.check_harness(*ROW_FLAGS)
        if self.harness_tasks:
            return
        if self.task_name is None and not (self.validation_file or self.test_file):
            raise UsageError.build(
                "--task_name", "no rows to score", do="give a task or --validation_file"
            )
        check_objective(self)
        if self.do_predict and (self.output_dir is None or self.next_block):
            raise UsageError.build(
                "--do_predict", "writes classes or scores of rows to a folder",
                found="--target next_block" if self.next_block else "no --output_dir",
                do="leave --do_predict out" if self.next_block else "add --output_dir OUT",
            )  # fmt: skip
        asked = self.objective == "seq2seq" and not self.next_block
        refuse_idle(self, "answers", "--objective seq2seq --target label", has=asked)

    @property
    def next_block(self) -> bool:
        """True where the rows are a domain's text."""
        return self.objective == "seq2seq" and self.target == "next_block"


def run(config: Config) -> int:
    """Score, print a table, write the result files."""
    if config.harness_tasks:
        return _run_harness(config, config.harness_tasks)
    data = read_data(config)
    for note in data.notes:
        print(note)
    found = evaluate(config, data)
    splits: dict[str, dict[str, Any]] = {}
    for split, answered in found.items():
        prefix, suffix = RESULT_NAMES[split]
        if len(found) > 1:
            print(f"{split}:")
        print(table(answered.scores) if answered.scores else "predicted, not scored: no labels")
        scores = {f"{prefix}_{k}{suffix}": v for k, v in answered.scores.items()}
        splits[prefix] = splits.get(prefix, {}) | scores
    if config.output_dir is not None:
        from pem_composition.evaluation import predictions

        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        results.write_results(folder, {k: v for k, v in splits.items() if v})
        for split, answered in found.items() if config.do_predict else ():
            name = data.task.name + ("-mm" if split == MISMATCHED else "")
            print(f"predictions: {predictions.write(folder, name, answered.predictions)}")
    return 0


def _run_harness(config: Config, names: tuple[str, ...]) -> int:
    """The same for tasks of the lm-evaluation-harness; its samples go beside the results."""
    from pem_composition.evaluation import harness

    asked = harness.HarnessOptions(names, config.harness_include, config.num_fewshot, config.limit)
    tasks = harness.read(asked)
    found = harness.evaluate(
        config.model_name_or_path,
        tasks,
        adapter=None if config.adapter == NO_ADAPTER else config.adapter,
        allow_base_mismatch=config.allow_base_mismatch,
        device=common.device_of(config.use_cpu),
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
        folder.mkdir(parents=True, exist_ok=True)
        results.write_results(folder, {"eval": scores})
        for task, answered in zip(tasks, found, strict=True):
            harness.write_samples(folder / f"samples_{task.name}.jsonl", answered.samples)
    return 0


def read_data(config: Config) -> TaskData:
    """The rows to score.

    Raises:
        DataError: rows that cannot be used, or without labels where they are to be scored.
    """
    from pem_composition.evaluation import metrics

    data = objective_of(config).read(
        config.task_name,
        validation_file=config.validation_file,
        test_file=config.test_file,
        data_dir=config.data_dir,
        splits=config.split,
        reading=config.reading(own_classes(config)),
        max_eval_samples=config.max_eval_samples,
        max_predict_samples=config.max_eval_samples,
    )
    for split in config.split:
        labels = [example.label for example in data.require(split)]
        if not config.do_predict and not config.next_block:
            metrics.gold_labels(data.task, labels)  # refuses rows that cannot be scored
    return data


def own_classes(config: Config) -> Classes:
    """The classes of the module's head, of a whole model else."""
    from pem_composition.checkpoint import inspect_header

    if config.objective != "classification":
        return None
    if config.adapter == NO_ADAPTER:
        return of_model(config.model_name_or_path)
    return of_module(inspect_header(config.adapter), config.head)


def objective_of(config: Config, task: Task | None = None) -> Objective:
    """What the flags name; with a task, for a head that answers in an order of its own."""
    from pem_composition import objectives

    return objectives.objective_of(
        config.objective, next_block=config.next_block, max_seq_length=config.max_seq_length,
        block_size=config.block_size or DEFAULT_BLOCK, prompt=config.prompt, found=config.answers,
        order=order_of(task, own_classes(config)) if task is not None else (),
    )  # fmt: skip


def evaluate(config: Config, data: TaskData) -> dict[str, Answered]:
    """Load the model, attach the module, score every row; by split the scores of ``pem train``.

    Raises:
        IncompatibleModules: the module does not fit the model or the task.
        CheckpointError, DataError: a file, a prompt or rows that cannot be used.
    """
    objective = objective_of(config, data.task)
    module = None
    if config.adapter != NO_ADAPTER:
        classifies = config.objective == "classification"
        module = load_module(config, data.task, head=config.head, needs_head=classifies)
    import torch

    from pem_composition.adapters import attach
    from pem_composition.evaluation.models import max_input_length
    from pem_composition.evaluation.precision import reduced
    from pem_composition.training.scoring import Scorer

    device = "cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"
    model, tokenizer, info = load_model(config, data.task)
    if module is not None:
        attach(model, module, allow_base_mismatch=config.allow_base_mismatch)
    if info["missing_keys"] and (module is None or not module.head_tensors()):
        remedy = "" if module is None else "; the module brings none (merge with --head first|last)"
        print(f"note: the head is newly initialised (--seed {config.seed}), not trained{remedy}")
    objective = objective.within(max_input_length(model.config, tokenizer))
    layout: dict[str, Any] = {
        "batch_size": config.per_device_eval_batch_size,
        "pad_to": objective.max_seq_length if config.pad_to_max_length else None,
        "device": device,
    }
    found = {}
    with reduced(model.to(device), config.bf16):
        for split in config.split:
            rows = data.require(split)
            evaluator = objective.evaluator(data.task, rows, tokenizer, model.config, **layout)
            found[split] = _answered(config, Scorer(evaluator), model, rows)
    return found


def _answered(config: Config, scorer: Scorer, model: Any, rows: Sequence[Example]) -> Answered:
    """Scores of rows that have labels, and their predictions where they are asked for."""
    from pem_composition.evaluation.predictions import predictions

    began = time.perf_counter()
    outputs = scorer.outputs(model)
    seconds = time.perf_counter() - began
    told = predictions(scorer.evaluator, outputs, rows) if config.do_predict else []
    if config.do_predict and any(example.label is None for example in rows):
        return Answered({}, told)
    scores = scorer.scores(outputs, seconds=seconds)
    asked = config.objective == "seq2seq" and not config.next_block
    return Answered({**scores, "answers": config.answers or "scoring"} if asked else scores, told)


def load_model(config: Config, task: Task) -> LoadedBase:
    """The model with a head for the task, or with its output embeddings."""
    import transformers

    from pem_composition.evaluation import models

    transformers.set_seed(config.seed)
    if config.objective == "seq2seq":
        return models.load_text_to_text(config.model_name_or_path)
    return models.load_base(config.model_name_or_path, in_order_of(task, own_classes(config)))


def load_module(
    config: Config, task: Task, *, head: str | None = None, needs_head: bool = False
) -> PEM:
    """The module to attach, checked against task and base.

    Args:
        head: which of its heads; None: its own.
        needs_head: refuse a module of several heads if none is named.

    Raises:
        IncompatibleModules: it was trained on another base model, or its head is for another task.
    """
    from pem_composition import checkpoint
    from pem_composition.evaluation import models

    base = models.resolve(config.model_name_or_path)
    module = checkpoint.load(config.adapter, base=base)
    if head is not None:
        module = module.with_head(head)
    elif needs_head:
        check_one_head(config.adapter, module)
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


def check_one_head(where: str, module: PEM) -> None:
    """Refuse a module whose heads are for several tasks.

    Raises:
        UsageError: naming them.
    """
    from pem_composition.arithmetic.heads import tasks_of

    named = list(tasks_of(module.head)) if module.head_tensors() else list(module.heads)
    if named:
        raise UsageError.build(
            f"--adapter {where}",
            "has heads for several tasks",
            found=", ".join(named),
            do="name one (--head NAME)",
        )


def check_labels(where: str, module: PEM, task: Task) -> None:
    """Refuse a module whose head answers other classes than the task's.

    Raises:
        IncompatibleModules: with both.
    """

    head = module.head
    if head is not None and not head.fits(in_order_of(task, head.labels).labels):
        raise IncompatibleModules.build(
            f"--adapter {where}",
            f"its head does not answer task {task.name}",
            found=" ".join(module.head.labels),
            expected=" ".join(task.labels) or "a score",
            do="evaluate it on the task it was trained on, in rows that have every class",
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
