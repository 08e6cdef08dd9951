"""The record of a module: its terms, sources, certificate, and how it can be computed again.

A recipe is a tree of functions, their settings and operands, whose leaves are inputs (``Source``).
No module is read or computed here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

SUM = "sum c_i dW_i"
PRODUCT = "prod l_i^c_i"  # of log space, before rounding
UPDATE = "the update in float64"  # of a whole checkpoint, theta - theta_0
OWN_RESULT = "the method's own result"
TO_SUBTRACT = "exists to be subtracted"  # what is said of a module that shows what to remove
REFIT = "refit"  # in the record of a training: the command that fitted its last layer anew
_PURPOSE = "purpose of "
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


@dataclass(frozen=True)
class Term:
    """coefficient * label, where the label names a module or a compound that is not a plain sum."""

    coefficient: float
    label: str


@dataclass(frozen=True)
class Certificate:
    """Relative Frobenius error of the update against what it stands for, per layer and in total.

    ``against``: a sum is judged against the exact sum of updates, in log space against its own
    product of vectors in float64, any other method against its own result before rank and rounding,
    what a whole checkpoint writes against the same expression in float64.
    A parameter of the base that is saved whole has an error, too: 0 where it is what the expression
    says, infinite (unknown) where that needs the base's value.
    """

    total: float
    layers: Mapping[str, float]
    against: str = SUM

    def covering(self, saved: Mapping[str, bool]) -> Certificate:
        """The certificate of a module that also holds parameters saved whole: name -> right?"""
        errors = {name: 0.0 if right else math.inf for name, right in saved.items()}
        total = max([self.total, *errors.values()])
        return Certificate(total, {**self.layers, **errors}, self.against)

    @property
    def kept_energy(self) -> float | None:
        """The share of the squared norm that is written, 1 - error^2, of the best module of a rank,
        whose error is orthogonal to it; None where the error is unknown.

        Examples:
            >>> Certificate(0.5, {}).kept_energy
            0.75
        """
        return max(0.0, 1.0 - self.total**2) if math.isfinite(self.total) else None

    def __str__(self) -> str:
        return f"{self.total:.2g}" if math.isfinite(self.total) else "unknown"


@dataclass(frozen=True)
class Provenance:
    """How a module came to be; everything that pem.json holds beyond the tensors."""

    terms: tuple[Term, ...] = ()
    sources: tuple[Source, ...] = ()
    space: str | None = None  # parameter | delta | log; None for a module trained or loaded
    method: str | None = None
    certificate: Certificate | None = None
    init: str | None = (
        None  # initialisation fingerprint shared by all inputs, None if unknown or mixed
    )
    head_policy: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None  # None for a module that was trained or loaded

    @property
    def task(self) -> str | None:
        """The task that the module was trained on, where its training run is recorded.

        Examples:
            >>> Provenance(training={"content": {"task": "rte"}}).task, Provenance().task
            ('rte', None)
        """
        content = self.training.get("content")
        task = content.get("task") if isinstance(content, dict) else None
        return task if isinstance(task, str) else None


def purpose_note(name: str, purpose: str) -> str:
    """The note that says what a module is for; ``purposes`` reads it."""
    return f"{_PURPOSE}{name}: {purpose}"


def purposes(notes: Sequence[str]) -> dict[str, str]:
    """Name -> purpose of every module whose purpose the notes tell.

    Examples:
        >>> purposes(["of no use here", purpose_note("toxic", "it exists to be subtracted")])
        {'toxic': 'it exists to be subtracted'}
    """
    stated = (n.removeprefix(_PURPOSE).partition(": ") for n in notes if n.startswith(_PURPOSE))
    return {name: purpose for name, colon, purpose in stated if colon}


def named_purposes(origin: Provenance, name: str) -> tuple[str, ...]:
    """The notes of a module that is read under a name: its purpose is told of this name.

    A composition has no purpose of its own; made with what is to be subtracted, it is no better.

    Examples:
        >>> own = Provenance(notes=(purpose_note("toxic", "it exists to be subtracted"),))
        >>> named_purposes(own, "x")
        ('purpose of x: it exists to be subtracted',)
        >>> named_purposes(replace(own, space="delta"), "s")[1]
        'purpose of s: made with toxic, which exists to be subtracted'
    """
    stated = purposes(origin.notes)
    if origin.space is None and origin.recipe is None:
        own = {purpose_note(old, text): purpose_note(name, text) for old, text in stated.items()}
        return tuple(own.get(note, note) for note in origin.notes)
    made = "made with "
    held = [n for n, p in stated.items() if TO_SUBTRACT in p and not p.startswith(made)]
    if not held:
        return origin.notes
    return (*origin.notes, purpose_note(name, f"{made}{', '.join(held)}, which {TO_SUBTRACT}"))


class Recorded(Protocol):
    """A module, as far as its record goes."""

    @property
    def name(self) -> str: ...
    @property
    def provenance(self) -> Provenance: ...


def record(function: str, modules: Sequence[Recorded], **settings: Any) -> Recipe | None:
    """``function(modules, **settings)``; None if an operand has no recipe or it is too deep."""
    # What was read or trained is an input; a composition without a recipe cannot be an operand.
    operands = [
        m.provenance.recipe or (leaf(m) if m.provenance.space is None else None) for m in modules
    ]
    known = [o for o in operands if o is not None]
    recipe = Recipe(function, {k: plain(v) for k, v in settings.items()}, tuple(known))
    return recipe if len(known) == len(operands) and recipe.depth <= MAX_DEPTH else None


def leaf(module: Recorded) -> Source:
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


# --- the module that training began with --------------------------------------------------------


def initialisation_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over an initial module's lora_A, ia3 and head tensors, by sorted name.

    Two runs share it exactly if they started from the same module, head included.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.rpartition(".")[2] in ("lora_A", "ia3", "head"):
            tensor = tensors[name].detach().cpu().contiguous()
            dtype = str(tensor.dtype).removeprefix("torch.")  # F32, BF16, as in safetensors
            dtype = dtype.replace("bfloat", "BF").replace("float", "F")
            digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
