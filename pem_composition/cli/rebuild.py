"""``pem rebuild``: compute a composition again from its pem.json and compare bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint import hub_name
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.cli import common
from pem_composition.cli.columns import wrapped
from pem_composition.cli.flags import named
from pem_composition.errors import EXIT_BAD_INPUT, EXIT_DONE, UsageError
from pem_composition.flag_declarations import flag, required
from pem_composition.record import Recipe

if TYPE_CHECKING:
    from pem_composition.checkpoint.recomputation import Difference, Rebuilt

NAME = "rebuild"
HELP = "compute a composition again from its pem.json, compare bit for bit; exit code 0 if equal"
EXAMPLES = """
  pem rebuild runs/merged
  pem rebuild runs/merged --module rte-0=/elsewhere/rte-0
"""
SCHEMA = "pem.rebuild/1"
SHOWN = 10  # differences in text


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem rebuild."""

    directory: str = required("a composed module or model", positional=True, metavar="DIR")
    module: tuple[str, ...] = named("where an input lies now; default: where it was, or beside DIR")
    model: str | None = flag(
        None,
        "whole models: where their base lies now (default: the recorded one)",
        short="-m",
        metavar="MODEL",
    )
    json: bool = flag(False, "one JSON object instead of text")


def run(config: Config) -> int:
    """Rebuild, say what differs; 0 if nothing does, else 2."""
    moved = moves(config.module)
    base = common.resolved(config.model) if config.model else None
    found = rebuild(config.directory, modules=moved, base=base)
    print(json.dumps(to_json(found)) if config.json else "\n".join(text(found)))
    return EXIT_DONE if found.equal else EXIT_BAD_INPUT


def moves(pairs: tuple[str, ...]) -> dict[str, str]:
    """name -> directory from NAME=DIR; the names are those of the inputs, whatever they are.

    Raises:
        UsageError: no '=', or a name given twice.
    """
    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (equals and name and path) or name in out:
            raise UsageError.build(
                "--module",
                "a name given twice" if name in out else "not a binding",
                found=repr(pair),
                expected="NAME=DIR, once per name",
            )
        out[name] = path
    return out


def to_json(found: Rebuilt) -> dict[str, Any]:
    """The outcome as plain values; the schema is in docs/explain.md."""
    return {
        "schema": SCHEMA,
        "path": str(found.path),
        "equal": found.equal,
        "recipe": formula(found.recipe),
        "inputs": [{**asdict(s), "found": str(p)} for s, p in found.inputs],
        "files": list(found.files),
        "differences": [asdict(d) for d in found.differences],
        "versions": {k: {"then": a, "now": b} for k, (a, b) in found.versions.items()},
    }


def formula(recipe: Recipe) -> str:
    """combine(a, negate(b, strength=0.5), coefficients=[0.3, 0.7], space=delta)."""
    parts = [formula(o) if isinstance(o, Recipe) else o.name for o in recipe.operands]
    parts += [f"{k}={_shown(v)}" for k, v in recipe.settings.items() if v not in (None, False)]
    return f"{recipe.function}({', '.join(parts)})"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def text(found: Rebuilt) -> Iterator[str]:
    """The verdict first."""
    verdict = "equal, bit for bit" if found.equal else "differs from what its recipe gives"
    yield f"{found.path}: {verdict}"
    yield _entry("recipe", formula(found.recipe))
    for source, place in found.inputs:
        mark = f"sha256 {source.sha256[:16]}" if source.sha256 else "no sha256 recorded"
        yield _entry("input", f"{source.name} ({mark}): {hub_name.source_name(place)}")
    for difference in found.differences[:SHOWN]:
        yield _entry("differs", line(difference))
    if len(found.differences) > SHOWN:
        yield _entry("", f"and {len(found.differences) - SHOWN} more (--json lists all)")
    for package, (then, now) in found.versions.items() if not found.equal else ():
        yield _entry("note", f"written with {package} {then}, rebuilt with {now}")


def _entry(key: str, value: str) -> str:
    return wrapped(f"  {key:<8}{value}", indent=10)


def line(difference: Difference) -> str:
    """File, tensor, and by how much."""
    where = difference.file + (f", {difference.tensor}" if difference.tensor else "")
    size = ""
    if difference.largest is not None:
        relative = f", relative {difference.relative:.3g}" if difference.relative else ""
        size = f" (largest {difference.largest:.3g}{relative})"
    return f"{where}: {difference.what}{size}"
