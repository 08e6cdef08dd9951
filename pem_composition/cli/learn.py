"""``pem learn``: coefficients by gradient descent on rows (AdaMerging, CAT, NSC); the module."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pem_composition.cli import common, sweep
from pem_composition.cli.flags import HEADS, EvaluationFlags, ModuleFlags
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, seed_flag

NAME = "learn"
HELP = "learn coefficients by gradient: adamerging and nsc (no labels), or cat (labels)"
EXAMPLES = """
  pem learn -a runs/rte runs/mnli -p runs/adamerged --method adamerging --head per-task \\
      --model_name_or_path minilm --task_name rte mnli --data_dir glue --max_eval_samples 200
  pem learn -a runs/a runs/b -p runs/cat --method cat --model_name_or_path t5-base \\
      --objective seq2seq --task_name rte mnli --data_dir glue --max_eval_samples 64
"""
ADAMERGING, CAT, NSC = "adamerging", "cat", "nsc"


@dataclass(frozen=True, kw_only=True)
class Config(ModuleFlags, EvaluationFlags):
    """Flags of pem learn."""

    method: str = flag(
        ADAMERGING,
        "adamerging: least entropy of the predictions; cat: least cross entropy; nsc: least share "
        "of the layers' inputs outside the rows of A (LoRA; one task per module)",
        choices=(ADAMERGING, CAT, NSC),
    )
    per: str = flag("layer", "a coefficient per layer, or one each", choices=("layer", "module"))
    bounds: str | None = flag(
        None,
        "coefficients in [0, 1] (default of adamerging), softmax over the modules "
        "(default of cat), or free (default of nsc)",
        choices=("clamp", "softmax", "none"),
    )
    init: float = flag(0.3, "where coefficients start")
    learning_rate: float | None = flag(
        None, "of Adam; default 1e-3 (adamerging, nsc) or 1e-2 (cat)", above=0
    )
    max_steps: int = flag(100, "each on one batch of every task", least=0)
    seed: int = seed_flag("of the order of the batches")
    head: str = flag(
        "average", "which head answers; per-task: that of module i for task i", choices=HEADS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return 1e-2 if self.method == CAT else 1e-3


def run(config: Config) -> int:
    """Learn, and write the module, its recipe and how the loss went."""
    config = replace(config, space=("delta",))
    if config.harness_tasks:
        raise UsageError.build(
            "--harness_tasks", "coefficients are learned from rows that have a loss",
            do="use pem search",
        )  # fmt: skip
    setup = sweep.check(config, (0.0, 1.0, 1.0), config.head)
    common.check_output(setup.out, config.overwrite)
    from pem_composition.sweep import learned

    learning = learned.learning
    loss, bounds = {
        ADAMERGING: (learning.ENTROPY, learning.CLAMP),
        CAT: (learning.LABELS, learning.SOFTMAX),
        NSC: (learning.NULL_SPACE, learning.FREE),
    }[config.method]
    rule = learning.LearningRule(
        loss=loss,
        scope=config.per,
        constraint=config.bounds or bounds,
        init=config.init,
        learning_rate=config.rate,
        steps=config.max_steps,
        seed=config.seed,
    )
    mismatch = config.allow_base_mismatch
    merged, found = learned.run(
        setup, rule, config.method, allow_base_mismatch=mismatch, say=common.say
    )
    told = f"{len(merged.provenance.terms)} modules with learned coefficients"
    common.report_line(setup.out, told, merged.provenance, bool(merged.head_names))
    print(f"mean loss {found.before:.4f} -> {found.after:.4f} in {config.max_steps} steps")
    return 0
