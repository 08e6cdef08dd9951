"""What a sweep scores: grids, combinations of modules, and what identifies them. No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import UsageError

if TYPE_CHECKING:
    from pem_composition.module import PEM

MAX_POINTS = 1001
PACKAGE = Path(__file__).parents[1]
CODE = ("arithmetic", "adapters", "evaluation")  # what decides a score besides the inputs


def grid(start: float, step: float, stop: float) -> tuple[float, ...]:
    """start, start + step, ..., stop; rounded to 12 digits, so that 0.1 + 0.2 is 0.3.

    Raises:
        UsageError: a step that does not lead from start to stop, or more than 1,001 points.
    """
    if step <= 0 or stop < start:
        raise UsageError.build(
            "--grid",
            "the step does not lead from start to stop",
            found=f"{start:g} {step:g} {stop:g}",
            expected="START STEP STOP with START <= STOP and STEP > 0, such as 0 0.05 1",
        )
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > MAX_POINTS:
        raise UsageError.build(
            "--grid", "too many points", found=count, expected=f"at most {MAX_POINTS}"
        )
    return tuple(round(start + i * step, 12) for i in range(count))


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
    task: str
    max_seq_length: int = 128
    head: str = "average"
    rank: int | None = None


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

    def identity(self, settings: Settings, split: str, rows: str) -> dict[str, Any]:
        """Everything that decides the score; hashed into the key."""
        return {
            **asdict(settings),
            "modules": [i.sha256 for i in self.inputs],
            "coefficients": list(self.coefficients),
            "space": self.space,
            "head": settings.head if self.space else None,
            "rank": settings.rank if self.space == "delta" else None,
            "split": split,
            "rows": rows,
            "code": code_version(),
        }


def point(inputs: Sequence[Input], coefficients: Sequence[float], space: str, head: str) -> Point:
    """A combination; one module with coefficient 1 and the rest 0 is that module."""
    chosen = [i for i, c in zip(inputs, coefficients, strict=True) if c]
    if head == "average" and len(chosen) == 1 and sum(coefficients) == 1.0:
        return alone(chosen[0])
    return Point(tuple(inputs), tuple(coefficients), space)


def alone(module: Input) -> Point:
    """One module as it is."""
    return Point((module,), (1.0,), None)


@cache
def code_version() -> str:
    """sha256 over the sources that turn modules and rows into scores."""
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted((PACKAGE / folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def digest_of(path: str | Path) -> str:
    """sha256 over a module's weights and configuration; provenance and cards do not count."""
    from pem_composition.checkpoint import locate
    from pem_composition.checkpoint.files import sha256_file

    folder, _ = locate(path)
    names = sorted(
        f.name
        for f in folder.iterdir()
        if f.suffix in (".safetensors", ".bin")
        or f.name in ("adapter_config.json", "head_config.json", "config.json")
    )
    parts = [
        f"{name} {sha256_file(folder / name, folder)}"
        for name in names
        if name != "training_args.bin"
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
