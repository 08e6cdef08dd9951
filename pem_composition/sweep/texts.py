"""What models read beside other tasks, and the files that keep what they wrote. No torch.

A file of texts holds one line of JSON per text: prompt, text, numbers of sample and prompt, seed,
and under ``scores`` what each judge says of it, by judge. It appears whole or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import json_lines
from pem_composition.errors import DataError
from pem_composition.evaluation.keys import digest_of
from pem_composition.evaluation.long_texts import increase, read_texts, summary, text_evaluator
from pem_composition.evaluation.precision import reduced

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.decoding import Windows
    from pem_composition.evaluation.language import LanguageEvaluator

Row = dict[str, Any]
SCORES = "scores"
LONG_ROW = 40  # characters


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

    def halves(self) -> tuple[LongText, LongText]:
        """The first and the second half, by characters: at the nearest row, or word of one row."""
        rows = self.rows if len(self.rows) > 1 else tuple(" ".join(self.rows).split(" "))
        ends = list(itertools.accumulate(map(len, rows)))
        middle = min(range(len(ends) - 1), key=lambda i: abs(2 * ends[i] - ends[-1]), default=0) + 1
        glue = (lambda part: part) if rows is self.rows else (lambda part: (" ".join(part),))
        return (
            replace(self, name=f"{self.name}, first half", rows=glue(rows[:middle])),
            replace(self, name=f"{self.name}, second half", rows=glue(rows[middle:])),
        )

    def shared_rows(self, other: LongText) -> float:
        """Share of the other text's long rows that stand in this one, too; headings may recur."""
        rows = [row.strip() for row in other.rows if len(row.strip()) >= LONG_ROW]
        own = {row.strip() for row in self.rows}
        return sum(row in own for row in rows) / len(rows) if rows else float(self == other)

    def evaluator(
        self, model: Any, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[LanguageEvaluator, Windows]:
        """The text in windows that this model can read, and those windows.

        Raises:
            DataError: fewer than two tokens.
        """
        windows = self.windows.readable(model.config, tokenizer)
        evaluator = text_evaluator(
            self.rows, windows, tokenizer, max_tokens=self.max_tokens, device=model.device
        )
        return evaluator, windows


def read_text(source: str, windows: Windows, max_tokens: int | None = None) -> LongText:
    """A text by file or offline name, see ``evaluation.perplexity.read_texts``."""
    return LongText(Path(source).name, tuple(read_texts(source)), windows, max_tokens)


class TextRows:
    """A long text that models read; takes the place of ``Rows`` on a runner.

    Args:
        least: windows that there must be: one has no standard error.
    """

    def __init__(self, text: LongText, *, least: int = 1) -> None:
        self.text, self.name, self.least = text, text.name, least
        self.identity = {"task": "text", **text.identity()}
        self._evaluator: Any = None
        self._windows: Any = None

    def prepare(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Cut the text into windows that this model can read.

        Raises:
            DataError: fewer than two tokens, or fewer windows than are needed.
        """
        self._evaluator, self._windows = self.text.evaluator(model, tokenizer)
        if self._evaluator.size < self.least:
            raise DataError.build(
                self.name, "too short to say how sure its perplexity is",
                found=f"{self._evaluator.size} window", expected=f"at least {self.least}",
                do="give a longer text (--guard_file), or a smaller --window",
            )  # fmt: skip

    def evaluate(
        self, model: nn.Module, _partial: object = None, _key: str = "", *, bf16: bool = False
    ) -> dict[str, Any]:
        """Perplexity, and per window the sum of -log p and the number of tokens."""
        with reduced(model, bf16):
            outputs = self._evaluator.predict(model)
        nll, counts = outputs.astype("float64").T.tolist()
        found = summary(self._evaluator, outputs)
        shown = {"metric": "perplexity", "n": found["windows"], "degenerate": False}
        shown |= {"score": found["perplexity"], "standard_error": found["perplexity_stderr"]}
        # Smaller windows are read where the model cannot read those asked for.
        read = vars(self._windows)
        return {**found, **shown, "invalid_share": None, "nll": nll, "counts": counts, "read": read}


def guarded(found: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """What the guard's text says of a model against another one, as columns."""
    value, error, high = increase(found["nll"], base["nll"], found["counts"])
    return {"guard": value, "guard_stderr": error, "guard_high": high}


def strongest(rows: Sequence[Mapping[str, Any]], max_increase: float) -> float | None:
    """The largest strength above 0 whose increase of the perplexity on the guard's text is within
    the limit even at the upper end of its interval; None where every one exceeds it."""
    within = [r["strength"] for r in rows if r["strength"] > 0 and r["guard_high"] <= max_increase]
    return max(within, default=None)


def save(path: Path, rows: Sequence[Row], scores: Mapping[str, Sequence[float]]) -> None:
    """Write the rows with each judge's scores (n,), flushed to disk; the file appears at once."""
    json_lines.write(
        path,
        (
            row | {SCORES: {judge: values[place] for judge, values in scores.items()}}
            for place, row in enumerate(rows)
        ),
    )


def read(path: Path, sha256: str) -> list[Row] | None:
    """The rows of a file without scores; None where it is missing or its texts are others."""
    try:
        stored = json_lines.read(path)
    except (OSError, DataError):
        return None
    rows = [{name: value for name, value in row.items() if name != SCORES} for row in stored]
    return rows if digest_of(rows) == sha256 else None
