"""Work that is on disk batch by batch: a run that was stopped goes on behind the last batch.

A hidden file beside the output holds one line per batch, under a key of everything that decides
them. Only whole batches are kept, and the rest are made of the same rows as in an uninterrupted
run, so the results are equal bit for bit. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pem_composition import json_lines, progress
from pem_composition.safe_files import stem

Batch = list[Any]


def partial_path(output: Path) -> Path:
    """Where the batches of an output wait for the last one."""
    return output.with_name(f".{stem(output)}.partial")


def resume(
    path: Path, key: str, batches: Callable[[int], Iterator[Batch]], total: int | None = None
) -> tuple[list[Batch], int]:
    """All batches, those that a stopped run had written among them, and how many those were.

    Each is on disk before the next is made. The caller takes the file away when all is kept.

    Args:
        key: of everything that decides the batches, their size included.
        batches: number of batches to leave out -> the others in order.
        total: rows of all batches, for an estimate of the time.
    """
    records = {(r.get("key"), r.get("batch")): r for r in json_lines.read(path)}
    kept: list[Batch] = []
    while (known := records.get((key, len(kept)))) is not None:
        kept.append(known["rows"])
    before = len(kept)
    if not before:
        path.unlink(missing_ok=True)  # of other settings, another model or module
    with progress.bar(total, "writing texts", "texts") as done:
        done(sum(map(len, kept)))
        for rows in batches(before):
            json_lines.append(path, {"key": key, "batch": len(kept), "rows": rows})
            kept.append(rows)
            done(len(rows))
    return kept, before
