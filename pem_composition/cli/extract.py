"""``pem extract``: a LoRA module out of a base and a tuned checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.arithmetic import ranks
from pem_composition.arithmetic.ranks import Rank
from pem_composition.checkpoint.content import LAYOUTS
from pem_composition.checkpoint.extraction import extract_lora
from pem_composition.cli import common
from pem_composition.config import DTYPES
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required, seed_flag
from pem_composition.safe_files import real_path

NAME = "extract"
HELP = "a LoRA module out of two checkpoints: the SVD of W_tuned - W_base, by layer"
EXAMPLES = """
  pem extract models/llama models/llama-tuned -p runs/tuned --rank 0.95
  pem extract models/llama models/llama-tuned -p runs/tuned --rank 16 --method randomized \\
      --target_modules q_proj v_proj
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem extract."""

    base: str = required("the model it was tuned from", positional=True, metavar="BASE")
    tuned: str = required("the tuned model", positional=True, metavar="TUNED")
    save_path: Path = required("output directory", short="-p", metavar="OUT")
    rank: Rank = required(
        "of every layer, or the share of its energy to keep, such as 0.95", metavar=ranks.METAVAR
    )
    method: str = flag(
        "exact",
        "a dense SVD, or subspace iteration: as good to a few digits, much faster for wide layers",
        choices=("exact", "randomized"),
    )
    target_modules: tuple[str, ...] = flag(
        (), "layers by name or suffix; default: every linear layer that differs", metavar="NAME"
    )
    strict: bool = flag(
        False, "refuse if a bias, norm or embedding differs, too, which is left out"
    )
    seed: int = seed_flag("of the randomised method", 0)
    dtype: str | None = flag(None, "of the factors (default: float32)", choices=DTYPES)
    format: str = flag("peft", "layout of the output", choices=tuple(LAYOUTS))
    overwrite: bool = flag(False, "replace an existing output", short="-o")


def run(config: Config) -> int:
    """Check the paths, extract, write, print one line."""
    base = common.resolved(config.base)
    common.check_output(config.save_path, config.overwrite)
    (header,) = common.headers_of([config.tuned], [real_path(Path(config.tuned)).name])
    if header.kind != "full":
        raise UsageError.build(
            "TUNED",
            f"{config.tuned} is no whole model",
            found=f"kind {header.kind}",
            expected="a model directory",
            do="use the module as it is",
        )

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
