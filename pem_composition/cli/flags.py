"""Flags that several programs share, and the checks that need nothing but their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pem_composition.errors import UsageError

ADACONFIG_KINDS = {"lora": "lora", "ia3": "ia3", "fft": "full"}
MERGE_WAYS = ("simple",)
DTYPES = ("float32", "float16", "bfloat16", "float64")
FORMATS = ("peft", "adapter-transformers")
SPACES = ("parameter", "delta")
HEADS = ("average", "first", "last", "none", "error")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where and how a composed module is written; a sweep may have two spaces."""

    save_path: Path = field(metadata={"short": "-p", "metavar": "OUT", "help": "output directory"})
    overwrite: bool = field(
        default=False, metadata={"short": "-o", "help": "replace an existing output"}
    )
    space: tuple[str, ...] = field(
        default=(),
        metadata={
            "choices": SPACES,
            "help": "add the modules' own tensors (parameter: the paper, the default) or the exact "
            "updates they make (delta); with --evaluate both, unless one is named",
        },
    )
    rank: int | None = field(
        default=None, metadata={"metavar": "R", "help": "delta space: best LoRA of rank R"}
    )
    format: str = field(
        default="peft", metadata={"choices": FORMATS, "help": "layout of the output"}
    )
    dtype: str | None = field(
        default=None,
        metadata={"choices": DTYPES, "help": "of the written tensors; default: as read"},
    )
    allow_base_mismatch: bool = field(
        default=False,
        metadata={"help": "combine modules whose base models are recorded as different"},
    )

    def __post_init__(self) -> None:
        if len(set(self.space)) < len(self.space):
            raise UsageError.build(
                "--space",
                "a space given twice",
                found=" ".join(self.space),
                do="give each space once",
            )
        if self.rank is not None and self.rank < 1:
            raise UsageError.build(
                "--rank", "not a rank", found=self.rank, expected="a whole number >= 1"
            )

    @property
    def one_space(self) -> str:
        """The space of a single composition; parameter unless given.

        Raises:
            UsageError: two spaces, or a rank outside delta space.
        """
        if len(self.space) > 1:
            raise UsageError.build(
                "--space",
                "two spaces make two modules",
                found=" ".join(self.space),
                do="give one, or add --evaluate",
            )
        space = self.space[0] if self.space else "parameter"
        if self.rank is not None and space != "delta":
            raise UsageError.build(
                "--rank",
                "applies to delta space only",
                found=f"space {space}",
                do="add --space delta",
            )
        return space


@dataclass(frozen=True, kw_only=True)
class ModuleFlags(OutputFlags):
    """Which modules are read, and what the caller believes about them."""

    adapters: tuple[str, ...] = field(
        default=(), metadata={"short": "-a", "metavar": "DIR", "help": "module directories"}
    )
    model: tuple[str, ...] = field(
        default=(),
        metadata={
            "short": "-m",
            "metavar": "MODEL",
            "help": "base model, checked against the modules",
        },
    )
    adatasks: tuple[str, ...] = field(
        default=(),
        metadata={
            "short": "-t",
            "metavar": "NAME",
            "help": "one name per module; the output is OUT/<names joined by _>",
        },
    )
    adaconfig: str | None = field(
        default=None,
        metadata={
            "short": "-c",
            "choices": tuple(ADACONFIG_KINDS),
            "help": "kind of the modules, checked",
        },
    )
    dropout_list: tuple[float, ...] = field(
        default=(),
        metadata={
            "short": "-d",
            "metavar": "P",
            "help": "one dropout probability per module; accepted, without effect on the sum",
        },
    )


@dataclass(frozen=True, kw_only=True)
class MergeFlags(ModuleFlags):
    """How several modules become one; ``merge`` and ``analogy``."""

    merge_way: str = field(
        default="simple",
        metadata={"short": "-w", "metavar": "WAY", "help": "simple: the weighted sum"},
    )
    merge_head: bool | None = field(
        default=None, metadata={"help": "average the heads with the coefficients (--head average)"}
    )
    head: str | None = field(
        default=None,
        metadata={
            "choices": HEADS,
            "help": "which head the result has; default: as --merge_head says",
        },
    )
    full_merge: bool = field(
        default=False, metadata={"help": "whole fine-tuned models instead of adapters"}
    )
    fisher_list: tuple[str, ...] = field(
        default=(),
        metadata={
            "short": "-f",
            "nargs": "*",
            "metavar": "FILE",
            "help": "one Fisher file per module (-w fisher)",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_merge_way(self.merge_way, self.fisher_list)
        if (
            self.head is not None
            and self.merge_head is not None
            and (self.head == "average") != self.merge_head
        ):
            raise UsageError.build(
                "--head",
                f"contradicts --merge_head {str(self.merge_head).lower()}",
                found=f"--head {self.head}",
                do="give one of the two",
            )

    def head_policy(self, default: str) -> str:
        """--head if given; --merge_head true is average; else the program's default."""
        if self.head is not None:
            return self.head
        return "average" if self.merge_head else default


def check_merge_way(way: str, fisher: Sequence[str]) -> None:
    """Refuse methods that do not exist, naming those that do."""
    if way not in MERGE_WAYS:
        raise UsageError.build(
            "--merge_way", "no such method here", found=f"'{way}'", expected=" or ".join(MERGE_WAYS)
        )
    if fisher:
        raise UsageError.build(
            "--fisher_list",
            "applies to --merge_way fisher only",
            found=f"--merge_way {way}",
            do="leave it out",
        )


def check_count(flag: str, values: Sequence[Any], modules: int, what: str) -> None:
    """One value per module."""
    if len(values) != modules:
        raise UsageError.build(
            flag, f"one {what} per module is needed", found=len(values), expected=modules
        )


def check_adapters(
    adapters: Sequence[str], wanted: str, at_least: int, at_most: int | None = None
) -> None:
    """Refuse a wrong number of module directories."""
    if len(adapters) < at_least or (at_most is not None and len(adapters) > at_most):
        raise UsageError.build(
            "-a/--adapters", "wrong number of modules", found=len(adapters), expected=wanted
        )


def check_dropout(values: Sequence[float], modules: int) -> None:
    """--dropout_list has no effect, but a wrong one shows a mistake in the script."""
    if values:
        check_count("--dropout_list", values, modules, "probability")
    for p in values:
        if not 0 <= p < 1:
            raise UsageError.build(
                "--dropout_list", "not a dropout probability", found=p, expected="0 <= p < 1"
            )


def normalised(steps: Sequence[float], flag: str = "--search_step") -> tuple[float, ...]:
    """Entries divided by their sum, as the reference programs do.

    Raises:
        UsageError: a negative entry (it would change the scale of all others) or a sum of zero.
    """
    do = "use --coefficients, which are taken as given"
    for step in steps:
        if step < 0:
            reason = f"{flag} is divided by its sum, so a negative entry would rescale the others"
            raise UsageError.build(flag, reason, found=f"{step:g}", expected="entries >= 0", do=do)
    total = sum(steps)
    if not total:
        raise UsageError.build(
            flag, f"{flag} is divided by its sum, which is 0", found=list(steps), do=do
        )
    return tuple(step / total for step in steps)


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """What modules are scored on; named as in the Hugging Face example programs."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "base model to evaluate on: a directory or a name"}
    )
    task_name: str | None = field(
        default=None, metadata={"help": "task, e.g. rte; gives columns, labels and metric"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "rows on which coefficients are selected"}
    )
    test_file: str | None = field(
        default=None,
        metadata={"help": "rows on which the table is made; default: the validation rows"},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with dev and test files, or with one such folder per task"},
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "tokens per example (default: 128)"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "use only N rows per split"}
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "rows per batch (default: 64)"}
    )
    reference_module: str | None = field(
        default=None,
        metadata={
            "metavar": "DIR",
            "help": "one more module to compare with, e.g. of the full set",
        },
    )
    use_cpu: bool | None = field(default=None, metadata={"help": "do not use a GPU"})


def refuse_flags(config: EvaluationFlags, needed: str) -> None:
    """Refuse evaluation flags where nothing is evaluated."""
    for spec in fields(EvaluationFlags):
        if getattr(config, spec.name) is not None:
            raise UsageError.build(
                f"--{spec.name}",
                f"has no effect without {needed}",
                do=f"add {needed} or leave it out",
            )
