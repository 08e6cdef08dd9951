"""What models are asked to write and read, and the files that keep what they wrote. No torch.

A file of texts holds one line of JSON per text: prompt, text, numbers of sample and prompt, seed,
and under ``scores`` what each judge says of it, by judge. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.generate import Decoding
    from pem_composition.evaluation.language import LanguageExam
    from pem_composition.evaluation.perplexity import Windows

Row = dict[str, Any]
SCORES = "scores"


@dataclass(frozen=True)
class Asked:
    """Prompts, how they are continued, and how often.

    Attributes:
        name: what to call the prompts in a report.
        batch_size: rows per forward pass; changes no text.
    """

    prompts: tuple[str, ...]
    decoding: Decoding
    samples: int
    seed: int
    name: str
    batch_size: int | None = None

    @property
    def size(self) -> int:
        """Number of texts."""
        return len(self.prompts) * self.samples

    @property
    def groups(self) -> list[int] | None:
        """The prompt of each text, in order; None where there is one prompt."""
        if len(self.prompts) == 1:
            return None
        return [p for p in range(len(self.prompts)) for _ in range(self.samples)]

    def identity(self) -> dict[str, Any]:
        """What decides the texts besides the weights."""
        return {
            "prompts": digest_of(self.prompts),
            "decoding": asdict(self.decoding),
            "samples": self.samples,
            "seed": self.seed,
        }

    def check(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse prompts that this model cannot continue.

        Raises:
            DataError: a prompt that leaves no room in the length or in the context.
        """
        from pem_composition.evaluation.generate import encode_prompts

        encode_prompts(model, tokenizer, self.prompts, self.decoding)

    def write(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
        """The texts, as the batches are done."""
        from pem_composition.evaluation.generate import generate

        samples = generate(
            model, tokenizer, self.prompts, self.decoding,
            samples=self.samples, seed=self.seed, batch_size=self.batch_size,
        )  # fmt: skip
        for sample in samples:
            yield sample._asdict()


@dataclass(frozen=True)
class LongText:
    """An ordinary text, of which a model that still works predicts as much as before.

    Attributes:
        rows: its rows, joined by two line breaks.
        max_tokens: take only so many from the beginning.
    """

    name: str
    rows: tuple[str, ...]
    windows: Windows
    max_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the perplexity besides the weights."""
        return {"text": digest_of(self.rows), **asdict(self.windows), "max_tokens": self.max_tokens}

    def exam(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[LanguageExam, Windows]:
        """The text in windows that this model can read, and those windows.

        Raises:
            DataError: fewer than two tokens.
        """
        from pem_composition.evaluation.perplexity import text_exam

        windows = self.windows.readable(model.config, tokenizer)
        exam = text_exam(
            self.rows, windows, tokenizer, max_tokens=self.max_tokens, device=model.device
        )
        return exam, windows


def digest_of(value: object) -> str:
    """sha256 of prompts, or of rows without scores."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def save(path: Path, rows: Sequence[Row], scores: Mapping[str, Sequence[float]]) -> None:
    """Write the rows with each judge's scores (n,), flushed to disk; the file appears at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for place, row in enumerate(rows):
                said = {SCORES: {judge: values[place] for judge, values in scores.items()}}
                file.write(json.dumps(row | said, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, sha256: str) -> list[Row] | None:
    """The rows of a file without scores; None where it is missing or its texts are others."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        stored = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    if not all(isinstance(row, Mapping) for row in stored):
        return None
    rows = [{name: value for name, value in row.items() if name != SCORES} for row in stored]
    return rows if digest_of(rows) == sha256 else None
