"""How sure an estimate is: means, shares and ratios over texts, rows or windows.

Errors take the rows for independent or, with ``groups`` (n,), the groups, such as the texts of one
prompt. Of a mean m of x (n,) in G groups the error is

    sqrt(G / (G - 1) sum_g (sum_(i in g) x_i - m)^2) / n,

which for groups of one row each is s / sqrt(n).

A share p of n has no symmetric error: 0 of 200 is not 0 +- 0. Its interval is Wilson's (1927),

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   z = 1.96,

with, for groups, as many independent rows as give the error of the groups, and at most n.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pem_composition.evaluation.metrics import resampled

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations
DRAWS = 400  # bootstrap samples


class Estimate(NamedTuple):
    """A value and its standard error; None where there are no rows, or is only one."""

    value: float | None
    stderr: float | None


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval; None where there are no rows."""

    value: float | None
    low: float
    high: float


def mean(x: ArrayLike, groups: ArrayLike | None = None) -> Estimate:
    """Mean of x (n,) and its standard error over rows or groups (n,)."""
    values = np.asarray(x, np.float64)
    if not len(values):
        return Estimate(None, None)
    middle = float(np.mean(values))
    if groups is None:
        spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return Estimate(middle, spread)
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(places, weights=values - middle)
    if len(sums) < 2:
        return Estimate(middle, None)
    correction = len(sums) / (len(sums) - 1)
    return Estimate(middle, math.sqrt(correction * float(np.square(sums).sum())) / len(values))


def share(flags: ArrayLike, groups: ArrayLike | None = None) -> Interval:
    """Share of true ones among flags (n,), with Wilson's interval."""
    values = np.asarray(flags, np.float64)
    n = float(len(values))
    if groups is not None and n:
        kinds, p = len(np.unique(np.asarray(groups))), float(np.mean(values))
        error = mean(values, groups).stderr
        # Where all flags are equal the groups say nothing of each other but how many they are.
        n = min(n, p * (1 - p) / error**2) if error else kinds
    return wilson(float(np.mean(values)) if len(values) else None, n)


def wilson(p: float | None, n: float) -> Interval:
    """The interval of a share p of n independent rows."""
    if p is None or n <= 0:
        return Interval(None, 0.0, 1.0)
    middle, size = p + Z * Z / (2 * n), 1 + Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # Rounding must not leave 0 or 1 out of an interval that ends there.
    low = 0.0 if p == 0 else max(0.0, (middle - half) / size)
    return Interval(p, low, 1.0 if p == 1 else min(1.0, (middle + half) / size))


def ratio(sums: ArrayLike, counts: ArrayLike) -> Estimate:
    """sum_i sums_i / sum_i counts_i over rows (n,), with the standard error of a ratio of two sums:

    sqrt(n / (n - 1) sum_i (sums_i - ratio counts_i)^2) / sum_i counts_i; 0 of a single row.
    """
    above, below = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    value, n = float(above.sum() / below.sum()), len(below)
    spread = float(np.square(above - value * below).sum())
    return Estimate(value, math.sqrt(spread * n / (n - 1)) / float(below.sum()) if n > 1 else 0.0)


def draws(metric: str, labels: NDArray[Any] | None, predictions: ArrayLike) -> NDArray[Any]:
    """How far a score depends on which rows happened to be scored.

    The metric on DRAWS bootstrap samples of the rows, the same for equal numbers of rows, so
    that what two modules get wrong together cancels in their difference.

    Args:
        labels: None for the metric ``loss``.
        predictions: what the metric compares with the labels; for ``loss`` the loss of each row.
    """
    given = np.asarray(predictions)
    generator = np.random.default_rng(0)
    if labels is None:
        samples = (generator.integers(len(given), size=len(given)) for _ in range(DRAWS))
        return np.array([given[rows].mean() for rows in samples])
    return resampled(metric, labels, given.astype(labels.dtype), generator, DRAWS)


def flat(**found: Estimate | Interval) -> dict[str, float | None]:
    """As columns: ``name`` and ``name_stderr``, or ``name``, ``name_low`` and ``name_high``."""
    out: dict[str, float | None] = {}
    for name, value in found.items():
        out[name] = value.value
        if isinstance(value, Interval):
            out |= {f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            out[f"{name}_stderr"] = value.stderr
    return out
