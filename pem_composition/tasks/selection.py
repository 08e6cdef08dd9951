"""Rows chosen for an experiment: by score, without those of the test files, a part set aside.

What a module is trained on and what it is tested on must not overlap. Texts are compared up to
case, space and punctuation (``instructions.fingerprints``): comments of any length, instructions
and answers where they are long enough not to be alike by chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pem_composition.errors import DataError
from pem_composition.tasks.data import TRAIN, VALIDATION, texts_of
from pem_composition.tasks.document_rows import LANGUAGE, ScoreFilter
from pem_composition.tasks.instruction_rows import (
    OUTPUT,
    SHORTEST_SHARED,
    fingerprints,
    has_instructions,
)
from pem_composition.tasks.tables import Table

BEGINNING = "{beginning}"


@dataclass(frozen=True)
class RowChoice:
    """Which rows are taken.

    Attributes:
        score: keep rows with a score above a threshold; None keeps all.
        instructions: each comment becomes the answer to one of these, in turn; none: rows as read.
            Where one says ``{beginning}``, the first half of the comment's words stands in it, and
            the rest is the answer.
        samples: training rows, drawn at random; None: all that are left.
        validation_size: rows drawn first and set aside.
    """

    score: ScoreFilter | None = None
    instructions: tuple[str, ...] = ()
    samples: int | None = None
    validation_size: int = 0
    seed: int = 42


@dataclass(frozen=True)
class Selection:
    """The chosen rows by part, in the order of the file, and how many were left out for what."""

    parts: dict[str, list[dict[str, Any]]]
    counts: dict[str, int]


def select(table: Table, choice: RowChoice, excluded: Sequence[Table] = ()) -> Selection:
    """Choose rows of a table.

    Args:
        excluded: tables whose texts may not stand in a chosen row.

    Raises:
        DataError: no score column, no row left, or fewer rows than are asked for.
    """
    kept = list(range(len(table.rows))) if choice.score is None else choice.score.rows(table)
    counts = {"rows": len(table.rows), "below_threshold": len(table.rows) - len(kept)}
    shortest = SHORTEST_SHARED if has_instructions(table) else 1
    texts = fingerprints(table, shortest)
    taken = frozenset().union(*(k for other in excluded for k in fingerprints(other, shortest)))
    apart = [i for i in kept if not texts[i] & taken]
    distinct = _distinct(apart, texts)
    counts |= {"overlapping": len(kept) - len(apart), "repeated": len(apart) - len(distinct)}
    wanted = choice.validation_size + (choice.samples or 1)
    if len(distinct) < wanted:
        raise DataError.build(
            table.name, "too few rows are left", found=len(distinct), expected=f"at least {wanted}",
            do="lower --samples, --validation_size or --score_above",
        )  # fmt: skip
    random.Random(choice.seed).shuffle(distinct)
    held = choice.validation_size
    chosen = {VALIDATION: distinct[:held], TRAIN: distinct[held:][: choice.samples]}
    parts = {
        name: _rows(table, sorted(numbers), choice.instructions)
        for name, numbers in chosen.items()
        if numbers
    }
    return Selection(parts, counts | {name: len(rows) for name, rows in parts.items()})


def _distinct(numbers: Sequence[int], texts: Sequence[frozenset[str]]) -> list[int]:
    """Rows none of whose texts stands in an earlier one."""
    seen: set[str] = set()
    out = []
    for i in numbers:
        if not texts[i] & seen:
            out.append(i)
        seen |= texts[i]
    return out


def _rows(
    table: Table, numbers: Sequence[int], instructions: Sequence[str]
) -> list[dict[str, Any]]:
    if not instructions:
        return [table.rows[i] for i in numbers]
    texts = texts_of(table, LANGUAGE)
    pairs = [
        _pair(instructions[place % len(instructions)], texts[number].strip())
        for place, number in enumerate(numbers)
    ]
    return [
        {"instruction": instruction, "input": "", OUTPUT: answer, "row": number}
        for (instruction, answer), number in zip(pairs, numbers, strict=True)
    ]


def _pair(instruction: str, comment: str) -> tuple[str, str]:
    """The instruction and its answer."""
    if BEGINNING not in instruction:
        return instruction, comment
    words = comment.split()
    half = len(words) // 2
    return instruction.replace(BEGINNING, " ".join(words[:half])), " ".join(words[half:])
