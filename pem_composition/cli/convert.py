"""``pem convert``: a module in another layout or dtype, bit for bit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pem_composition.checkpoint import inspect_header
from pem_composition.checkpoint.content import LAYOUTS
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.serving import VLLM, max_lora_rank
from pem_composition.cli import common
from pem_composition.config import DTYPES, LoraConfig
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required

NAME = "convert"
HELP = "write a module in another layout or dtype: PEFT, adapter-transformers, mlx-lm; exact"
EXAMPLES = """
  pem convert runs/old runs/new --format peft
  pem convert runs/new runs/for-adapters --format adapter-transformers
  pem convert runs/new runs/served --format vllm --drop_saved
  pem convert runs/new runs/for-mlx --format mlx
  pem convert models/sharded models/single --max_shard_size 50GB
  pem convert models/pickled models/safe --dtype bfloat16
  pem convert runs/of-bare-model runs/of-classifier --prefix roberta
"""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem convert."""

    source: str = required("module or model directory", positional=True, metavar="IN")
    out: Path = required("output directory", positional=True, metavar="OUT")
    format: str = flag(
        "peft",
        "layout of an adapter (vllm: PEFT's, as vLLM serves it); whole models have one",
        choices=(*LAYOUTS, VLLM),
    )
    dtype: str | None = flag(None, "of the written tensors; default: as stored", choices=DTYPES)
    max_shard_size: str | None = flag(
        None, "whole models: at most this much per file, e.g. 200MB (default: 5GB)", metavar="SIZE"
    )
    prefix: str | None = flag(
        None,
        "adapters: put NAME. before the layers' names, e.g. roberta for a module of a "
        "bare model that is to be used with a classifier",
        metavar="NAME",
    )
    drop_saved: bool = flag(
        False, "vllm: leave out heads and parts saved whole, which it does not load"
    )
    overwrite: bool = flag(False, "replace an existing output", short="-o")

    def __post_init__(self) -> None:
        if self.drop_saved and self.format != VLLM:
            raise UsageError.build(
                "--drop_saved", "given without --format vllm", do="leave it out: all is converted"
            )


def run(config: Config) -> int:
    """Check by headers, write, print one line."""
    limit = size(config.max_shard_size) if config.max_shard_size else None
    common.check_output(config.out, config.overwrite)
    header = inspect_header(config.source)

    module = convert(
        config.source,
        config.out,
        format=config.format,
        dtype=config.dtype,
        max_shard_bytes=limit,
        prefix=config.prefix,
        drop_saved=config.drop_saved,
        overwrite=config.overwrite,
    )
    layout = "full" if header.kind == "full" else config.format
    count = len(module.tensors) or len(header.infos)  # a whole model comes back without tensors
    stored = config.dtype or ", ".join(sorted({i.dtype for i in header.infos.values()}))
    print(f"{config.out}: {config.source} in {layout} layout ({count} tensors, {stored})")
    if config.format == VLLM and isinstance(module.config, LoraConfig):
        rank = max_lora_rank(module.config.r, module.name)
        print(f"serve it with: vllm serve BASE --enable-lora --max-lora-rank {rank}")
    for note in module.provenance.notes:
        if not note.startswith("converted from"):  # the line above says so
            print(f"note: {note}")
    return 0


def size(text: str) -> int:
    """Bytes of a size such as 200MB.

    Raises:
        UsageError: not such a size.
    """
    match = re.fullmatch(r"(\d{1,9})\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    number = int(match[1]) * UNITS[(match[2] or "").upper()] if match else 0
    if number < 1:
        raise UsageError.build(
            "--max_shard_size", "not a size", found=repr(text), expected="such as 200MB or 5GB"
        )
    return number
