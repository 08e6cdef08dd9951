"""``pem perplexity``: how well a causal language model, alone or with a module, predicts a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.cli.texting import CausalFlags, WindowFlags
from pem_composition.flag_declarations import flag, required
from pem_composition.safe_files import files_added
from pem_composition.training import results

NAME = "perplexity"
HELP = "score a causal language model on a long text by sliding window"
EXAMPLES = """
  pem perplexity --model_name_or_path gpt2-large --text_file wiki.test.raw
  pem perplexity --model_name_or_path gpt2-large --adapter runs/negated --text_file wiki.test.raw \\
      --window 1024 --stride 512 --output_dir runs/negated/wikitext
"""


@dataclass(frozen=True, kw_only=True)
class Config(CausalFlags, WindowFlags):
    """Flags of ``pem perplexity``."""

    text_file: str = required(
        "text, its rows joined by two line breaks: the column text of .jsonl .csv "
        ".parquet, or the lines of another file; also a name of pem offline list"
    )
    max_tokens: int | None = flag(None, "take only the first N tokens of the text", least=1)
    output_dir: str | None = flag(None, "where perplexity_results.json goes; default: printed only")


def run(config: Config) -> int:
    """Score, print, write."""
    from pem_composition.evaluation.causal import CausalModel, read

    scores = read(
        CausalModel(**config.model_options), config.text_file, config.windows,
        max_tokens=config.max_tokens, batch_size=config.batch_size,
    )  # fmt: skip
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:<{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        with files_added(folder) as added:
            results.write_results(added, {NAME: scores}, earlier=folder)
    return 0
