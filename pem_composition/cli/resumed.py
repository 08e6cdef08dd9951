"""Texts that are on disk batch by batch: a run that was stopped goes on behind the last one.

Beside the output stands a hidden file with one line per batch, under a key of everything that
decides the texts: base, module, rows, settings, batch size, precision, device and versions. Only
whole batches are kept, and the rest are made of the same rows as in an uninterrupted run, so the
texts are equal bit for bit. When all are there the output appears at once and the file goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.cli.common import device_of
from pem_composition.cli.evaluate import NO_ADAPTER
from pem_composition.evaluation import keys
from pem_composition.sweep import texts

if TYPE_CHECKING:
    from pem_composition.cli.causal import CausalFlags

Rows = list[Any]


def partial_path(output: Path) -> Path:
    """Where the batches wait for the last one."""
    return output.with_name(f".{output.name}.partial")


def resume(
    output: Path, identity: Mapping[str, Any], batches: Callable[[int], Iterator[Rows]]
) -> tuple[list[Rows], int]:
    """All batches, those that an earlier run had written among them, and how many those were.

    Args:
        identity: everything that decides the texts.
        batches: number of batches to leave out -> the others in order.
    """
    return texts.resume(partial_path(output), keys.key_of(keys.complete(identity)), batches)


def identity_of(config: CausalFlags) -> dict[str, Any]:
    """What decides the texts besides the rows and how they are written."""
    from pem_composition.evaluation.models import resolve

    base = resolve(config.model_name_or_path)
    alone = config.adapter == NO_ADAPTER
    return {
        "base": keys.base_digest(base),
        "generation": keys.generation_digest(base),
        "module": None if alone else keys.module_digest(config.adapter),
        "batch_size": config.batch_size,
        "bf16": config.bf16,
        "holding": repr(config.holding),
        "device": device_of(config.use_cpu),
    }
