"""What is learned from rows and how models are scored on them: one class per objective.

An objective reads its rows, encodes them for training with a loss, and prepares them for the
evaluation of any number of models. No torch before there is a model, so that programs refuse rows
at once.
"""

from __future__ import annotations

from pem_composition.evaluation.decoding import SCORING
from pem_composition.objectives.answers import Answers
from pem_composition.objectives.classification import Classification
from pem_composition.objectives.documents import Documents
from pem_composition.objectives.instructions import Instructions
from pem_composition.objectives.next_block import NextBlocks
from pem_composition.objectives.objective import Objective
from pem_composition.tasks.instruction_rows import get_template


def objective_of(
    name: str,
    *,
    next_block: bool,
    max_seq_length: int,
    block_size: int,
    prompt: str | None,
    template: str | None = None,
    found: str | None = None,
    order: tuple[int, ...] = (),
) -> Objective:
    """What ``--objective NAME`` names; values as those of the classes."""
    if name == "classification":
        return Classification(order, max_seq_length=max_seq_length)
    if name == "causal_lm":
        return Documents(max_seq_length=max_seq_length)
    if name == "instruction":
        return Instructions(get_template(template), max_seq_length=max_seq_length)
    if next_block:
        return NextBlocks(max_seq_length=block_size)
    written = get_template(template) if template else None
    return Answers(prompt, found or SCORING, written, max_seq_length=max_seq_length)
