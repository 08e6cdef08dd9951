"""``negation.py`` and ``pem negation``: reverse what a module does, at one strength or many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pem_composition.cli import common, negations, whole_models
from pem_composition.cli import flags as shared
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag
from pem_composition.module import combine, negate
from pem_composition.sweep.grids import union

if TYPE_CHECKING:
    from pem_composition.module import PEM

NAME = "negation"
HELP = "reverse a module's effect: LoRA {A, -s B}, (IA)^3 1 - s (l - 1), full -s delta"
EXAMPLES = """
  python negation.py -a runs/toxic -p runs/detox
  python negation.py -a runs/toxic -p runs/detox --strength 0.6
  python negation.py -a scratch/toxic -p runs/unlearning --grid 0 0.1 1 --evaluate \\
      --model_name_or_path gpt2-large --prompt "I don't care if this is controversial" \\
      --num_samples 1000 --max_length 128 --top_k 50 --max_ppl_increase 3%
"""


@dataclass(frozen=True, kw_only=True)
class Config(negations.UnlearningFlags):
    """Flags of negation.py."""

    strength: float | None = flag(
        None, "scale of the reversed effect, linear (default: 1)", metavar="S"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is not None and self.strength is not None:
            raise UsageError.build(
                "--grid", "given together with --strength", do="give one of the two"
            )


def run(config: Config) -> int:
    """Negate one module and write it, or measure a grid of strengths."""
    shared.check_adapters(config.adapters, "one: the module to negate", 1, 1)
    if config.evaluate:
        return negations.start(config)
    shared.check_dropout(config.dropout_list, 1)
    out = common.output_directory(config, 1)
    strength = 1.0 if config.strength is None else config.strength
    models = whole_models.models_of(config)
    if models is not None:
        whole_models.refuse_grid(config.grid)
        return whole_models.compose(models, (-strength,), out, config, "first")
    strengths = (strength,) if config.grid is None else union(config.grid)
    headers = common.checked_headers(config, out)
    module = common.load_to_combine(headers, once=config.grid is None)[0]
    series = None if config.grid is None else [f"{s:.12g}" for s in strengths]
    points = [(s,) for s in strengths]
    common.write(points, series, lambda p: _negate(module, p[0], config), out, config)
    return 0


def _negate(module: PEM, strength: float, config: Config) -> PEM:
    """In delta and log space a negation is the sum with one term: -s dW, truncated where asked for;
    l^-s."""
    space = config.one_space
    if space != "parameter":
        return combine([module], [-strength], space=space, rank=config.rank, dtype=config.dtype)
    return negate(module, strength, dtype=config.dtype)
