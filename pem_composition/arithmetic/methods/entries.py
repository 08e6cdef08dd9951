"""T matrices of one layer read in blocks of rows, and exact selection of their largest entries.

What a method that works entry by entry needs: dW = sum of factors, tensors, or core matrices, all
seen as (T, O, I) in float64 without more than a block of rows of them in memory at a time. A
method is a ``Rule``: it may go over all blocks first (for thresholds), then maps one block of T
matrices to one block of the result.

Memory: a block has at most BLOCK entries over all T (one row at least), with a handful of
temporaries of its size; selection adds 65,536 counters and at most BLOCK candidates per module.
That is 16 MB for each, 0.3 GB in all for three modules, whatever the size of the layer.

Shape suffixes: T modules, N rows of a block, O outputs, I inputs, S selections made at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pem_composition.arithmetic.terms import Factor

BLOCK = 2**21

Rule = Callable[[int, Tensor], Tensor]  # (first row, T x N x I) -> N x I
Score = Callable[[int, Tensor], Tensor]  # (first row, T x N x I) -> S x N x I, not negative


class Entries(Protocol):
    """T matrices of one shape."""

    count: int
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of all of them, (T, N, I), float64."""
        ...


class Stacked:
    """Matrices held in memory, (T, O, I)."""

    def __init__(self, X_TOI: Tensor) -> None:
        self._all = X_TOI.double()
        self.count = X_TOI.shape[0]
        self.shape = (X_TOI.shape[1], X_TOI.shape[2])

    def rows(self, start: int, stop: int) -> Tensor:
        return self._all[:, start:stop]


class Scaled:
    """w_t (t - neutral) of tensors in their own dtype; vectors are one row."""

    def __init__(self, terms: Sequence[tuple[float, Tensor]], neutral: float = 0.0) -> None:
        self._terms = [(w, matrix(t)) for w, t in terms]
        self._neutral = neutral
        self.count = len(terms)
        first = self._terms[0][1]
        self.shape = (first.shape[0], first.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.stack([w * (t[start:stop].double() - self._neutral) for w, t in self._terms])


class Products:
    """w_t B_t A_t, multiplied out block by block."""

    def __init__(self, terms: Sequence[Factor]) -> None:
        self._terms = [(t.B_OR.double() * t.weight, t.A_RI.double()) for t in terms]
        self.count = len(terms)
        self.shape = (terms[0].B_OR.shape[0], terms[0].A_RI.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.stack([B[start:stop] @ A for B, A in self._terms])


def matrix(tensor: Tensor) -> Tensor:
    """A tensor as rows of entries: vectors and scalars are one row, stacked matrices (the experts
    of a layer) one matrix below the other."""
    return tensor.reshape(matrix_shape(tuple(tensor.shape)))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of ``matrix`` of a tensor of this shape."""
    leading = {0: 0, 1: 0, 3: 2}.get(len(shape), 1)
    return math.prod(shape[:leading]), math.prod(shape[leading:])


def step_of(entries: Entries) -> int:
    """Rows of a block."""
    return max(1, BLOCK // max(1, entries.shape[1] * entries.count))


def blocks(entries: Entries) -> Iterator[tuple[int, Tensor]]:
    """All rows in order, as (first row, T x N x I)."""
    rows, step = entries.shape[0], step_of(entries)
    for start in range(0, rows, step):
        yield start, entries.rows(start, min(start + step, rows))


def merged(entries: Entries, rule: Rule) -> Tensor:
    """The whole result of a rule, (O, I)."""
    return torch.cat([rule(start, X) for start, X in blocks(entries)])


class Largest(NamedTuple):
    """Which entries of one matrix are selected: those above ``value``, and of those equal to it
    the ones up to position ``last`` in row-major order."""

    value: float
    last: int

    def mask(self, start: int, score_NI: Tensor) -> Tensor:
        """True where an entry of the block that begins at row ``start`` is selected."""
        above = score_NI > self.value
        equal = score_NI == self.value
        if not equal.any():
            return above
        return above | (equal & (_positions(start, score_NI) <= self.last))


def share(entries: Entries, density: float) -> int:
    """Number of entries that a share of the matrix is: floor(density O I), at least 1."""
    return max(1, int(density * entries.shape[0] * entries.shape[1]))


def largest(entries: Entries, score: Score, count: int) -> list[Largest]:
    """For each of S score matrices, its ``count`` largest entries, exactly.

    The count-th largest value is found by radix selection on the bits of the doubles (which
    order as integers, being not negative), 16 bits per pass over the blocks, until the candidates
    fit a block and can be held; a matrix that fits one is held at once.
    """
    small = entries.shape[0] * entries.shape[1] <= BLOCK
    selections: list[_Selection] = []
    settled = False
    while not settled:
        for start, X in blocks(entries):
            scores = score(start, X)
            selections = selections or [_Selection(count, small) for _ in scores]
            for selection, s in zip(selections, scores, strict=True):
                selection.count_in(s)
        settled = all([s.settle() for s in selections])  # noqa: C419 - every one takes the step
    return _last_positions(entries, score, selections)


class _Selection:
    """Radix selection of the count-th largest score of one matrix."""

    BITS = 16

    def __init__(self, count: int, small: bool) -> None:
        self.needed = count  # how many are still to be found among the candidates
        self.prefix = 0  # the leading bits that all candidates share
        self.shift = 64  # how many bits below the prefix are open
        self.value: float | None = None
        self.equal = 0  # entries equal to the value; all but ``needed`` of them are dropped
        self._counts = torch.zeros(0 if small else 2**self.BITS, dtype=torch.int64)
        self._collected: list[Tensor] | None = [] if small else None

    def count_in(self, score: Tensor) -> None:
        """See one block."""
        if self.value is not None:
            return
        bits = score.contiguous().view(torch.int64).flatten()
        if self.shift < 64:
            bits = bits[(bits >> self.shift) == self.prefix]
        if self._collected is not None:
            self._collected.append(bits)
            return
        digits = (bits >> (self.shift - self.BITS)) & (2**self.BITS - 1)
        self._counts += torch.bincount(digits, minlength=2**self.BITS)

    def settle(self) -> bool:
        """Use what the pass has counted; True once the value is known."""
        if self.value is not None:
            return True
        if self._collected is not None:
            candidates = torch.cat(self._collected)
            self._end_at(candidates.kthvalue(len(candidates) - self.needed + 1).values, candidates)
            return True
        from_top = self._counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, self.needed))
        inside = int(self._counts.flip(0)[place])
        self.needed -= int(from_top[place]) - inside
        self.prefix = (self.prefix << self.BITS) | (2**self.BITS - 1 - place)
        self.shift -= self.BITS
        self._counts.zero_()
        if self.shift == 0:
            self.value, self.equal = _double(self.prefix), inside
        elif inside <= BLOCK:
            self._collected = []
        return self.value is not None

    def _end_at(self, bits: Tensor, candidates: Tensor) -> None:
        self.value = _double(int(bits))
        self.equal = int((candidates == bits).sum())
        self.needed -= int((candidates > bits).sum())


def _double(bits: int) -> float:
    return float(torch.tensor([bits], dtype=torch.int64).view(torch.float64))


def _positions(start: int, score_NI: Tensor) -> Tensor:
    """Row-major position of every entry of a block in the whole matrix."""
    rows, width = score_NI.shape
    return torch.arange(start * width, (start + rows) * width).view(rows, width)


def _last_positions(
    entries: Entries, score: Score, selections: Sequence[_Selection]
) -> list[Largest]:
    """Where several entries equal the value, the position up to which they are kept."""
    everything = entries.shape[0] * entries.shape[1]
    last = [everything if s.equal == s.needed else -1 for s in selections]
    left = [s.needed for s in selections]
    if -1 in last:
        for start, X in blocks(entries):
            for i, s in enumerate(score(start, X)):
                if last[i] >= 0:
                    continue
                here = _positions(start, s)[s == selections[i].value]
                if len(here) >= left[i]:
                    last[i] = int(here[left[i] - 1])
                left[i] -= len(here)
    return [
        Largest(s.value if s.value is not None else 0.0, p)
        for s, p in zip(selections, last, strict=True)
    ]


def magnitudes(start: int, X_TNI: Tensor) -> Tensor:
    """Score of magnitude: abs of every entry, one selection per module."""
    return X_TNI.abs()
