"""``pem extract``: a LoRA module out of a base and a tuned checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pem_composition.cli import common
from pem_composition.config import DTYPES, LAYOUTS
from pem_composition.errors import UsageError

NAME = "extract"
HELP = "a LoRA module of rank R out of two checkpoints: the SVD of W_tuned - W_base, by layer"
EXAMPLES = """
  pem extract models/llama models/llama-tuned -p runs/tuned --rank 16
  pem extract models/llama models/llama-tuned -p runs/tuned --rank 16 --method randomized \\
      --target_modules q_proj v_proj
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem extract."""

    base: str = field(
        metadata={"positional": True, "metavar": "BASE", "help": "the model it was tuned from"}
    )
    tuned: str = field(metadata={"positional": True, "metavar": "TUNED", "help": "the tuned model"})
    save_path: Path = field(metadata={"short": "-p", "metavar": "OUT", "help": "output directory"})
    rank: int = field(metadata={"metavar": "R", "help": "of every layer"})
    method: str = field(
        default="exact",
        metadata={
            "choices": ("exact", "randomized"),
            "help": "a dense SVD, or subspace iteration: as good to a few digits, much faster for "
            "wide layers",
        },
    )
    target_modules: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "NAME",
            "help": "layers by name or suffix; default: every linear layer that differs",
        },
    )
    strict: bool = field(
        default=False,
        metadata={"help": "refuse if a bias, norm or embedding differs, too, which is left out"},
    )
    seed: int = field(default=0, metadata={"help": "of the randomised method"})
    dtype: str | None = field(
        default=None, metadata={"choices": DTYPES, "help": "of the factors (default: float32)"}
    )
    format: str = field(
        default="peft", metadata={"choices": LAYOUTS, "help": "layout of the output"}
    )
    overwrite: bool = field(
        default=False, metadata={"short": "-o", "help": "replace an existing output"}
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError.build(
                "--rank", "not a rank", found=self.rank, expected="a whole number >= 1"
            )


def run(config: Config) -> int:
    """Check the paths, extract, write, print one line."""
    base = common.resolved(config.base)
    common.check_output(config.save_path, config.overwrite)
    (header,) = common.headers_of([config.tuned], [Path(config.tuned).resolve().name])
    if header.kind != "full":
        raise UsageError.build(
            "TUNED",
            f"{config.tuned} is no whole model",
            found=f"kind {header.kind}",
            expected="a model directory",
            do="use the module as it is",
        )
    from pem_composition.checkpoint.extract import extract_lora

    module = extract_lora(
        base,
        config.tuned,
        rank=config.rank,
        method=config.method,
        target_modules=config.target_modules,
        strict=config.strict,
        seed=config.seed,
        dtype=config.dtype,
    )
    module.save(
        config.save_path, format=config.format, dtype=config.dtype, overwrite=config.overwrite
    )
    common.report(config.save_path, module)
    return 0
