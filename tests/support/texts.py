"""What a model writes, asked batch by batch as the programs ask, put in the order of the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pem_composition.evaluation import beams, instruction_answers, text_sampling


def generate(*given: Any, **options: Any) -> list[text_sampling.Sample]:
    return [s for batch in text_sampling.batches(*given, **options) for s in batch]


def write(*given: Any, **options: Any) -> list[beams.BeamText]:
    return _in_order(beams.batches(*given, **options))


def answers(*given: Any, **options: Any) -> list[instruction_answers.Answer]:
    return _in_order(instruction_answers.answer_batches(*given, **options))


def _in_order(batches: Iterable[dict[int, Any]]) -> list[Any]:
    found = {number: one for batch in batches for number, one in batch.items()}
    return [found[number] for number in range(len(found))]
