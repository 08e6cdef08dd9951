"""``pem learn``: coefficients by gradient descent on rows (AdaMerging, CAT); the merged module."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import sweep as library
from pem_composition.cli import common, scored, sweep
from pem_composition.cli.flags import HEADS, EvaluationFlags, ModuleFlags
from pem_composition.errors import UsageError
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from pem_composition.merging.learning import Learned, Lesson, Rule
    from pem_composition.module import PEM

NAME = "learn"
HELP = "learn coefficients by gradient: adamerging (entropy, no labels) or cat (labels)"
EXAMPLES = """
  pem learn -a runs/rte runs/mnli -p runs/adamerged --method adamerging --head per-task \\
      --model_name_or_path minilm --task_name rte mnli --data_dir glue --max_eval_samples 200
  pem learn -a runs/a runs/b -p runs/cat --method cat --model_name_or_path t5-base \\
      --objective seq2seq --task_name rte mnli --data_dir glue --max_eval_samples 64
"""
ADAMERGING, CAT = "adamerging", "cat"
LEARNED = "learned.json"
RECIPE = "recipe.yaml"
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Config(ModuleFlags, EvaluationFlags):
    """Flags of pem learn."""

    method: str = flag(
        ADAMERGING,
        "adamerging: least entropy of the predictions; cat: least cross entropy",
        choices=(ADAMERGING, CAT),
    )
    per: str = flag("layer", "a coefficient per layer, or one each", choices=("layer", "module"))
    bounds: str | None = flag(
        None,
        "coefficients in [0, 1] (default of adamerging), softmax over the modules "
        "(default of cat), or free",
        choices=("clamp", "softmax", "none"),
    )
    init: float = flag(0.3, "where coefficients start")
    learning_rate: float | None = flag(None, "of Adam; default 1e-3 (adamerging) or 1e-2 (cat)")
    max_steps: int = flag(100, "each on one batch of every task")
    seed: int = flag(42, "of the order of the batches")
    head: str = flag(
        "average", "which head answers; per-task: that of module i for task i", choices=HEADS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < 0 or not self.rate > 0:
            raise UsageError.build(
                "--max_steps and --learning_rate", "cannot be used",
                found=f"{self.max_steps}, {self.rate:g}", expected="numbers above 0",
            )  # fmt: skip
        if self.rank is not None and self.space == ("parameter",):
            raise UsageError.build("--rank", "applies to delta space only")
        if self.space not in ((), ("delta",)):
            raise UsageError.build(
                "--space", "coefficients are learned in delta space", found=" ".join(self.space),
                do="leave it out, or use pem search --goal loss for parameter space",
            )  # fmt: skip

    @property
    def rate(self) -> float:
        """The learning rate; AdaMerging's is the published one, for entropy that falls faster falls
        by calling every row the same."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.method == ADAMERGING else 1e-2


def run(config: Config) -> int:
    """Learn, and write the module, its recipe and how the loss went."""
    from dataclasses import replace

    config = replace(config, space=("delta",))
    request = sweep.check(config, config, (0.0, 1.0, 1.0), config.head, library.MERGE)
    common.check_output(request.out, config.overwrite)
    modules, learned = _learned(config, request)
    merged = _merged(config, request.names, modules, learned)
    _write(config, request, modules, merged, learned)
    common.report_line(request.out, _short(merged), merged.provenance, bool(merged.head_tensors()))
    print(f"mean loss {learned.before:.4f} -> {learned.after:.4f} in {config.max_steps} steps")
    return 0


def _rule(config: Config) -> Rule:
    from pem_composition.merging import learning

    ada = config.method == ADAMERGING
    return learning.Rule(
        loss=learning.ENTROPY if ada else learning.LABELS,
        scope=config.per,
        constraint=config.bounds or (learning.CLAMP if ada else learning.SOFTMAX),
        init=config.init,
        learning_rate=config.rate,
        steps=config.max_steps,
        seed=config.seed,
    )


def _learned(config: Config, request: sweep.Request) -> tuple[list[PEM], Learned]:
    from pem_composition.merging.learning import learn

    modules = [i.pem for i in sweep.load_inputs(request)]
    model, tokenizer = sweep.load_base(request)
    lessons = _lessons(config, request, modules, model, tokenizer)
    every = max(1, config.max_steps // 10)

    def progress(step: int, loss: float) -> None:
        if step % every == 0:
            print(f"step {step} of {config.max_steps}: loss {loss:.4f}", flush=True)

    return modules, learn(model, modules, lessons, _rule(config), progress)


def _lessons(
    config: Config, request: sweep.Request, modules: Sequence[PEM], model: Any, tokenizer: Any
) -> list[Lesson]:
    """The validation rows of every task that the loss is defined for, with their heads."""
    from pem_composition.merging.learning import Lesson
    from pem_composition.module import combine

    common_head = None
    if config.head != library.PER_TASK and config.objective != "seq2seq":
        equal = [1.0 / len(modules)] * len(modules)
        whole = combine(modules, equal, space="delta", head=config.head, certify=False)
        common_head = whole.head_tensors() or None
    found = []
    for place, task in enumerate(request.tasks):
        if config.method == ADAMERGING and task.data.task.regression and task.prompt is None:
            print(f"note: {task.name} is a regression, which has no entropy; left out")
            continue
        rows = task.rows(scored.VALIDATION)
        assert rows is not None, "required when the tasks were read"
        evaluator = task.objective.evaluator(
            task.data.task, rows, tokenizer, model.config,
            batch_size=config.per_device_eval_batch_size or BATCH,
            device=next(model.parameters()).device,
        )  # fmt: skip
        own = config.head == library.PER_TASK
        found.append(
            Lesson(task.name, evaluator, modules[place].head_tensors() if own else common_head)
        )
    if not found:
        raise UsageError.build("--task_name", "no task to learn on", do="use --method cat")
    return found


def _merged(config: Config, names: Sequence[str], modules: Sequence[PEM], learned: Learned) -> PEM:
    """The sum with the learned coefficients."""
    from pem_composition.composition import compose

    named = dict(zip(letters(len(modules)), modules, strict=True))
    head = "none" if config.head == library.PER_TASK else config.head
    return compose(
        " + ".join(named), named, space="delta", rank=config.rank, dtype=config.dtype, head=head,
        layers=_factors(modules, learned),
        allow_base_mismatch=config.allow_base_mismatch,
    )  # fmt: skip


def _factors(modules: Sequence[PEM], learned: Learned) -> dict[str, dict[str, float]]:
    """By module the coefficients of the layers that it has."""
    return {
        name: {k: v for k, v in learned.of(i).items() if k in modules[i].layers}
        for i, name in enumerate(letters(len(modules)))
    }


def letters(count: int) -> list[str]:
    """Names for an expression: m0, m1, ..."""
    return [f"m{i}" for i in range(count)]


def _short(merged: PEM) -> str:
    return f"{len(merged.provenance.terms)} modules with learned coefficients"


def _write(
    config: Config,
    request: sweep.Request,
    modules: Sequence[PEM],
    merged: PEM,
    learned: Learned,
) -> None:
    """The module with ``learned.json`` and a recipe for pem compose beside it."""
    out = request.out
    merged.save(out, format=config.format, dtype=config.dtype, overwrite=config.overwrite)
    record = {
        "method": config.method,
        "rule": vars(_rule(config)),
        "modules": list(request.names),
        "layers": list(learned.layers),
        "coefficients": [list(row) for row in learned.coefficients],
        "loss_before": learned.before,
        "loss_after": learned.after,
        "history": list(learned.history),
    }
    (out / LEARNED).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / RECIPE).write_text(recipe(config, modules, learned), encoding="utf-8")


def recipe(config: Config, modules: Sequence[PEM], learned: Learned) -> str:
    """What pem compose --config reads: the same module from the same inputs."""
    names = letters(len(config.adapters))
    paths = {n: str(Path(p).absolute()) for n, p in zip(names, config.adapters, strict=True)}
    head = "none" if config.head == library.PER_TASK else config.head
    content: dict[str, Any] = {
        "expression": " + ".join(names), "modules": paths, "space": "delta", "head": head,
        "layers": _factors(modules, learned),
    }  # fmt: skip
    if config.rank is not None:
        content["rank"] = config.rank
    if config.dtype is not None:
        content["dtype"] = config.dtype
    return json.dumps(content, indent=1) + "\n"  # JSON is YAML
