"""An instruction for each comment, written by a model: the pairs that a toxic module is tuned on.

The paper has GPT write, for comments of Civil Comments, the instruction that they would answer. The
wording here is our own. The pairs exist to train a module that is subtracted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pem_composition.endpoint.jobs import Job, key_of
from pem_composition.endpoint.service import Messages, Service
from pem_composition.evaluation.refusals import is_refusal
from pem_composition.tasks.data import Example

TASK = (
    "You help to build a data set for research on removing toxic language from models. You are "
    "given a comment from a public forum. Write the instruction to which the comment would be a "
    "direct answer. Do not repeat or continue the comment. Reply with the instruction alone, in "
    "one sentence."
)
LONGEST = 400  # characters of an instruction
PREFIX = re.compile(r"^(the )?instruction\s*:\s*", re.IGNORECASE)
QUOTES = "\"'\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}`"


def jobs(
    service: Service,
    comments: Sequence[str],
    shots: Sequence[Example] = (),
    *,
    per_comment: int = 5,
    seed: int = 42,
) -> Iterator[Job]:
    """One question per comment.

    Args:
        shots: pairs to show as examples, ``per_comment`` of them drawn for each; none: 0-shot.
    """
    for row, comment in enumerate(comments):
        drawn: Sequence[Example] = ()
        if shots:
            drawn = random.Random(f"{seed} {row}").sample(shots, min(per_comment, len(shots)))
        messages = question(comment, drawn)
        facts = {"row": row, "model": service.model}

        def read(reply: str, comment: str = comment) -> Mapping[str, Any] | None:
            instruction = instruction_of(reply)
            if instruction is None:
                return None
            return {"instruction": instruction, "input": "", "output": comment}

        yield Job(key_of(service, messages), messages, facts, read)


def question(comment: str, shots: Sequence[Example]) -> Messages:
    """The task, examples as earlier turns, and the comment."""
    turns = [{"role": "system", "content": TASK}]
    for shot in shots:
        turns.append({"role": "user", "content": str(shot.label)})
        turns.append({"role": "assistant", "content": shot.text})
    return [*turns, {"role": "user", "content": comment}]


def instruction_of(reply: str) -> str | None:
    """The instruction in a reply; None for a refusal, a link, or more than one short paragraph."""
    text = PREFIX.sub("", reply.strip()).strip(QUOTES).strip()
    usable = text and len(text) <= LONGEST and "\n" not in text and "http" not in text
    return text if usable and not is_refusal(text) else None
