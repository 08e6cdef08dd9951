"""Flags of programs that answer instructions: how they are written down, how answers are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition.errors import UsageError
from pem_composition.evaluation.search import Search
from pem_composition.training.config import flag

if TYPE_CHECKING:
    from pathlib import Path

    from pem_composition.tasks.data import Example

SEARCH = Search()


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """The search's defaults are the paper's; None where a flag was not given."""

    template: str | None = flag(
        None, "how an instruction is written down: sections (the default), chat or a JSON file"
    )
    max_instructions: int | None = flag(None, "take only the first N of a file")
    num_beams: int | None = flag(
        None, f"beams of the search; 1: greedy (default: {SEARCH.num_beams})"
    )
    repetition_penalty: float | None = flag(
        None,
        "log-probabilities of tokens that stand there already are multiplied by it; 1: off "
        f"(default: {SEARCH.repetition_penalty:g})",
    )
    max_new_tokens: int | None = flag(
        None, f"tokens of an answer at most (default: {SEARCH.max_new_tokens})"
    )

    @property
    def search(self) -> Search:
        """How answers are searched for.

        Raises:
            UsageError: a value out of its range.
        """
        names = ("num_beams", "repetition_penalty", "max_new_tokens")
        given = {n: v for n in names if (v := getattr(self, n)) is not None}
        return Search(**given)

    def check_answering(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: naming the flag.
        """
        check_positive(self, "max_instructions", "batch_size")
        _ = self.search

    def read(self, path: str | Path) -> list[Example]:
        """The instructions of a file.

        Raises:
            DataError: none, or a row that is none.
        """
        from pem_composition.tasks.files import read_table
        from pem_composition.tasks.instructions import examples_of

        return examples_of(read_table(path))[: self.max_instructions]


def check_positive(config: object, *names: str) -> None:
    """Refuse numbers below 1 among those that were given."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError.build(
                f"--{name}", "cannot be used", found=value, expected="a number >= 1"
            )
