"""What a tensor of a written checkpoint is made of, block by block, and what rounding costs it.

    theta = sum_j w_j t_j + l * W_0 + s B A                     a sum, with an adapter's change
    theta = theta_0 + f(w_1 (theta_1 - theta_0), ...)           a merging method

The leaves t_j are tensors of whole models and of the base. theta is computed in float32 (float64 if
a leaf is, or what is written) and written in the file's dtype. The certificate compares it with
theta_64, the same expression in float64:

    norm(written - theta_64) / norm(theta_64 - theta_0)

Memory: a block of BLOCK entries, or of whole rows of at most ROWS entries where an adapter changes
the tensor, held twice in float32 and twice in float64, beside one block of one model as stored. A
method works on blocks of rows in float64 (``arithmetic.methods.entries``: 0.3 GB for three models,
whatever the size of the tensor), and reads the models again for every pass over a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import shares
from pem_composition.arithmetic.methods.registry import Choice
from pem_composition.arithmetic.terms import LayerError
from pem_composition.arithmetic.updates import certified
from pem_composition.checkpoint.changes import Change
from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.checkpoint.full import Weights
from pem_composition.checkpoint.stored_names import token_axis
from pem_composition.checkpoint.stream import BLOCK, Output, whole
from pem_composition.checkpoint.tensors import TORCH_NAMES, cast, info_of, widen
from pem_composition.errors import PEMError
from pem_composition.record import Certificate

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.methods.entries import Rule

ROWS = 2**21  # entries of a block of rows: 8 MB in float32, small enough for malloc to use again
UNCHANGED = Change()

Term = tuple[float, Weights, str]  # weight, model, name of the tensor there
Pair = tuple["Tensor", "Tensor"]  # the sum, and a buffer for one term of it


@dataclass(frozen=True)
class Expression:
    """sum_j w_j t_j + l * W_0 + s B A of one tensor.

    Args:
        info: dtype and shape of what is written.
        pieces: (end, terms): the sum of the entries before ``end``. More than one where embeddings
            have tokens that some models lack.
        origin: W_0, from which the update is counted; rows that it lacks are zero.
        change: an adapter's; its ``saved`` is no matter here.
    """

    name: str
    info: TensorInfo
    pieces: Sequence[tuple[int, Sequence[Term]]]
    origin: Term
    change: Change = UNCHANGED

    @property
    def terms(self) -> list[Term]:
        """Every leaf."""
        return [*(term for _, terms in self.pieces for term in terms), self.origin]

    @property
    def width(self) -> int:
        """Entries of a row of a matrix; a vector is one row."""
        shape = self.info.shape
        return max(1, shape[-1] if len(shape) > 1 else math.prod(shape))

    def fill(self, start: int, stop: int, pairs: Sequence[Pair]) -> None:
        """The first buffer of each pair = the expression in that buffer's dtype, entries start to
        stop; the second is overwritten."""
        low = start
        for end, terms in self.pieces:
            high = min(stop, end)
            if low < high and terms:
                piece = slice(low - start, high - start)
                add(terms, low, high, [(total[piece], part[piece]) for total, part in pairs])
                low = high
        _, base, stored = self.origin
        first, last = start // self.width, stop // self.width
        if not (self.change.scale or self.change.product):
            return
        for total, part in pairs:
            if self.change.scale:
                # l * W_0 stands in the place of W_0: beside other terms in the spare buffer
                scaled = part if low > start else total
                scaled.copy_(base.block(stored, start, stop))
                self.change.scale.apply(scaled.view(-1, self.width), first, last)
                if low > start:
                    total.add_(part)
            if self.change.product:
                rows = total.view(-1, self.width)
                rows.add_(self.change.product.rows(first, last, rows))
                if self.change.magnitude:
                    self.change.magnitude.apply(rows, first, last)


def add(terms: Sequence[Term], start: int, stop: int, pairs: Sequence[Pair]) -> None:
    """total = sum_j w_j t_j, entries start to stop; products are added without rounding.

    Every stored block is read once, whatever the number of pairs.
    """
    import torch

    for i, (weight, model, name) in enumerate(terms):
        stored = model.block(name, start, stop)
        for total, part in pairs:
            if abs(weight) > torch.finfo(total.dtype).max:
                dtype = str(total.dtype).removeprefix("torch.")
                raise PEMError.build(
                    f"{model.folder}: {name}", f"the sum is too large for {dtype}",
                    found=f"coefficient {weight:g}", expected="finite numbers",
                    do="choose smaller coefficients",
                )  # fmt: skip
            target = part if i else total
            target.copy_(stored)
            if i:
                total.add_(part, alpha=weight)
            elif weight != 1.0:
                total.mul_(weight)


class Blocks:
    """Outputs of expressions, and the certificate of those that were written so far."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Pair] = {}
        self._squares: dict[str, tuple[float, float]] = {}  # tensor -> of the error, of the update

    def certificate(self, against: str) -> Certificate:
        """The error of every changed tensor, and of all together."""
        errors = {
            name: LayerError(wrong**0.5, norm**0.5, norm**0.5)
            for name, (wrong, norm) in self._squares.items()
        }
        return certified(errors, against)

    def of(self, expression: Expression) -> Output:
        """The output of a sum."""
        blocks = expression.change.scale or expression.change.product
        width = expression.width
        return Output(
            expression.info,
            partial(self._sum, expression, wide_of(expression.terms, expression.info)),
            max(1, ROWS // width) * width if blocks else BLOCK,
            partial(blame, expression.terms),
            expression.origin[1].folder,
        )

    def _pair(self, size: int, dtype: Any) -> Pair:
        """Two buffers of ``size`` entries, used again by the next block."""
        import torch

        if dtype not in self._buffers or len(self._buffers[dtype][0]) < size:
            self._buffers[dtype] = (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype))
        total, part = self._buffers[dtype]
        return total[:size], part[:size]

    def _sum(self, expression: Expression, wide: Any, start: int, stop: int) -> Tensor:
        import torch

        # The same expression twice: as it is written, and in float64 for the certificate.
        pairs = [self._pair(stop - start, wide)]
        if wide != torch.float64:
            pairs.append(self._pair(stop - start, torch.float64))
        expression.fill(start, stop, pairs)
        exact, zero = pairs[-1]
        _, base, stored = expression.origin
        known = min(stop, math.prod(base.infos[stored].shape))
        zero[: max(0, known - start)].copy_(base.block(stored, start, max(start, known)))
        zero[max(0, known - start) :].zero_()
        total = pairs[0][0]
        self._count(expression.name, total.to(torch_dtype(expression.info)), exact, zero)
        return total

    def count_whole(self, name: str, written: Tensor, exact: Tensor, base: Tensor) -> None:
        """Count a tensor that is held in memory; entries that the base lacks were 0."""
        flat = [t.reshape(-1) for t in (written, exact, base)]
        for start in range(0, written.numel(), BLOCK):
            out, wide, known = (t[start : start + BLOCK].double() for t in flat)
            zero = wide.new_zeros(len(wide))
            zero[: len(known)] = known
            self._count(name, out, wide, zero)

    def _count(self, name: str, written: Tensor, exact: Tensor, zero: Tensor) -> None:
        """Add the squares of a block; ``zero`` (float64) is overwritten."""
        update = zero.neg_().add_(exact)
        norm = float(update.dot(update))
        error = zero.copy_(written).sub_(exact)
        before = self._squares.get(name, (0.0, 0.0))
        self._squares[name] = before[0] + float(error.dot(error)), before[1] + norm

    def merged(
        self,
        choice: Choice,
        shares: Sequence[float],
        terms: Sequence[Term],
        origin: Term,
        name: str,
        info: TensorInfo,
    ) -> Output:
        """theta_0 + f(w_1 (theta_1 - theta_0), ..., w_T (theta_T - theta_0)) of one tensor.

        Args:
            choice, shares: f, and the models' shares where it averages (``merging.split``).
            terms: the tensor in each model, with the method's own weight.
        """
        from pem_composition.arithmetic.method_sums import rule_of
        from pem_composition.arithmetic.methods.entries import step_of

        _, base, stored = origin
        leaves = [*terms, origin]
        entries = Differences(terms, base, stored)
        wide, width = wide_of(leaves, info), max(1, entries.shape[1])
        rules: list[Rule] = []

        def compute(start: int, stop: int) -> Tensor:
            if not rules:  # thresholds are found in passes of their own, before the first block
                rules.append(rule_of(entries, choice, name, shares))
            row = start // width
            change = rules[0](row, entries.rows(row, stop // width)).flatten()
            zero = widen(base.block(stored, start, stop), wide)
            total = (change + 0.0).to(wide) + zero  # a minus zero is none, as in a module
            exact = zero.double()
            self._count(name, total.to(torch_dtype(info)), exact + change, exact)
            return total

        step = max(1, step_of(entries) * entries.shape[1])
        return Output(info, compute, step, partial(blame, leaves), base.folder)


class Differences:
    """w_t (theta_t - theta_0) of one tensor, rows read when they are asked for; see ``Entries``.

    Args:
        exact: differences in float64; else as a module's are taken, in float32 (float64 kept).
    """

    def __init__(
        self, terms: Sequence[Term], base: Weights, base_name: str, *, exact: bool = False
    ) -> None:
        from pem_composition.arithmetic.methods.entries import matrix_shape

        self._terms, self._base, self._base_name = terms, base, base_name
        self._exact = exact
        self.count = len(terms)
        self.shape = matrix_shape(base.infos[base_name].shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """(T, N, I), float64."""
        import torch

        first, last = start * self.shape[1], stop * self.shape[1]
        written = torch.float64 if self._exact else None
        zero = widen(self._base.block(self._base_name, first, last), written).clone()
        out = torch.empty(self.count, stop - start, self.shape[1], dtype=torch.float64)
        for row, (weight, model, name) in zip(out, self._terms, strict=True):
            difference = widen(model.block(name, first, last), written) - zero
            row.copy_(difference.view(row.shape)).mul_(weight)
        if not bool(out.sum().isfinite()):
            blame([*self._terms, (1.0, self._base, self._base_name)])
        return out


def rows_of(terms: Sequence[Term], models: int, rows: int) -> list[tuple[int, Sequence[Term]]]:
    """Pieces of a sum of embeddings that differ in rows, of which so many are written.

    A row that all terms have is their sum. One that some lack is no difference to anything there,
    so like a head it is the average over the models that have it, weights |c_i| / sum |c_j|.

    Args:
        models: the first terms, of the models; a further one is the base's.
    """
    infos = [model.infos[name] for _, model, name in terms]
    axis = token_axis(terms[0][2])
    counts = [info.shape[axis] for info in infos]
    width = math.prod(infos[0].shape) // counts[0]
    ends = sorted({min(count, rows) for count in counts} | {rows})
    return [
        (end * width, list(terms) if min(counts) >= end else _average(terms[:models], end))
        for end in ends
    ]


def _average(terms: Sequence[Term], rows: int) -> list[Term]:
    holders = [t for t in terms if t[1].infos[t[2]].shape[token_axis(t[2])] >= rows]
    own = shares([w for w, _, _ in holders])
    return [(share, m, n) for share, (_, m, n) in zip(own, holders, strict=True)]


def copied(model: Weights, name: str, info: TensorInfo) -> Output:
    """A tensor as the model has it, in the dtype of ``info``."""
    return Output(
        info,
        partial(model.block, name),
        BLOCK,
        partial(blame, [(1.0, model, name)]),
        model.folder,
    )


def held(value: Tensor, name: str, dtype: Any) -> Output:
    """A tensor in memory, such as a head's."""
    return whole(lambda: cast(value, name, dtype, "head"), info_as(dtype, tuple(value.shape)))


def wide_of(terms: Sequence[Term], info: TensorInfo) -> Any:
    """The dtype of the arithmetic: float32, float64 if a term is or what is written."""
    import torch

    double = info.dtype == "F64" or any(m.infos[name].dtype == "F64" for _, m, name in terms)
    return torch.float64 if double else torch.float32


def blame(terms: Sequence[Term]) -> None:
    """Raise the error of the first tensor that is not finite, if one is not."""
    for _, model, name in terms:
        if model.infos[name].dtype in FLOAT_DTYPES:
            model.value(name)


def torch_dtype(info: TensorInfo) -> Any:
    """The torch dtype of a header entry."""
    import torch

    return getattr(torch, TORCH_NAMES[info.dtype])


def info_as(dtype: Any, shape: tuple[int, ...]) -> TensorInfo:
    """Header entry of a tensor in a torch dtype."""
    import torch

    return TensorInfo(info_of(torch.empty(0, dtype=dtype)).dtype, shape)


def written_info(stored: TensorInfo, dtype: Any) -> TensorInfo:
    """How a tensor is written: in the dtype asked for, else as the checkpoint stores it.

    Integers stay what they are.
    """
    floating = dtype is not None and stored.dtype in FLOAT_DTYPES
    return info_as(dtype, stored.shape) if floating else stored


def largest_dtype(model: Weights, dtype: Any) -> Any:
    """The dtype of what the checkpoint does not store itself: that of its largest tensor."""
    return dtype or torch_dtype(max(model.infos.values(), key=lambda i: i.nbytes))
