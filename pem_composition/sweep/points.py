"""What a sweep scores: combinations of modules, and what identifies them. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem_composition.module import PEM

PACKAGE = Path(__file__).parents[1]
# What decides a score besides the inputs.
CODE = (
    "module.py",
    "arithmetic/*.py",
    "adapters/*.py",
    "evaluation/*.py",
    "tasks/prompts.py",
    "tasks/polarity.py",
)


@dataclass(frozen=True, eq=False)
class Input:
    """A module and the digest of its files."""

    name: str
    pem: PEM
    sha256: str


@dataclass(frozen=True)
class Settings:
    """What a point's score depends on besides modules, coefficients and rows; part of its key."""

    base: str  # fingerprint, or the name where no file can be read
    head: str = "average"
    rank: int | None = None
    bf16: bool = False  # matrix products of the forward pass in bfloat16


@dataclass(frozen=True, eq=False)
class Point:
    """One combination. ``space`` is None for a module as it is, whose space does not matter."""

    inputs: tuple[Input, ...]
    coefficients: tuple[float, ...]
    space: str | None

    def module(self, settings: Settings) -> PEM:
        """The combination, in memory."""
        from pem_composition.module import combine

        if self.space is None:
            return self.inputs[0].pem
        return combine(
            [i.pem for i in self.inputs],
            self.coefficients,
            space=self.space,
            head=settings.head,
            rank=settings.rank if self.space == "delta" else None,
            allow_base_mismatch=True,
            certify=False,
        )

    def identity(self, settings: Settings, split: str, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the score; hashed into the key.

        Args:
            rows: what identifies the task's rows and how they are scored.
        """
        shared = asdict(settings)
        if not settings.bf16:
            del shared["bf16"]
        return {
            **shared,
            **rows,
            "modules": [i.sha256 for i in self.inputs],
            "coefficients": list(self.coefficients),
            "space": self.space,
            "head": settings.head if self.space else None,
            "rank": settings.rank if self.space == "delta" else None,
            "split": split,
            "code": code_version(),
        }


def point(inputs: Sequence[Input], coefficients: Sequence[float], space: str, head: str) -> Point:
    """A combination; one module with coefficient 1 and the rest 0 is that module."""
    chosen = [i for i, c in zip(inputs, coefficients, strict=True) if c]
    own = {"average": chosen, "first": [inputs[0]], "last": [inputs[-1]]}.get(head)
    if len(chosen) == 1 and sum(coefficients) == 1.0 and own == chosen:
        return alone(chosen[0])
    return Point(tuple(inputs), tuple(coefficients), space)


def alone(module: Input) -> Point:
    """One module as it is."""
    return Point((module,), (1.0,), None)


@cache
def code_version() -> str:
    """sha256 over the sources that turn modules and rows into scores."""
    digest = hashlib.sha256()
    for pattern in CODE:
        for file in sorted(PACKAGE.glob(pattern)):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def digest_of(path: str | Path) -> str:
    """sha256 over a module's weights and configuration; provenance and cards do not count."""
    from pem_composition.checkpoint import locate
    from pem_composition.checkpoint.content import content_digest

    return content_digest(locate(path)[0])
