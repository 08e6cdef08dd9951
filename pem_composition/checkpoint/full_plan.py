"""Which tensors a combination of whole models has, and what each is made of (see ``blocks``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.merging import split
from pem_composition.arithmetic.methods.registry import SIMPLE, Choice
from pem_composition.checkpoint.blocks import (
    Blocks,
    Expression,
    copied,
    held,
    largest_dtype,
    rows_of,
    written_info,
)
from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.checkpoint.full import Weights, aligned, check_equal, fits
from pem_composition.checkpoint.stored_names import token_axis, untied
from pem_composition.checkpoint.stream import Output
from pem_composition.config import is_head
from pem_composition.errors import IncompatibleModules
from pem_composition.record import OWN_RESULT, UPDATE, Certificate

if TYPE_CHECKING:
    from torch import Tensor

# What config.json says of the head: of the model whose head is written.
HEAD_SETTINGS = (
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
)  # fmt: skip


class SumPlan:
    """Which tensors are written and what each is made of.

    Args:
        base: theta_0, None where the coefficients sum to 1; its weight is ``rest``.
    """

    def __init__(
        self,
        models: Sequence[Weights],
        weights: Sequence[float],
        base: Weights | None,
        rest: float,
        tokens: str,
        choice: Choice,
    ) -> None:
        self._models, self._base, self._rest = models, base, rest
        rows = tokens != "error"
        # what one model stores twice, and another ties, is written twice
        self._named = max(models, key=lambda m: len(_numbers(m)))
        for other in models:
            if other is not self._named:
                _check_same(self._named, other, rows=rows)
        self._base_names = aligned(self._named, base, rows=rows) if base is not None else {}
        self.reference = _largest(models) if tokens == "largest" else models[0]
        self._choice = choice
        self._weights, self._shares = split(weights, choice)
        self._blocks = Blocks()

    def is_apart(self, model: Weights, name: str) -> bool:
        """True for a head, and for another part that the base has no value of (a new pooler)."""
        if is_head(name) or self._base is None or name in self._base_names:
            return is_head(name)
        return model.infos[name].dtype in FLOAT_DTYPES

    def outputs(
        self, head: Mapping[str, Tensor], dtype: Any, *, own: Weights | None
    ) -> dict[str, Output]:
        """Every tensor to write.

        Args:
            head: of the models, by the policy.
            dtype: None: as the first model stores it.
            own: the base, where it keeps its own head.
        """
        first = self._models[0]
        out = {
            name: self._output(name, written_info(first.infos[first.find(name) or name], dtype))
            for name in self._named.infos
            if not self.is_apart(self._named, name)
        }
        for name, info in (own.infos if own else {}).items():
            if own and is_head(name):
                out[name] = copied(own, name, written_info(info, dtype))
        for name, value in sorted(head.items()):
            out[name] = held(value, name, largest_dtype(first, dtype))
        return out

    def certificate(self) -> Certificate:
        """The error of the tensors written so far."""
        return self._blocks.certificate(UPDATE if self._choice.method == SIMPLE else OWN_RESULT)

    def config(self, headed: Weights) -> dict[str, Any]:
        """The reference model's configuration, and that of the head that is written."""
        config = dict(self.reference.config)
        if _numbers(self._named) - _numbers(self.reference):
            config = untied(config)
        for key in HEAD_SETTINGS:
            config.pop(key, None)
        return config | {k: v for k, v in headed.config.items() if k in HEAD_SETTINGS}

    def _output(self, name: str, info: TensorInfo) -> Output:
        base = self._base
        if info.dtype not in FLOAT_DTYPES:
            for other in self._models:
                if name in other.infos:
                    check_equal(self._named, other, name, name)
            return copied(self._named, name, info)
        terms = [
            (w, m, m.find(name) or name) for w, m in zip(self._weights, self._models, strict=True)
        ]
        # The update is counted from the base, and where none is needed from the first model.
        origin = terms[0] if base is None else (self._rest, base, self._base_names[name])
        if self._choice.method != SIMPLE:
            return self._blocks.merged(self._choice, self._shares, terms, origin, name, info)
        if base is not None:
            terms.append(origin)
        if len({m.infos[n].shape for _, m, n in terms}) > 1:
            shape = self.reference.infos[self.reference.find(name) or name].shape
            pieces = rows_of(terms, len(self._models), shape[token_axis(name)])
            return self._blocks.of(Expression(name, TensorInfo(info.dtype, shape), pieces, origin))
        return self._blocks.of(Expression(name, info, [(math.prod(info.shape), terms)], origin))


def _largest(models: Sequence[Weights]) -> Weights:
    """The first model with the most rows of embeddings."""

    def rows(m: Weights) -> int:
        return sum(m.infos[n].shape[token_axis(n)] for n in m.infos if m.has_tokens(n))

    return max(models, key=rows)


def _numbers(model: Weights) -> set[str]:
    """Names of the floating tensors outside the head."""
    return {n for n, i in model.infos.items() if i.dtype in FLOAT_DTYPES and not is_head(n)}


def _check_same(first: Weights, other: Weights, *, rows: bool) -> None:
    """Refuse a tensor that one of two models lacks, heads and tied ones apart, or has in another
    shape."""
    names = sorted(_numbers(first))
    only = [n for n in names if other.find(n) is None]
    only += [n for n in sorted(_numbers(other)) if first.find(n) is None]
    if only:
        raise IncompatibleModules.build(
            other.folder,
            f"tensor {only[0]!r} is in one model only",
            found=f"{len(other.infos)} tensors",
            expected=f"the {len(first.infos)} of {first.folder}",
            do="use models of one architecture",
        )
    for name in names:
        found = other.find(name) or name
        if not fits(first, name, other, found, rows=rows):
            a, b = first.infos[name], other.infos[found]
            tokens = fits(first, name, other, found, rows=True)
            added = ", or --tokens first|largest for added tokens" if tokens else ""
            raise IncompatibleModules.build(
                other.folder,
                f"tensor {name!r} differs",
                found=f"{b.dtype} {b.shape}",
                expected=f"{a.dtype} {a.shape} as in {first.folder}",
                do=f"use models of one architecture{added}",
            )
