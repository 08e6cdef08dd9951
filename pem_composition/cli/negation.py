"""``negation.py`` and ``pem negation``: reverse what a module does, scaled by a strength."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pem_composition.cli import common, full
from pem_composition.cli import flags as shared

if TYPE_CHECKING:
    from pem_composition.module import PEM

NAME = "negation"
HELP = "reverse a module's effect: LoRA {A, -s B}, (IA)^3 1 - s (l - 1), full -s delta"
EXAMPLES = """
  python negation.py -a runs/toxic -p runs/detox
  python negation.py -a runs/toxic -p runs/detox --strength 0.6
"""


@dataclass(frozen=True, kw_only=True)
class Config(shared.ModuleFlags):
    """Flags of negation.py."""

    strength: float = field(
        default=1.0, metadata={"metavar": "S", "help": "scale of the reversed effect (linear)"}
    )


def run(config: Config) -> int:
    """Negate one module and write it."""
    shared.check_adapters(config.adapters, "one: the module to negate", 1, 1)
    shared.check_dropout(config.dropout_list, 1)
    out = common.output_directory(config, 1)
    models = full.models_of(config)
    if models is not None:
        return full.compose(models, (-config.strength,), out, config, "first")
    common.check_output(out, config.adapters, config.overwrite)
    names = common.labels(config.adapters, config.adatasks)
    headers = common.read_headers(config.adapters, names, config, config.adaconfig)
    common.check_model(config.model, headers, config.allow_base_mismatch)

    module = _negate(common.load_modules(config.adapters, names)[0], config)
    module.save(out, format=config.format, dtype=config.dtype, overwrite=config.overwrite)
    common.report(out, module)
    return 0


def _negate(module: PEM, config: Config) -> PEM:
    """In delta space a negation is the sum with one term, -s dW, which can also be truncated."""
    from pem_composition.module import combine, negate

    if config.one_space == "delta":
        return combine(
            [module], [-config.strength], space="delta", rank=config.rank, dtype=config.dtype
        )
    return negate(module, config.strength)
