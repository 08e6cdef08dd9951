"""Which tensors a combination of whole models has, and which of its inputs each is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pem_composition.arithmetic.methods.registry import SIMPLE, Choice
from pem_composition.checkpoint.files import FLOAT_DTYPES, read_json
from pem_composition.checkpoint.full import Weights, aligned, fits, is_head
from pem_composition.checkpoint.full_blocks import (
    Merger,
    Sums,
    copy_output,
    head_value,
    info_as,
    rows_output,
    sum_output,
)
from pem_composition.checkpoint.model_folder import CONFIG
from pem_composition.checkpoint.stream import Output, whole
from pem_composition.checkpoint.tensors import cast
from pem_composition.errors import IncompatibleModules


class Plan:
    """Which tensors are written and what each is made of."""

    def __init__(
        self,
        models: Sequence[Weights],
        weights: Sequence[float],
        base: Weights | None,
        rest: float,
        head: str,
        tokens: str,
        choice: Choice,
    ) -> None:
        self._models, self._weights, self._base, self._rest = models, weights, base, rest
        self._head, self._rows = head, tokens != "error"
        self._sums = Sums()
        first = models[0]
        shared = [n for n in first.infos if not is_head(n)]
        heads = {n for m in models for n in m.infos if is_head(n)}
        self._chosen = models[-1 if head == "last" else 0]
        self._names = shared + (
            [] if head == "none" else sorted(n for n in heads if n in self._chosen.infos)
        )
        compared = set(first.infos) if head in ("average", "error") else set(shared)
        for other in models[1:]:
            names = {n for n in other.infos if head in ("average", "error") or not is_head(n)}
            _check_same(first, other, compared, names, rows=self._rows)
        self.reference = _largest(models) if tokens == "largest" else first
        self._base_names = aligned(first, base, rows=self._rows) if base is not None else {}
        self._merger: Merger | None = None
        if choice.method != SIMPLE:
            assert base is not None
            self._merger = Merger(choice, weights, base)

    def outputs(self, dtype: Any) -> dict[str, Output]:
        """Every tensor to write; ``dtype`` None: as wide as the arithmetic."""
        return {name: self._output(name, dtype) for name in self._names}

    def errors(self) -> dict[str, Any] | None:
        """Of a method: the error of every difference that was written, by parameter."""
        return self._merger.errors() if self._merger else None

    def config(self) -> dict[str, Any]:
        """The reference model's configuration."""
        return read_json(self.reference.folder / CONFIG, self.reference.folder)

    def _output(self, name: str, dtype: Any) -> Output:
        source = self._chosen if is_head(name) else self._models[0]
        if source.infos[name].dtype not in FLOAT_DTYPES:
            return copy_output(self._models, name)
        if is_head(name):
            return self._head_output(name, dtype)
        if self._merger is not None:
            return self._merger.output(self._models, name, self._base_names[name], dtype)
        terms = [(w, m, name) for w, m in zip(self._weights, self._models, strict=True)]
        if self._base is not None:
            terms.append((self._rest, self._base, self._base_names[name]))
        shapes = {m.infos[n].shape for _, m, n in terms}
        if len(shapes) == 1:
            return sum_output(self._sums, terms, dtype)
        like = self.reference.infos[name]
        return rows_output(self._sums, terms, len(self._models), like, dtype)

    def _head_output(self, name: str, dtype: Any) -> Output:
        single = self._head in ("first", "last")
        models = [self._chosen] if single else self._models
        double = any(m.infos[name].dtype == "F64" for m in models)
        import torch

        info = info_as(
            dtype or (torch.float64 if double else torch.float32), self._chosen.infos[name].shape
        )

        def value() -> Any:
            found = head_value(models, self._weights, name, self._head)
            return cast(found, name, dtype, self._chosen.folder)

        return whole(value, info)


def _largest(models: Sequence[Weights]) -> Weights:
    """The first model with the most rows in all."""
    return max(models, key=lambda m: sum(i.shape[0] for i in m.infos.values() if i.shape))


def _check_same(
    first: Weights, other: Weights, names: set[str], others: set[str], *, rows: bool
) -> None:
    only = sorted(names ^ others)
    if only:
        raise IncompatibleModules.build(
            other.folder,
            f"tensor {only[0]!r} is in one model only",
            found=f"{len(others)} tensors",
            expected=f"the {len(names)} of {first.folder}",
            do=_remedy(only[0], tokens=False),
        )
    for name in sorted(names):
        a, b = first.infos[name], other.infos[name]
        same = fits(a, b, rows=rows and not is_head(name))
        if not same or (a.dtype in FLOAT_DTYPES) != (b.dtype in FLOAT_DTYPES):
            raise IncompatibleModules.build(
                other.folder,
                f"tensor {name!r} differs",
                found=f"{b.dtype} {b.shape}",
                expected=f"{a.dtype} {a.shape} as in {first.folder}",
                do=_remedy(name, tokens=len(a.shape) > 1 and fits(a, b, rows=True)),
            )


def _remedy(name: str, *, tokens: bool) -> str:
    if is_head(name):
        return "keep one head (--head first|last)"
    if tokens:
        return "use models of one architecture, or --tokens first|largest for added tokens"
    return "use models of one architecture"
