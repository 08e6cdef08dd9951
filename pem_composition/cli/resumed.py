"""Texts that are on disk batch by batch: a run that was stopped goes on behind the last one.

Beside the output stands a hidden file with one line per batch, under a key of everything that
decides the texts: base, module, rows, settings, batch size, precision, device and versions. Only
whole batches are kept, and the rest are made of the same rows as in an uninterrupted run, so the
texts are equal bit for bit. When all are there the output appears at once and the file goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint import locate
from pem_composition.checkpoint.files import sha256_file
from pem_composition.cli.common import device_of
from pem_composition.cli.evaluate import NO_ADAPTER
from pem_composition.sweep.result_store import ResultStore

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
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = partial_path(output)
    kept: list[Rows] = []
    records = ResultStore(path).records
    while (known := records.get(f"{key} {len(kept)}")) is not None:
        kept.append(known["rows"])
    before = len(kept)
    if not before:
        path.unlink(missing_ok=True)  # of other settings, another model or module
    store = ResultStore(path)
    for rows in batches(before):
        store.append({"key": f"{key} {len(kept)}", "rows": rows})
        kept.append(rows)
    return kept, before


def identity_of(config: CausalFlags) -> dict[str, Any]:
    """What decides the texts besides the rows and how they are written."""
    from pem_composition.evaluation.models import resolve

    base = Path(resolve(config.model_name_or_path))
    module = None if config.adapter == NO_ADAPTER else locate(config.adapter)[0]
    return {
        "base": _digest(base) if base.is_dir() else str(base),
        "module": module and _digest(module),
        "batch_size": config.batch_size,
        "bf16": config.bf16,
        "holding": repr(config.holding),
        "device": device_of(config.use_cpu),
        "versions": [version(name) for name in ("pem_composition", "torch", "transformers")],
    }


def _digest(folder: Path) -> list[tuple[str, str]]:
    return [(path.name, sha256_file(path)) for path in sorted(folder.iterdir()) if path.is_file()]
