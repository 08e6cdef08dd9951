"""``pem methods``: the merging methods, what they take and what they return."""

from __future__ import annotations

from dataclasses import dataclass

from pem_composition.arithmetic.methods import registry
from pem_composition.arithmetic.methods.settings import shown
from pem_composition.flag_declarations import flag

NAME = "methods"
HELP = "list the merging methods of merge.py -w and pem compose, or describe one"
EXAMPLES = """
  pem methods
  pem methods ties
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem methods."""

    method: str | None = flag(None, "describe this one", positional=True)
    markdown: bool = flag(False, "print the table of docs/methods.md instead")


def run(config: Config) -> int:
    """Print the list, the table or one method."""
    if config.markdown:
        print(registry.table())
    elif config.method is not None:
        print(describe(registry.method(config.method.replace("-", "_"))))
    else:
        width = max(map(len, registry.METHODS))
        for entry in registry.METHODS.values():
            settings = " ".join(f"{s.name}={shown(s.default)}" for s in entry.settings)
            print(f"{entry.name:<{width}}  {entry.title}{f'  ({settings})' if settings else ''}")
    return 0


def describe(entry: registry.Method) -> str:
    """One method in full."""
    facts = {
        "result": entry.rule,
        "acts on": entry.acts_on,
        "coefficients": registry.use_of_coefficients(entry),
        "rank": entry.rank,
        "kinds": ", ".join(entry.kinds),
        "source": entry.source,
    }
    lines = [f"{entry.name}: {entry.title}"]
    lines += [f"  {key:<13} {value}" for key, value in facts.items()]
    lines += [
        f"  {f'{s.name}={shown(s.default)}':<17} {s.meaning} ({s.range})" for s in entry.settings
    ]
    return "\n".join(lines)
