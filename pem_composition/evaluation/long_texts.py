"""How well a causal language model predicts text: documents, or one long text by sliding window.

perplexity = exp(1/N sum_t -log p(x_t | the tokens before it that were read)),  N counted tokens.

A document is read alone, from its beginning to its end token. A long text is read in windows that
overlap: each token is counted once, in the first window that holds it, with at least
window - stride tokens before it there; only the first window begins with none. (This is the recipe
of the Hugging Face guide "Perplexity of fixed-length models", with windows weighted by the tokens
they count.)

Both begin as the tokenizer begins a text: with Llama's <s>, which is read and not counted, or with
the text's first token (GPT-2, SmolLM2), which has nothing before it and is not counted. A model
that was trained with a start token expects it, so every window begins with it unless
``Windows.start`` says that only the first one does, or none. llama.cpp begins every chunk with it,
too; where a harness reads without overlap, give a stride of one less than the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pem_composition import offline
from pem_composition.errors import DataError
from pem_composition.evaluation import standard_errors
from pem_composition.evaluation.decoding import Windows
from pem_composition.evaluation.encoded import causal_rows
from pem_composition.evaluation.language import LanguageEvaluator, language_evaluator
from pem_composition.tasks import data, tables
from pem_composition.tasks.document_rows import LANGUAGE
from pem_composition.tasks.tokens import begun, start_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.evaluator import Outputs

WINDOWS = 32  # per forward pass, if nothing is said
JOINT = "\n\n"  # between the rows of a long text


# --- a long text --------------------------------------------------------------------------------


def read_texts(source: str | Path) -> list[str]:
    """Rows of a long text: a table's column ``text``, or the lines of any other file.

    Lines keep their line break and blank ones are empty, as in the rows of WikiText on the hub.

    Args:
        source: a file, gzipped or not, or what ``pem offline list`` shows, whose test rows it is.

    Raises:
        DataError: no such file, or a table without texts.
    """
    path = Path(offline.resolve(source))
    if path.is_dir():
        path = data.find_split_files(path).get(data.TEST, path)
    if {suffix[1:].lower() for suffix in path.suffixes} & {*tables.FORMATS, "ndjson"}:
        return data.texts_of(tables.read_table(path), LANGUAGE)
    return [line + "\n" if line.strip() else "" for line in tables.read_lines(path)]


def text_evaluator(
    texts: Sequence[str],
    windows: Windows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
) -> LanguageEvaluator:
    """The texts joined by two line breaks, in windows; prepared once for any number of models.

    Args:
        max_tokens: take only so many tokens from the beginning.
        batch_size: most windows per forward pass.

    Raises:
        DataError: fewer than two tokens.
    """
    start = start_tokens(tokenizer)
    tokens = begun(tokenizer, JOINT.join(texts))[len(start) :][:max_tokens]
    if len(tokens) < 2:
        raise DataError.build("text", "nothing to predict", found=f"{len(tokens)} tokens")
    rows = causal_rows(windows.rows(tokens, start))
    return language_evaluator(rows, batch_size=batch_size or WINDOWS, device=device)


def perplexity(model: nn.Module, evaluator: LanguageEvaluator) -> dict[str, float]:
    """Perplexity and loss with their standard errors over windows, and what was counted.

    Standard errors take windows for independent; that of the perplexity is perplexity x that of the
    loss (first order). Neighbouring windows share their topic, so both are lower bounds.

    Raises:
        RunFailed: a loss that is not finite.
    """
    return summary(evaluator, evaluator.predict(model))


def summary(evaluator: LanguageEvaluator, outputs: Outputs) -> dict[str, float]:
    """The same of outputs (windows, 2) that are at hand."""
    result = evaluator.score(outputs)
    value = result.scores["perplexity"]
    return {
        "perplexity": value,
        "perplexity_stderr": value * result.stderr,
        "loss": result.score,
        "loss_stderr": result.stderr,
        "tokens": int(outputs[:, 1].sum(dtype="float64")),
        "windows": result.n,
    }


class Increase(NamedTuple):
    """A relative change of the perplexity, its standard error and the upper end of its interval."""

    value: float
    stderr: float
    high: float


def increase(nll: ArrayLike, before: ArrayLike, tokens: ArrayLike) -> Increase:
    """perplexity / perplexity before - 1 = e^d - 1, of the same windows (w,) of a text.

    d = sum_w (nll_w - before_w) / sum_w tokens_w, of the summed negative log-likelihoods. Its error
    is that of a ratio of two sums, and e^d times that of d is the error of the increase (first
    order); the 95 % interval ends at e^(d + 1.96 error) - 1. What makes a window hard for both
    models cancels. One window has no error: its interval has no end.
    """
    value, error = standard_errors.ratio(np.subtract(nll, before), tokens)
    assert value is not None and error is not None, "there are windows"
    d = min(value, 700.0)
    equal = np.array_equal(nll, before)
    known = equal or np.size(tokens) > 1
    high = math.expm1(min(d + standard_errors.Z * error, 700.0)) if known else math.inf
    return Increase(math.expm1(d), math.exp(d) * error, high)
