"""``pem perplexity``: how well a causal language model, alone or with a module, predicts a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pem_composition.cli.causal import CausalFlags
from pem_composition.errors import UsageError
from pem_composition.evaluation.search import EVERY, STARTS
from pem_composition.training.config import flag, required

NAME = "perplexity"
HELP = "score a causal language model on a long text by sliding window"
EXAMPLES = """
  pem perplexity --model_name_or_path gpt2-large --text_file wiki.test.raw
  pem perplexity --model_name_or_path gpt2-large --adapter runs/negated --text_file wiki.test.raw \\
      --window 1024 --stride 512 --output_dir runs/negated/wikitext
"""


@dataclass(frozen=True, kw_only=True)
class Config(CausalFlags):
    """Flags of ``pem perplexity``."""

    text_file: str = required(
        "text, its rows joined by two line breaks: the column text of .jsonl .csv "
        ".parquet, or the lines of another file; also a name of pem offline list"
    )
    window: int = flag(1024, "tokens that are read at once; at most the model's context")
    stride: int = flag(512, "tokens from the beginning of one window to the next")
    start_token: str = flag(
        EVERY,
        "windows that begin with the start token of a tokenizer that has one: every (the default, "
        "as scoring harnesses do), first (the beginning of the text alone) or none",
        choices=STARTS,
    )
    max_tokens: int | None = flag(None, "take only the first N tokens of the text")
    output_dir: str | None = flag(None, "where perplexity_results.json goes; default: printed only")

    def __post_init__(self) -> None:
        for name in ("window", "stride", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError.build(
                    f"--{name}", "cannot be used", found=value, expected="a number >= 1"
                )


def run(config: Config) -> int:
    """Score, print, write."""
    from pem_composition.training import results

    scores = score(config)
    width = max(map(len, scores))
    for name, value in scores.items():
        print(
            f"{name:<{width}}  {value:.4f}"
            if isinstance(value, float)
            else f"{name:<{width}}  {value}"
        )
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        results.write_results(folder, {NAME: scores})
    return 0


def score(config: Config) -> Mapping[str, float | str]:
    """Perplexity, loss and their standard errors, and how they were counted.

    Raises:
        PEMError: a text, model or module that cannot be used.
    """
    from pem_composition.evaluation import perplexity

    asked = perplexity.Windows(config.window, config.stride, config.start_token)
    texts = perplexity.read_texts(config.text_file)
    model, tokenizer = config.load()
    windows = asked.readable(model.config, tokenizer)
    if windows.window != asked.window:
        print(
            f"--window {asked.window}: the model takes {windows.window} tokens; using windows of "
            f"{windows.window} every {windows.stride}"
        )
    device = model.device.type
    evaluator = perplexity.text_evaluator(
        texts,
        windows,
        tokenizer,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        device=device,
    )
    with config.precision(model):
        scores = perplexity.perplexity(model, evaluator)
    read = {"window": windows.window, "stride": windows.stride, "start_token": windows.start}
    return {**scores, **read}
