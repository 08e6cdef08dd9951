"""Rows divided once and for all: no random generator, no sentence in two parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pem_composition.errors import DataError
from pem_composition.same_texts import letters


def split_rows(
    rows: Sequence[dict[str, Any]], held_out: int, column: str = "text"
) -> dict[str, list[dict[str, Any]]]:
    """Deterministic train / validation / test of rows, classes equally often in each held-out part.

    Rows are ordered by the sha256 of their letters and digits, so the split depends on no random
    generator, and texts that differ only in case or punctuation are neighbours: a group of them
    is never cut in two. ``held_out`` is shared equally by the classes.

    Raises:
        DataError: the same text would stand in two splits.
    """
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "validation": [], "train": []}
    labels = sorted({row["label"] for row in rows})
    for label in labels:
        ordered = in_order([r for r in rows if r["label"] == label], column)
        for split in ("test", "validation"):
            count = held_out // len(labels)
            while 0 < count < len(ordered) and letters(ordered[count][column]) == letters(
                ordered[count - 1][column]
            ):
                count -= 1
            splits[split] += ordered[:count]
            del ordered[:count]
        splits["train"] += ordered
    where: dict[str, str] = {}
    for split, chosen in splits.items():
        chosen[:] = in_order(chosen, column)
        for row in chosen:
            key = letters(row[column])
            if where.setdefault(key, split) != split:
                raise DataError.build(
                    f"row {row['row_id']}", f"stands in {split} and in {where[key]}"
                )
    return splits


def in_order(rows: Sequence[dict[str, Any]], column: str = "text") -> list[dict[str, Any]]:
    """Rows by the sha256 of their letters: a fixed order that has nothing to do with content."""

    def key(row: Mapping[str, Any]) -> tuple[str, int]:
        return hashlib.sha256(letters(row[column]).encode()).hexdigest(), row["row_id"]

    return sorted(rows, key=key)
