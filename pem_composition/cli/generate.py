"""``pem generate``: texts from a causal language model, with or without a module, as JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pem_composition.cli.texting import CausalFlags, PromptFlags, check_free
from pem_composition.flag_declarations import flag, required

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
class Config(CausalFlags, PromptFlags):
    """Flags of ``pem generate``."""

    output_file: Path = required(
        "where the texts go: one line {prompt, text, sample, seed, ...} each"
    )
    overwrite: bool = flag(False, "replace an existing --output_file")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_prompts()


def run(config: Config) -> int:
    """Sample every prompt; the file appears when all texts are there.

    A run that was stopped goes on behind the last batch that it wrote.
    """
    prompts = config.prompts(config.decoding(), config.batch_size)
    check_free(config.output_file, config.overwrite)
    from pem_composition.evaluation.causal import CausalModel, generate

    written = generate(CausalModel(**config.model_options), prompts, config.output_file)
    print(f"{config.output_file}: {written}")
    return 0
