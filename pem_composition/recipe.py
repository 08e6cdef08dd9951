"""How a module was computed: a function, its settings, its operands; enough to compute it again.

A recipe is a tree whose leaves are inputs (``Source``). Nothing is read or computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem_composition.module import PEM

MAX_DEPTH = 100  # functions of functions; far above any use, far below Python's stack


@dataclass(frozen=True)
class Source:
    """One input of a composition: its name there, where it came from and what it held."""

    name: str
    path: str | None = None
    sha256: str | None = None  # of the adapter weights file; of the index for a sharded checkpoint
    init: str | None = None  # fingerprint of the initial module it was trained from
    content: str | None = None  # sha256 over all its files that count, see checkpoint/content.py
    license: str | None = None  # as its own model card states it


@dataclass(frozen=True)
class Recipe:
    """function(operands, **settings); the settings are plain JSON values."""

    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[Recipe | Source, ...] = ()

    @property
    def depth(self) -> int:
        """Functions on the longest way to a leaf, itself included."""
        return 1 + max((o.depth for o in self.operands if isinstance(o, Recipe)), default=0)

    def leaves(self) -> Iterator[Source]:
        """Inputs in the order of their use, repeated where they are used again."""
        for operand in self.operands:
            if isinstance(operand, Recipe):
                yield from operand.leaves()
            else:
                yield operand


def record(function: str, modules: Sequence[PEM], **settings: Any) -> Recipe | None:
    """``function(modules, **settings)``; None if an operand has no recipe or it is too deep."""
    operands = [_operand(m) for m in modules]
    known = [o for o in operands if o is not None]
    recipe = Recipe(function, {k: plain(v) for k, v in settings.items()}, tuple(known))
    return recipe if len(known) == len(operands) and recipe.depth <= MAX_DEPTH else None


def _operand(module: PEM) -> Recipe | Source | None:
    origin = module.provenance
    if origin.recipe is not None or origin.space is not None:
        return origin.recipe
    return leaf(module)


def leaf(module: PEM) -> Source:
    """A module that was read or trained, under the name it has here."""
    origin = module.provenance
    source = origin.sources[0] if origin.sources else Source(module.name, init=origin.init)
    return replace(source, name=module.name)


def plain(value: Any) -> Any:
    """The value as JSON would give it back: lists for sequences, float and int for other numbers.

    Raises:
        TypeError: something that JSON cannot hold; whoever records it has to name it by a file.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} is no plain value")


# --- in pem.json --------------------------------------------------------------------------------


def to_json(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """Nested objects; a leaf is its place in the list of sources."""
    operands = [
        to_json(o, sources) if isinstance(o, Recipe) else {"input": sources.index(o)}
        for o in recipe.operands
    ]
    return {"function": recipe.function, "settings": dict(recipe.settings), "operands": operands}


def from_json(raw: Mapping[str, Any], sources: Sequence[Source], depth: int = 1) -> Recipe:
    """The inverse of ``to_json``.

    Raises:
        TypeError, ValueError, KeyError: not what ``to_json`` writes.
    """
    function, settings, operands = raw["function"], raw["settings"], raw["operands"]
    if not isinstance(function, str) or not isinstance(settings, Mapping) or depth > MAX_DEPTH:
        raise TypeError("recipe must hold a function's name, settings and operands")
    found: list[Recipe | Source] = []
    for operand in operands:
        place = operand.get("input")
        if place is None:
            found.append(from_json(operand, sources, depth + 1))
        elif type(place) is not int or not 0 <= place < len(sources):
            raise ValueError(f"recipe names input {place!r} of {len(sources)}")
        else:
            found.append(sources[place])
    return Recipe(function, dict(settings), tuple(found))
