"""What every tensor of a folded checkpoint is made of, block by block.

Memory: rows of at most ROWS entries in float32, a few times, where an adapter changes a tensor;
blocks of BLOCK entries where whole models do (``full_blocks``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic import trees
from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.checkpoint.folded import Change, changes_of, joined, spelled
from pem_composition.checkpoint.full import PRETRAINING_COMPONENTS, Weights, aligned, is_head
from pem_composition.checkpoint.full_blocks import Sums, blame, info_as, wide_of
from pem_composition.checkpoint.full_blocks import Term as SumTerm
from pem_composition.checkpoint.stream import BLOCK, Output, whole
from pem_composition.checkpoint.tensors import TORCH_NAMES, cast
from pem_composition.errors import IncompatibleModules
from pem_composition.module import PEM
from pem_composition.record import Certificate, Source

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.config import HeadInfo

ROWS = 2**21  # entries of a block of rows: 8 MB in float32, small enough for malloc to use again
NOTHING = 1e-9  # a weight of the base that is rounding alone
AGAINST = "the update before rounding"


@dataclass(frozen=True)
class Parts:
    """An expression by kinds: composed adapters, and whole models with their coefficients."""

    adapters: tuple[PEM, ...]
    full: trees.Sum | None
    models: Mapping[str, Weights]
    head: Mapping[str, Tensor]
    head_info: HeadInfo | None
    sources: tuple[Source, ...]
    space: str
    notes: tuple[str, ...]

    def weights(self, parameter: str) -> dict[str, float]:
        """Coefficient of each whole model in one parameter."""
        return trees.coefficients(self.full, parameter) if self.full else {}


class Plan:
    """The tensors of the folded checkpoint."""

    def __init__(self, base: Weights, model_type: str | None, parts: Parts) -> None:
        self._base, self._parts, self._sums = base, parts, Sums()
        self._changes = joined([changes_of(m, base, model_type) for m in parts.adapters])
        self._names = {  # model -> name in the base -> name in the model
            name: {b: t for t, b in aligned(model, base).items() if not is_head(t)}
            for name, model in parts.models.items()
        }
        self._prefix = _prefix(base, parts, self._names) if parts.head else ""
        self._squares: dict[str, tuple[float, float]] = {}

    def outputs(self, dtype: Any) -> dict[str, Output]:
        """Every tensor to write; ``dtype`` None: as the base stores it."""
        import torch

        out: dict[str, Output] = {}
        head = self._parts.head
        for name, info in self._base.infos.items():
            own = name if is_head(name) else self._prefixed(name)
            if own in head or (head and is_head(name)):
                continue
            cast_to = dtype if info.dtype in FLOAT_DTYPES else None
            out[own] = self._output(name, info_as(cast_to, info.shape) if cast_to else info)
        largest = max(self._base.infos.values(), key=lambda i: i.nbytes)
        stored = dtype or getattr(torch, TORCH_NAMES[largest.dtype])
        _check_tied(head, self._base, out)
        for name, tensor in head.items():
            value = partial(cast, tensor, name, stored, "head")
            out[name] = whole(value, info_as(stored, tuple(tensor.shape)))
        return out

    def certificate(self) -> Certificate:
        """The error of rounding, of the changed tensors written so far."""

        def share(wrong: float, norm: float) -> float:
            return (wrong / norm) ** 0.5 if norm else 0.0

        layers = {name: share(*pair) for name, pair in self._squares.items()}
        wrong, norm = (sum(pair[i] for pair in self._squares.values()) for i in (0, 1))
        return Certificate(share(wrong, norm), layers, AGAINST)

    def _prefixed(self, name: str) -> str:
        bare = PRETRAINING_COMPONENTS.isdisjoint(name.split(".")[:1]) or name.startswith("pooler")
        return self._prefix + name if bare else name

    def _output(self, name: str, info: TensorInfo) -> Output:
        import torch

        base, change = self._base, self._changes.get(name)
        origin = (1.0, base, name)
        models = self._terms(name)
        if change is None and not models:
            return Output(info, partial(base.block, name), BLOCK, partial(blame, [origin]))
        rest = (0.0 if change and change.scale else 1.0) - sum(c for c, _, _ in models)
        terms = [*models, (rest, base, name)] if abs(rest) > NOTHING else models
        matrix = len(info.shape) == 2
        width = info.shape[1] if matrix else math.prod(info.shape)
        block = _Block(
            terms, change or Change(), base, name, wide_of([*models, origin]),
            getattr(torch, TORCH_NAMES[info.dtype]), width,
        )  # fmt: skip
        return Output(
            info,
            partial(self._compute, block),
            max(1, ROWS // max(1, width)) * width if change else BLOCK,
            partial(blame, [*models, origin]),
            base.folder,
        )

    def _terms(self, name: str) -> list[SumTerm]:
        """Whole models' parts in a tensor of the base, as far as they have it."""
        holders = {m: own[name] for m, own in self._names.items() if name in own}
        if self._base.infos[name].dtype not in FLOAT_DTYPES or not holders:
            return []
        weights = self._parts.weights(next(iter(holders.values())))
        return [(c, self._parts.models[m], holders[m]) for m, c in weights.items() if m in holders]

    def _compute(self, block: _Block, start: int, stop: int) -> Tensor:
        """Entries start to stop of one changed tensor, whole rows where an adapter changes it."""
        total, part = self._sums.pair(stop - start, block.wide)
        block.fill(self._sums, start, stop, total, part)
        part.copy_(block.base.block(block.name, start, stop))
        wrong, norm = self._squares.get(block.name, (0.0, 0.0))
        rounded = total.to(block.written).to(block.wide)
        self._squares[block.name] = (
            wrong + float((rounded - total).double().square().sum()),
            norm + float((total - part).double().square().sum()),
        )
        return total


@dataclass(frozen=True)
class _Block:
    """How the entries of one changed tensor come about."""

    terms: Sequence[SumTerm]
    change: Change
    base: Weights
    name: str
    wide: Any  # dtype of the arithmetic
    written: Any  # dtype in the file
    width: int

    def fill(self, sums: Sums, start: int, stop: int, total: Tensor, part: Tensor) -> None:
        """total = sum of the terms + l * W_0 + s B A, of entries start to stop."""
        if self.terms:
            sums.add(self.terms, start, stop, total, part)
        scale, product = self.change.scale, self.change.product
        first, last = start // max(1, self.width), stop // max(1, self.width)
        if scale:
            scaled = part if self.terms else total
            scaled.copy_(self.base.block(self.name, start, stop))
            scale.apply(scaled.view(-1, self.width), first, last)
            if self.terms:
                total.add_(part)
        if product:
            total.view(-1, self.width).add_(product.rows(first, last, self.wide))


def _prefix(base: Weights, parts: Parts, names: Mapping[str, Mapping[str, str]]) -> str:
    """What stands before the base's names in a model with a task head; empty if they have it."""
    if parts.adapters:
        return spelled(parts.adapters[0].layers, base)[1]
    for own in names.values():
        for short, long in own.items():
            if long != short and long.endswith("." + short):
                return long.removesuffix(short)
    return ""


def _check_tied(head: Mapping[str, Tensor], base: Weights, out: Mapping[str, Output]) -> None:
    """An output layer that the base ties to its embedding cannot have weights of its own."""
    for name in head:
        if "lm_head" in name.split(".") and name not in base.infos:
            raise IncompatibleModules.build(
                base.folder,
                f"the module brings {name!r}, which this model ties to its embedding",
                found=f"{len(out)} tensors, none of that name",
                expected="a model with an output layer of its own",
                do="attach the module instead, or leave its head out (--head none)",
            )
