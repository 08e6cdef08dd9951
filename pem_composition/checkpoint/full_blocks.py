"""What every tensor of a combination of whole models is made of, and how, block by block.

Memory: a block of a sum is BLOCK entries, held twice in float32, beside one block of each model as
stored. A method (``choice``) works on blocks of rows in float64 (``arithmetic.methods.entries``:
0.3 GB for three models, whatever the size of the tensor), and reads the models again for every pass
that it makes over a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import shares, weighted_sum
from pem_composition.arithmetic.merging import rule_of, split
from pem_composition.arithmetic.methods.registry import Choice
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.full import Weights, check_equal
from pem_composition.checkpoint.stream import BLOCK, Output, whole
from pem_composition.checkpoint.tensors import info_of, widen
from pem_composition.errors import IncompatibleModules, PEMError

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.delta import LayerError
    from pem_composition.arithmetic.methods.entries import Rule

Term = tuple[float, Weights, str]  # weight, model, name of the tensor there


class Sums:
    """sum_j w_j t_j of stored tensors, block by block, in two buffers that are used again."""

    def __init__(self) -> None:
        self._buffers: dict[Any, tuple[Tensor, Tensor]] = {}

    def pair(self, size: int, dtype: Any) -> tuple[Tensor, Tensor]:
        """Two buffers of ``size`` entries."""
        import torch

        if dtype not in self._buffers or len(self._buffers[dtype][0]) < size:
            self._buffers[dtype] = (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype))
        total, part = self._buffers[dtype]
        return total[:size], part[:size]

    def add(
        self, terms: Sequence[Term], start: int, stop: int, total: Tensor, part: Tensor
    ) -> None:
        """total = sum_j w_j t_j, entries start to stop; products are added without rounding."""
        import torch

        for i, (weight, model, name) in enumerate(terms):
            if abs(weight) > torch.finfo(total.dtype).max:
                dtype = str(total.dtype).removeprefix("torch.")
                raise PEMError.build(
                    f"{model.folder}: {name}", f"the sum is too large for {dtype}",
                    found=f"coefficient {weight:g}", expected="finite numbers",
                    do="choose smaller coefficients",
                )  # fmt: skip
            target = part if i else total
            target.copy_(model.block(name, start, stop))
            if i:
                total.add_(part, alpha=weight)
            elif weight != 1.0:
                total.mul_(weight)

    def block(self, terms: Sequence[Term], dtype: Any, start: int, stop: int) -> Tensor:
        """sum_j w_j t_j, entries start to stop; valid until the next block."""
        total, part = self.pair(stop - start, dtype)
        self.add(terms, start, stop, total, part)
        return total


def wide_of(terms: Sequence[Term]) -> Any:
    """The dtype of the arithmetic: float32, float64 if a term is."""
    import torch

    double = any(model.infos[name].dtype == "F64" for _, model, name in terms)
    return torch.float64 if double else torch.float32


def blame(terms: Sequence[Term]) -> None:
    """Raise the error of the first tensor that is not finite, if one is not."""
    for _, model, name in terms:
        model.value(name)


def sum_output(sums: Sums, terms: Sequence[Term], dtype: Any) -> Output:
    """The sum of tensors of one shape, in ``dtype`` or as wide as the arithmetic."""
    wide = wide_of(terms)
    shape = terms[0][1].infos[terms[0][2]].shape
    return Output(
        info_as(dtype or wide, shape),
        partial(sums.block, terms, wide),
        step=BLOCK,
        blame=partial(blame, terms),
        where=terms[0][1].folder,
    )


def info_as(dtype: Any, shape: tuple[int, ...]) -> TensorInfo:
    """Header entry of a tensor in a torch dtype."""
    import torch

    return TensorInfo(info_of(torch.empty(0, dtype=dtype)).dtype, shape)


def copy_output(models: Sequence[Weights], name: str) -> Output:
    """An integer tensor, which must be equal in all models that have it."""
    first = models[0]

    def value() -> Tensor:
        for other in models[1:]:
            if name in other.infos:
                check_equal(first, other, name, name)
        return first.raw(name).contiguous()

    return whole(value, first.infos[name])


# --- tokens that one model has and another lacks --------------------------------------------------


def rows_output(
    sums: Sums, terms: Sequence[Term], models: int, like: TensorInfo, dtype: Any
) -> Output:
    """A sum in which the tensors differ in rows: those of ``like`` are written.

    A row that all terms have is their sum. One that some lack is no difference to anything there,
    so like a head it is the average over the models that have it, weights |c_i| / sum |c_j|.

    Args:
        models: the first terms, of the models; a further one is the base's.
    """
    width = math.prod(like.shape[1:])
    wide = wide_of(terms)
    counts = [model.infos[name].shape[0] for _, model, name in terms]
    ends = sorted({min(count, like.shape[0]) for count in counts} | {like.shape[0]})
    parts = [
        (end * width, list(terms) if min(counts) >= end else _average(terms[:models], end))
        for end in ends
    ]

    def compute(start: int, stop: int) -> Tensor:
        total, part = sums.pair(stop - start, wide)
        low = start
        for end, own in parts:
            high = min(stop, end)
            if low < high:
                piece = slice(low - start, high - start)
                sums.add(own, low, high, total[piece], part[piece])
                low = high
        return total

    return Output(
        info_as(dtype or wide, like.shape),
        compute,
        step=BLOCK,
        blame=partial(blame, terms),
        where=terms[0][1].folder,
    )


def _average(terms: Sequence[Term], rows: int) -> list[Term]:
    holders = [t for t in terms if t[1].infos[t[2]].shape[0] >= rows]
    own = shares([w for w, _, _ in holders])
    return [(share, m, n) for share, (_, m, n) in zip(own, holders, strict=True)]


# --- merging methods ------------------------------------------------------------------------------


class Differences:
    """w_t (theta_t - theta_0) of one tensor, rows read when they are asked for; see ``Entries``."""

    def __init__(self, terms: Sequence[Term], base: Weights, base_name: str) -> None:
        from pem_composition.arithmetic.methods.entries import matrix_shape

        self._terms, self._base, self._base_name = terms, base, base_name
        self.count = len(terms)
        self.shape = matrix_shape(base.infos[base_name].shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """(T, N, I), float64; every difference is taken as a module's is, in float32."""
        import torch

        first, last = start * self.shape[1], stop * self.shape[1]
        zero = widen(self._base.block(self._base_name, first, last)).clone()
        out = torch.empty(self.count, stop - start, self.shape[1], dtype=torch.float64)
        for row, (weight, model, name) in zip(out, self._terms, strict=True):
            difference = widen(model.block(name, first, last)) - zero
            row.copy_(difference.view(row.shape)).mul_(weight)
        if not bool(out.sum().isfinite()):
            blame([*self._terms, (1.0, self._base, self._base_name)])
        return out


class Merger:
    """A merging method on the differences to the base, one tensor after another."""

    def __init__(self, choice: Choice, coefficients: Sequence[float], base: Weights) -> None:
        self._choice, self._base = choice, base
        self._weights, self._shares = split(coefficients, choice)
        self._squares: dict[str, list[float]] = {}  # tensor -> of the error, of the result

    def errors(self) -> dict[str, LayerError]:
        """What rounding, to a difference in float32 and to the file's dtype, has changed of the
        tensors written so far."""
        from pem_composition.arithmetic.delta import LayerError

        return {
            name: LayerError(wrong**0.5, norm**0.5, norm**0.5)
            for name, (wrong, norm) in self._squares.items()
        }

    def output(self, models: Sequence[Term], base_name: str, name: str, dtype: Any) -> Output:
        """theta_0 + f(w_1 (theta_1 - theta_0), ..., w_T (theta_T - theta_0)) of one tensor.

        Args:
            models: the tensor in each; the weights are the method's own.
            name: of what is written.
        """
        from pem_composition.arithmetic.methods.entries import step_of

        terms = [(w, m, n) for w, (_, m, n) in zip(self._weights, models, strict=True)]
        origin = (1.0, self._base, base_name)
        wide = wide_of([*terms, origin])
        entries = Differences(terms, self._base, base_name)
        width = entries.shape[1]
        rules: list[Rule] = []
        squares = self._squares.setdefault(name, [0.0, 0.0])

        def compute(start: int, stop: int) -> Tensor:
            if not rules:
                rules.append(rule_of(entries, self._choice, name, self._shares))
            row = start // max(1, width)
            change = rules[0](row, entries.rows(row, stop // max(1, width)))
            rounded = (change + 0.0).to(wide)  # a minus zero is none, as in a module
            zero = widen(self._base.block(base_name, start, stop))
            total = rounded.flatten() + zero
            written = total.to(dtype or wide).double()
            squares[0] += float((written - zero.double() - change.flatten()).square().sum())
            squares[1] += float(change.square().sum())
            return total

        return Output(
            info_as(dtype or wide, self._base.infos[base_name].shape),
            compute,
            step=max(1, step_of(entries) * width),
            blame=partial(blame, [*terms, origin]),
            where=terms[0][1].folder,
        )


# --- heads ----------------------------------------------------------------------------------------


def head_value(
    models: Sequence[Weights], weights: Sequence[float], name: str, policy: str
) -> Tensor:
    """A head's tensor by the policy ``average`` or ``error``; of one model it is its own."""
    values = [m.value(name) for m in models]
    if policy == "error" and not all(v.equal(values[0]) for v in values):
        raise IncompatibleModules.build(
            "head",
            "the heads differ",
            found=f"different values of {name}",
            expected="equal heads",
            do="choose --head average, first, last or none",
        )
    if policy != "average":
        return values[0]
    total: Tensor = weighted_sum(values, shares(weights))
    return total
