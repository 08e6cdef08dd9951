"""Which tensors a combination of whole models has, and which of its inputs each is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pem_composition.arithmetic.heads import check_answers
from pem_composition.arithmetic.methods.registry import SIMPLE, Choice
from pem_composition.checkpoint.files import FLOAT_DTYPES
from pem_composition.checkpoint.full import Weights, aligned, fits, head_info
from pem_composition.checkpoint.full_blocks import (
    Merger,
    Sums,
    copy_output,
    head_value,
    info_as,
    rows_output,
    sum_output,
)
from pem_composition.checkpoint.stream import Output, whole
from pem_composition.checkpoint.tensors import cast
from pem_composition.config import HeadInfo, is_head
from pem_composition.errors import IncompatibleModules

# What config.json says of the head: of the model whose head is written.
HEAD_SETTINGS = (
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
)  # fmt: skip


class _Answer(NamedTuple):
    """A model as far as its head goes."""

    name: str
    head: HeadInfo | None


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
        self.headed = _headed(models, head)
        pooled = head in ("average", "error")
        for other in models[1:]:
            _check_same(first, other, heads=pooled, rows=self._rows)
        if pooled:
            check_answers(
                [_Answer(m.folder.name, head_info(m.config)) for m in models if _has_head(m)]
            )
        self._base_names = aligned(first, base, rows=self._rows) if base is not None else {}
        self._names = [n for n in first.infos if not self._is_head(n)]
        if head != "none":
            self._names += sorted(n for n in self.headed.infos if self._is_head(n))
        self.reference = _largest(models) if tokens == "largest" else first
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
        """The reference model's configuration, and that of the head that is written."""
        config = dict(self.reference.config)
        for key in HEAD_SETTINGS:
            config.pop(key, None)
        return config | {k: v for k, v in self.headed.config.items() if k in HEAD_SETTINGS}

    def _is_head(self, name: str) -> bool:
        """True for a head, and for another part that the base has no value of (a new pooler)."""
        if is_head(name) or self._base is None or name in self._base_names:
            return is_head(name)
        return (self._models[0].infos.get(name) or self.headed.infos[name]).dtype in FLOAT_DTYPES

    def _output(self, name: str, dtype: Any) -> Output:
        source = self.headed if self._is_head(name) else self._models[0]
        if source.infos[name].dtype not in FLOAT_DTYPES:
            return copy_output(self._models, name)
        if self._is_head(name):
            return self._head_output(name, dtype)
        terms = [
            (w, m, m.find(name) or name) for w, m in zip(self._weights, self._models, strict=True)
        ]
        if self._merger is not None:
            return self._merger.output(terms, self._base_names[name], name, dtype)
        if self._base is not None:
            terms.append((self._rest, self._base, self._base_names[name]))
        shapes = {m.infos[n].shape for _, m, n in terms}
        if len(shapes) == 1:
            return sum_output(self._sums, terms, dtype)
        like = self.reference.infos[self.reference.find(name) or name]
        return rows_output(self._sums, terms, len(self._models), like, dtype)

    def _head_output(self, name: str, dtype: Any) -> Output:
        single = self._head in ("first", "last")
        models = [self.headed] if single else self._models
        double = any(m.infos[name].dtype == "F64" for m in models)
        import torch

        info = info_as(
            dtype or (torch.float64 if double else torch.float32), self.headed.infos[name].shape
        )

        def value() -> Any:
            found = head_value(models, self._weights, name, self._head)
            return cast(found, name, dtype, self.headed.folder)

        return whole(value, info)


def _has_head(model: Weights) -> bool:
    return any(is_head(n) for n in model.infos)


def _headed(models: Sequence[Weights], head: str) -> Weights:
    """The model whose head is written, with its labels: one that has a head, if any does."""
    holders = [m for m in models if _has_head(m)]
    place = -1 if head == "last" else 0
    return models[place] if models[place] in holders or not holders else holders[place]


def _largest(models: Sequence[Weights]) -> Weights:
    """The first model with the most rows of embeddings."""
    return max(models, key=lambda m: sum(m.infos[n].shape[0] for n in m.infos if m.has_tokens(n)))


def _check_same(first: Weights, other: Weights, *, heads: bool, rows: bool) -> None:
    """Refuse a tensor that one of two models lacks, tied ones apart, or has in another shape."""

    def compared(model: Weights) -> list[str]:
        floating = (n for n, i in model.infos.items() if i.dtype in FLOAT_DTYPES)
        return sorted(n for n in floating if heads or not is_head(n))

    only = [n for n in compared(first) if other.find(n) is None]
    only += [n for n in compared(other) if n not in first.infos]
    if only:
        raise IncompatibleModules.build(
            other.folder,
            f"tensor {only[0]!r} is in one model only",
            found=f"{len(other.infos)} tensors",
            expected=f"the {len(first.infos)} of {first.folder}",
            do=_remedy(only[0]),
        )
    for name in compared(first):
        found = other.find(name) or name
        if not fits(first, name, other, found, rows=rows):
            a, b = first.infos[name], other.infos[found]
            raise IncompatibleModules.build(
                other.folder,
                f"tensor {name!r} differs",
                found=f"{b.dtype} {b.shape}",
                expected=f"{a.dtype} {a.shape} as in {first.folder}",
                do=_remedy(name, tokens=fits(first, name, other, found, rows=True)),
            )


def _remedy(name: str, *, tokens: bool = False) -> str:
    if is_head(name):
        return "keep one head (--head first|last)"
    if tokens:
        return "use models of one architecture, or --tokens first|largest for added tokens"
    return "use models of one architecture"
