"""How answers are found and searched for, how texts are written, and in which windows one is read.

No torch, so that programs check their flags at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pem_composition.errors import UsageError
from pem_composition.evaluation.encoded import IGNORED
from pem_composition.evaluation.keys import digest_of
from pem_composition.evaluation.model_names import max_input_length
from pem_composition.tasks.tokens import Tokens, start_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class Sampling:
    """How texts are written; the defaults sample from the model's own distribution.

    Attributes:
        max_new_tokens: tokens after the prompt; or
        max_length: tokens with the prompt (and its start token). One of the two.
        temperature: logits are divided by it.
        top_k: sample among the k most probable tokens; None: among all.
        top_p: sample among the fewest tokens that together have this probability.
        greedy: the most probable token instead of a sample.

    Raises:
        UsageError: no length or two, or a value out of its range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise UsageError.build(
                "--max_new_tokens", "the length must be said in one way",
                expected="--max_new_tokens N, or --max_length N with the prompt counted",
            )  # fmt: skip
        for name in ("max_new_tokens", "max_length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError.build(
                    f"--{name}", "cannot be used", found=value, expected="a number >= 1"
                )
        if not self.temperature > 0:
            raise UsageError.build(
                "--temperature", "cannot be used", found=self.temperature,
                expected="a number > 0", do="for the most probable token add --greedy",
            )  # fmt: skip
        if not 0 < self.top_p <= 1:
            raise UsageError.build(
                "--top_p", "not a probability", found=self.top_p, expected="0 < p <= 1"
            )
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, None, 1.0):
            raise UsageError.build(
                "--greedy", "samples nothing", found="--temperature, --top_k or --top_p beside it",
                do="leave out one or the other",
            )  # fmt: skip

    def steps(self, prompt: Sequence[int]) -> int:
        """Tokens that may follow a prompt."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        assert self.max_length is not None
        return self.max_length - len(prompt)


@dataclass(frozen=True)
class Windows:
    """Tokens per window, and from the beginning of one window to that of the next.

    Attributes:
        window: tokens that are read at once and predicted, the start token among them.
        start: which windows begin with the tokenizer's start token: every, first or none.

    Raises:
        UsageError: fewer than 2 tokens, or a stride that leaves tokens out.
    """

    window: int = 1024
    stride: int = 512
    start: str = EVERY

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError.build(
                "--window", "leaves nothing to predict", found=self.window, expected="at least 2"
            )
        if not 1 <= self.stride < self.window:
            raise UsageError.build(
                "--stride", "leaves out the first token of each window", found=self.stride,
                expected=f"1 to {self.window - 1}, less than the window",
            )  # fmt: skip

    def within(self, limit: int | None) -> Windows:
        """Windows that a model with this context can read; a stride of at most half of them."""
        if limit is None or self.window <= limit:
            return self
        return replace(self, window=limit, stride=min(self.stride, max(1, limit // 2)))

    def readable(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Windows as this model reads them: within its context, without a start token it lacks."""
        fitted = self.within(max_input_length(config, tokenizer))
        return fitted if start_tokens(tokenizer) else replace(fitted, start=NONE)

    def rows(self, tokens: Tokens, start: Tokens = []) -> list[tuple[Tokens, Tokens]]:  # noqa: B006
        """What is read and what is counted: targets that an earlier window counted are IGNORED.

        Args:
            start: what a text begins with; never counted.
        """
        head = start if self.start == EVERY else []
        text = [*start, *tokens] if self.start == FIRST else tokens
        size = max(1, self.window - len(head))
        # What stands before a text is no part of it; without a head nothing predicts its beginning.
        counted = len(text) - len(tokens) or int(not head)
        out = []
        for begin in range(0, len(text), min(self.stride, size)):
            end = min(begin + size, len(text))
            row = [*head, *text[begin:end]]
            known = len(head) + max(0, counted - begin)
            if known < len(row):
                out.append((row[:-1], [IGNORED] * (known - 1) + row[known:]))
            counted = max(counted, end)
            if end == len(text):
                break
        return out


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts, how they are continued, and how often.

    Attributes:
        name: what to call the prompts in a report.
        batch_size: rows per forward pass; changes no text.
    """

    texts: tuple[str, ...]
    decoding: Sampling
    samples: int
    seed: int
    name: str = ""
    batch_size: int | None = None

    @property
    def size(self) -> int:
        """Number of texts that are written."""
        return len(self.texts) * self.samples

    @property
    def groups(self) -> list[int] | None:
        """The prompt of each text, in order; None where there is one prompt."""
        if len(self.texts) == 1:
            return None
        return [p for p in range(len(self.texts)) for _ in range(self.samples)]

    def identity(self) -> dict[str, Any]:
        """What decides the texts besides the model."""
        return {
            "prompts": digest_of(self.texts),
            "decoding": asdict(self.decoding),
            "samples": self.samples,
            "seed": self.seed,
        }
