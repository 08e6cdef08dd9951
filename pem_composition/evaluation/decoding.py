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
from pem_composition.flag_declarations import check_ranges, flag
from pem_composition.tasks.tokens import Tokens, start_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ANSWERS = SCORING, CONSTRAINED, FREE = ("scoring", "constrained", "free")
STARTS = EVERY, FIRST, NONE = ("every", "first", "none")  # windows that begin with a start token


@dataclass(frozen=True)
class BeamSearch:
    """Beam search with a repetition penalty (arXiv:1909.05858); the defaults are the paper's.

    At least one token of an answer is written.

    Raises:
        UsageError: a value out of its range.
    """

    num_beams: int = flag(4, "beams of the search; 1: greedy", least=1)
    repetition_penalty: float = flag(
        2.5,
        "log-probabilities of tokens that stand there already are multiplied by it; 1: off",
        above=0,
    )
    max_new_tokens: int = flag(128, "tokens of an answer at most", least=1)

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


@dataclass(frozen=True)
class Sampling:
    """How texts are written; the defaults sample from the model's own distribution.

    The prompt's start token counts in ``max_length``.

    Raises:
        UsageError: no length or two, or a value out of its range.
    """

    max_new_tokens: int | None = flag(None, "tokens that are written; or --max_length", least=1)
    max_length: int | None = flag(
        None, "tokens with the prompt counted; or --max_new_tokens", least=1
    )
    temperature: float = flag(
        1.0, "logits are divided by it", above=0, do="for the most probable token add --greedy"
    )
    top_k: int | None = flag(None, "sample among the k most probable tokens; default: all", least=1)
    top_p: float = flag(
        1.0, "sample among the fewest tokens of this total probability; 1: all", above=0, most=1
    )
    greedy: bool = flag(False, "write the most probable token instead of a sample")

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise UsageError.build(
                "--max_new_tokens", "the length must be said in one way",
                expected="--max_new_tokens N, or --max_length N with the prompt counted",
            )  # fmt: skip
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
    """How a long text is read; the start token counts as one of a window.

    Raises:
        UsageError: fewer than 2 tokens, or a stride that leaves tokens out.
    """

    window: int = flag(1024, "tokens that are read at once; at most the model's context", least=2)
    stride: int = flag(512, "tokens from the beginning of one window to the next", least=1)
    start: str = flag(
        EVERY,
        "windows that begin with the start token of a tokenizer that has one: every (the default, "
        "as scoring harnesses do), first (the beginning of the text alone) or none",
        choices=STARTS,
    )

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
        if self.stride >= self.window:
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
        """The prompt of each text, in order; None of one prompt, or of one text of each."""
        if 1 in (len(self.texts), self.samples):
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
