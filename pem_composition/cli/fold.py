"""``pem fold``: an expression over modules folded into a checkpoint, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.arithmetic import trees
from pem_composition.arithmetic.compatible import SPACES
from pem_composition.arithmetic.expression import parse
from pem_composition.arithmetic.head_policies import ONE_HEAD
from pem_composition.checkpoint import fold_checkpoint, inspect_header
from pem_composition.cli import common
from pem_composition.cli.compose import bindings, check_names
from pem_composition.cli.flags import named
from pem_composition.config import DTYPES
from pem_composition.flag_declarations import flag, required

NAME = "fold"
HELP = 'fold an expression into a checkpoint, streamed: "a", "0.6*a + 0.4*b", "lora + 0.5*model"'
EXAMPLES = """
  pem fold "a" --module a=runs/rte --model models/roberta-base -p models/rte
  pem fold "0.6*a + 0.4*b" --module a=runs/a --module b=runs/b -m models/llama -p out --space delta
  pem fold "a + 0.5*f" --module a=runs/lora --module f=models/tuned -m models/llama -p out
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem fold."""

    expression: str = required(
        "as for pem compose; LoRA, (IA)^3 and whole models can be added to each other",
        positional=True,
    )
    module: tuple[str, ...] = named("what a name stands for; once per name")
    model: str = required("the checkpoint that is folded into", short="-m", metavar="BASE")
    save_path: Path = required("output directory", short="-p", metavar="OUT")
    overwrite: bool = flag(False, "replace an existing output", short="-o")
    space: str | None = flag(
        None,
        "of sums over modules of one kind, as for pem compose; sums over several kinds "
        "are of updates (delta)",
        choices=SPACES,
    )
    head: str = flag(
        "average", "which head the checkpoint gets; none: it keeps the base's", choices=ONE_HEAD
    )
    dtype: str | None = flag(None, "of the written tensors; default: the base's", choices=DTYPES)
    allow_base_mismatch: bool = flag(False, "fold modules that record another base model than BASE")


def run(config: Config) -> int:
    """Check what needs no tensor, fold, print one line."""
    tree = parse(config.expression)
    modules = bindings(config.module)
    check_names(trees.names(tree), modules)
    base = common.resolved(config.model)
    common.check_output(config.save_path, config.overwrite)
    fold_checkpoint(
        tree,
        modules,
        base,
        config.save_path,
        space=config.space,
        head=config.head,
        dtype=config.dtype,
        allow_base_mismatch=config.allow_base_mismatch,
        overwrite=config.overwrite,
    )
    written = inspect_header(config.save_path)
    expression = (
        f"{config.model} + {tree}" if not str(tree).startswith("-") else f"{config.model} {tree}"
    )
    common.report_line(config.save_path, expression, written.provenance, bool(written.head_shapes))
    return 0
