"""``pem generate``: texts from a causal language model, with or without a module, as JSON lines."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition import json_lines
from pem_composition.cli.causal import DECODING, CausalFlags
from pem_composition.cli.lines import check_free
from pem_composition.cli.resumed import identity_of, partial_path, resume
from pem_composition.errors import UsageError
from pem_composition.training.config import flag, required

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pem_composition.evaluation.generate import Decoding

NAME = "generate"
HELP = "sample texts from a causal language model, alone or with a module"
EXAMPLES = """
  pem generate --model_name_or_path gpt2-large --adapter runs/negated --num_samples 1000 \\
      --prompt "I don't care if this is controversial" --max_length 128 --top_k 50 \\
      --output_file scratch/negated.jsonl
  pem generate --model_name_or_path gpt2-large --prompt_file prompts.jsonl --max_new_tokens 20 \\
      --top_p 0.9 --num_samples 25 --output_file scratch/base.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Config(CausalFlags):
    """Flags of ``pem generate``."""

    output_file: Path = required(
        "where the texts go: one line {prompt, text, sample, seed, ...} each"
    )
    prompt: str | None = flag(None, "the beginning of every text")
    prompt_file: str | None = flag(
        None, "prompts: a table with a column prompt or text, or RealToxicityPrompts as published"
    )
    max_prompts: int | None = flag(None, "take only the first N prompts of the file")
    num_samples: int = flag(1, "texts per prompt")
    max_new_tokens: int | None = flag(None, "tokens that are written; or --max_length")
    max_length: int | None = flag(None, "tokens with the prompt counted; or --max_new_tokens")
    temperature: float = flag(1.0, "logits are divided by it")
    top_k: int | None = flag(None, "sample among the k most probable tokens; default: all")
    top_p: float = flag(1.0, "sample among the fewest tokens of this total probability; 1: all")
    greedy: bool = flag(False, "write the most probable token instead of a sample")
    seed: int = flag(42, "with prompt and sample number it decides a text, whatever the batch")
    overwrite: bool = flag(False, "replace an existing --output_file")

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_file is None):
            raise UsageError.build(
                "--prompt", "what the texts begin with", expected="--prompt or --prompt_file"
            )
        for name, least in (("num_samples", 1), ("max_prompts", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError.build(
                    f"--{name}", "cannot be used", found=value, expected=f"a number >= {least}"
                )


def run(config: Config) -> int:
    """Sample every prompt; the file appears when all texts are there.

    A run that was stopped goes on behind the last batch that it wrote.
    """
    from pem_composition.evaluation.generate import Decoding

    decoding = Decoding(**{name: getattr(config, name) for name in DECODING})
    prompts = prompts_of(config)
    check_free(config.output_file, config.overwrite)
    identity = {
        **identity_of(config), "prompts": prompts, "decoding": asdict(decoding),
        "samples": config.num_samples, "seed": config.seed,
    }  # fmt: skip
    begin = time.perf_counter()
    found, before = resume(
        config.output_file, identity, lambda skip: texts(config, decoding, prompts, skip)
    )
    seconds = time.perf_counter() - begin
    rows = [row for batch in found for row in batch]
    count = json_lines.write(config.output_file, rows)
    partial_path(config.output_file).unlink(missing_ok=True)
    new = sum(row["new_tokens"] for batch in found[before:] for row in batch)
    known = sum(map(len, found[:before]))
    told = f" and {known} texts written before" if known else ""
    print(
        f"{config.output_file}: {count} texts, {new} tokens ({new / seconds:.0f} per second)"
        f"{told}, {sum(row['ended'] for row in rows)} ended"
    )
    return 0


def prompts_of(config: Config) -> list[str]:
    """The prompts of the flags.

    Raises:
        DataError: a file without prompts.
    """
    from pem_composition.evaluation.generate import read_prompts

    if config.prompt is not None:
        return [config.prompt]
    assert config.prompt_file is not None
    return read_prompts(config.prompt_file)[: config.max_prompts]


def texts(
    config: Config, decoding: Decoding, prompts: list[str], skip: int
) -> Iterator[list[dict[str, Any]]]:
    """The model, loaded; then the batches of samples, all but the first ``skip``."""
    from pem_composition.evaluation.generate import batches

    model, tokenizer = config.load()
    with config.precision(model):
        found = batches(
            model, tokenizer, prompts, decoding, samples=config.num_samples, seed=config.seed,
            batch_size=config.batch_size, skip=skip,
        )  # fmt: skip
        for batch in found:
            yield [sample._asdict() for sample in batch]
