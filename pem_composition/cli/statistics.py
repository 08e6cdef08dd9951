"""What ``pem fisher`` and ``pem gram`` share: flags, rows, a module on its model, the file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pem_composition.cli import common
from pem_composition.errors import UsageError
from pem_composition.training.config import RowFlags, check_objective, flag, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pem_composition.adapters import Attachment
    from pem_composition.evaluation.evaluator import Evaluator
    from pem_composition.module import PEM
    from pem_composition.tasks.data import TaskData

Compute = Callable[
    ["nn.Module", "Attachment", "Evaluator", Callable[[int], None]], "dict[str, Tensor]"
]
SPLITS = ("train", "validation", "test")
SPOKEN = 30.0  # seconds between two lines of progress


@dataclass(frozen=True, kw_only=True)
class Flags(RowFlags):
    """Flags of both programs."""

    model_name_or_path: str = required("base model: a directory or a name")
    adapter: str = required("module directory")
    output_dir: Path = required("directory of the file")
    task_name: str | None = flag(None, "the module's task, e.g. rte")
    train_file: str | None = flag(
        None, "rows: .jsonl .json .csv .tsv .parquet, also packed (.gz .bz2 .xz .zip)"
    )
    validation_file: str | None = flag(None, "rows, with --split validation")
    test_file: str | None = flag(None, "rows, with --split test")
    data_dir: str | None = flag(
        None, "folder with train/dev files, or with one such folder per task"
    )
    split: Literal["train", "validation", "test"] = flag("train", "which rows are read")
    max_samples: int = flag(256, "at most N rows, stratified by label", least=1)
    objective: Literal["classification", "seq2seq"] = flag(
        "classification", "how the module answers: by a head, or text to text"
    )
    prompt: str | None = flag(
        None, "seq2seq: template and answers, by name or JSON file; default: the task's own"
    )
    max_seq_length: int = flag(128, "tokens per example; longer ones are cut", least=1)
    seed: int = flag(42, "of the choice of rows, and of a head that nothing brings")
    overwrite: bool = flag(False, "replace an existing output")
    allow_base_mismatch: bool = flag(False, "take a module of another base model all the same")
    use_cpu: bool = flag(False, "do not use a GPU")

    # What the checks and loaders of ``pem evaluate`` ask for besides.
    target = answers = block_size = head = None
    next_block = False

    def __post_init__(self) -> None:
        check_objective(self)
        if self.task_name is None and not (self.train_file or self.validation_file):
            raise UsageError.build("--task_name", "no rows to read", do="give a task or a file")


def run(config: Flags, what: str, facts: dict[str, Any], compute: Compute) -> int:
    """Read, compute and write the statistics of one module.

    Args:
        facts: what decides the numbers besides module, rows and base.
    """
    from pem_composition.arithmetic.statistics import Statistics, fingerprint
    from pem_composition.checkpoint import statistics as files
    from pem_composition.cli import evaluate
    from pem_composition.evaluation.keys import base_digest, complete, rows_digest
    from pem_composition.evaluation.models import resolve

    common.check_output(config.output_dir, config.overwrite)
    data = _read(config)
    for note in data.notes:
        print(f"note: {note}")
    module = evaluate.load_module(config, data.task)  # type: ignore[arg-type]  # the same names
    began = time.perf_counter()
    tensors, rows = _computed(config, data, module, compute)
    found = Statistics(
        what,
        tensors,
        fingerprint(module),
        len(rows),
        complete(
            {
                "task": data.task.name,
                "rows": rows_digest(rows),
                "split": config.split,
                "base": base_digest(resolve(config.model_name_or_path)),
                "objective": config.objective,
                "max_seq_length": config.max_seq_length,
                "module": module.name,
                **facts,
            }
        ),
    )
    path = files.write(found, config.output_dir, overwrite=config.overwrite)
    seconds = time.perf_counter() - began
    print(f"{path}: {what} of {module.name} on {len(rows)} rows of {data.task.name}, ", end="")
    print(f"{len(tensors)} tensors ({seconds:.1f} s)")
    return 0


def _read(config: Flags) -> TaskData:
    from pem_composition.cli import evaluate

    files = {f"{s}_file": getattr(config, f"{s}_file") for s in SPLITS}
    limits = dict.fromkeys(
        ("max_train_samples", "max_eval_samples", "max_predict_samples"), config.max_samples
    )
    own = evaluate.own_classes(config)  # type: ignore[arg-type]  # the same names
    data = evaluate.objective_of(config).read(  # type: ignore[arg-type]
        config.task_name, **files, data_dir=config.data_dir, splits=[config.split],
        seed=config.seed, reading=config.reading(own), **limits,
    )  # fmt: skip
    data.require(config.split)
    return data


def _computed(
    config: Flags, data: TaskData, module: PEM, compute: Compute
) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    from pem_composition.adapters import attach
    from pem_composition.cli import evaluate
    from pem_composition.evaluation.models import max_input_length

    device = common.device_of(config.use_cpu)
    objective = evaluate.objective_of(config, data.task)  # type: ignore[arg-type]
    model, tokenizer, _ = evaluate.load_model(config, data.task)  # type: ignore[arg-type]
    objective = objective.within(max_input_length(model.config, tokenizer))
    rows = data.splits[config.split]
    evaluator = objective.evaluator(
        data.task, rows, tokenizer, model.config, batch_size=1, device=device
    )
    model = model.to(device)
    with attach(model, module, trainable=True) as attachment:
        return compute(model, attachment, evaluator, _Progress(len(rows))), rows


class _Progress:
    """Says now and then how many rows are done."""

    def __init__(self, total: int) -> None:
        self.total, self.spoken = total, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.spoken > SPOKEN and done < self.total:
            self.spoken = time.monotonic()
            print(f"{done} of {self.total} rows", flush=True)
