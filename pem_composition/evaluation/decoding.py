"""How answers are found and searched for, and how windows of a text begin. No torch, so that
programs check their flags at once."""

from __future__ import annotations

from dataclasses import dataclass

from pem_composition.errors import UsageError

ANSWERS = SCORING, CONSTRAINED, FREE = ("scoring", "constrained", "free")
STARTS = EVERY, FIRST, NONE = ("every", "first", "none")  # windows that begin with a start token


@dataclass(frozen=True)
class BeamSearch:
    """Beam search with a repetition penalty; the defaults are the paper's.

    Attributes:
        num_beams: beams; 1 writes the most probable token, penalty considered.
        repetition_penalty: log-probabilities of tokens that stand in prompt or answer are
            multiplied by it (arXiv:1909.05858); 1 for none.
        max_new_tokens: tokens of an answer at most; at least one is written.

    Raises:
        UsageError: a value out of its range.
    """

    num_beams: int = 4
    repetition_penalty: float = 2.5
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UsageError.build(
                    f"--{name}", "cannot be used", found=getattr(self, name), expected="at least 1"
                )
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError.build(
                "--repetition_penalty", "cannot be used", found=self.repetition_penalty,
                expected="a number > 0; 1 for none",
            )  # fmt: skip
