"""Flags of programs that let a causal language model write or read texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.cli.flags import DeviceFlags
from pem_composition.cli.values import Share
from pem_composition.errors import UsageError
from pem_composition.evaluation.decoding import (
    BeamSearch,
    Prompts,
    Sampling,
    Windows,
)
from pem_composition.flag_declarations import flag, required, same, seed_flag
from pem_composition.tasks.data import read_prompts
from pem_composition.tasks.document_rows import THRESHOLD
from pem_composition.tasks.instruction_rows import examples_of
from pem_composition.tasks.tables import read_table
from pem_composition.training.training_flags import LoadFlags

if TYPE_CHECKING:
    from pem_composition.tasks.data import Example

NO_ADAPTER = "none"


@dataclass(frozen=True, kw_only=True)
class BatchFlags(DeviceFlags):
    """How fast texts are written and read."""

    batch_size: int | None = flag(None, "rows per forward pass; default: by the device", least=1)


@dataclass(frozen=True, kw_only=True)
class CausalFlags(BatchFlags, LoadFlags):
    """A causal language model, alone or with a module."""

    model_name_or_path: str = required(
        "base model, or a fully fine-tuned one: GPT-2, Llama or another decoder"
    )
    adapter: str = flag(NO_ADAPTER, "module directory to attach, or none")
    allow_base_mismatch: bool = flag(False, "take a module of another base model all the same")

    def __post_init__(self) -> None:
        self.check_load()

    @property
    def model_options(self) -> dict[str, Any]:
        """The same for the library's ``CausalModel``."""
        return {
            "base": self.model_name_or_path,
            "adapter": None if self.adapter == NO_ADAPTER else self.adapter,
            "load_options": self.load_options,
            "bf16": self.bf16,
            "use_cpu": self.use_cpu,
            "allow_base_mismatch": self.allow_base_mismatch,
        }


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """Beginnings of texts, and how they are continued."""

    prompt: str | None = flag(None, "the beginning of every text")
    prompt_file: str | None = flag(
        None, "prompts: a table with a column prompt or text, or RealToxicityPrompts as published"
    )
    max_prompts: int | None = flag(None, "take only the first N prompts of the file", least=1)
    num_samples: int = flag(1, "texts per prompt", least=1)
    max_new_tokens: int | None = same(Sampling, "max_new_tokens")
    max_length: int | None = same(Sampling, "max_length")
    temperature: float = same(Sampling, "temperature")
    top_k: int | None = same(Sampling, "top_k")
    top_p: float = same(Sampling, "top_p")
    greedy: bool = same(Sampling, "greedy")
    seed: int = seed_flag("with prompt and sample number it decides a text, whatever the batch")

    def check_prompts(self) -> None:
        """One of the two says what the texts begin with.

        Raises:
            UsageError: neither, or both.
        """
        if (self.prompt is None) == (self.prompt_file is None):
            raise UsageError.build(
                "--prompt", "says what the texts begin with",
                found="no --prompt_file either" if self.prompt is None else "--prompt_file as well",
                expected="--prompt or --prompt_file",
            )  # fmt: skip

    def prompts(self, decoding: Sampling, batch_size: int | None) -> Prompts:
        """The same for the library.

        Raises:
            DataError: a file without prompts.
        """
        if self.prompt_file is None:
            texts, name = [str(self.prompt)], "one prompt"
        else:
            texts = read_prompts(self.prompt_file)[: self.max_prompts]
            name = Path(self.prompt_file).name
        return Prompts(tuple(texts), decoding, self.num_samples, self.seed, name, batch_size)

    def decoding(self) -> Sampling:
        """How texts are written.

        Raises:
            UsageError: no length or two, or a value out of its range.
        """
        return Sampling(
            self.max_new_tokens, self.max_length, self.temperature, self.top_k, self.top_p,
            self.greedy,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """How instructions are written down, how answers are found; defaults are the paper's."""

    template: str | None = flag(
        None, "how an instruction is written down: sections (the default), chat or a JSON file"
    )
    max_instructions: int | None = flag(None, "take only the first N of a file", least=1)
    num_beams: int = same(BeamSearch, "num_beams")
    repetition_penalty: float = same(BeamSearch, "repetition_penalty")
    max_new_tokens: int = same(BeamSearch, "max_new_tokens")

    @property
    def search(self) -> BeamSearch:
        """How answers are searched for."""
        return BeamSearch(self.num_beams, self.repetition_penalty, self.max_new_tokens)

    def read(self, path: str | Path) -> list[Example]:
        """The instructions of a file.

        Raises:
            DataError: none, or a row that is none.
        """
        return examples_of(read_table(path))[: self.max_instructions]


@dataclass(frozen=True, kw_only=True)
class WindowFlags:
    """How a long text is read."""

    window: int = same(Windows, "window")
    stride: int = same(Windows, "stride")
    start_token: str = same(Windows, "start")

    @property
    def windows(self) -> Windows:
        """The same for the library."""
        return Windows(self.window, self.stride, self.start_token)


@dataclass(frozen=True, kw_only=True)
class JudgeFlags:
    """Who says what is toxic, and how much ordinary text may suffer."""

    judge: tuple[str, ...] = flag(
        ("offline",),
        "judges of toxicity: offline, detoxify or folders (default: offline)",
        metavar="JUDGE",
    )
    threshold: float = flag(
        THRESHOLD, "a text with a higher score counts as toxic", least=0, most=1
    )
    max_ppl_increase: Share = flag(
        Share(0.03),
        "choose the strongest that raises the perplexity of the guard's text by at most so much, "
        "at the upper end of the 95 % interval: 3% or 0.03",
        metavar="SHARE",
    )


def check_free(path: Path, overwrite: bool) -> None:
    """Before the work: the output must not be there yet.

    Raises:
        UsageError: it is, and may not be replaced.
    """
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError.build(path, "the output exists", do="choose another or add --overwrite")
