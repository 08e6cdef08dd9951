"""Deterministic stratified samples of row numbers."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from itertools import pairwise

from pem_composition.errors import DataError

SCORE_BINS = 10


def strata(labels: Sequence[Hashable | float], *, regression: bool = False) -> list[list[int]]:
    """Row numbers grouped by class (in order of first appearance), or by decile of the score."""
    if regression:
        order = sorted(range(len(labels)), key=lambda i: (labels[i], i))
        cuts = [round(k * len(order) / SCORE_BINS) for k in range(SCORE_BINS + 1)]
        return [order[a:b] for a, b in pairwise(cuts) if b > a]
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return list(groups.values())


def allocate(sizes: Sequence[int], total: int) -> list[int]:
    """Share ``total`` among groups in proportion to their sizes, by largest remainder.

    Each count is the exact quota rounded down or up, and they sum to ``total``.
    """
    n = sum(sizes)
    counts = [total * size // n for size in sizes]
    # The remainder of the exact quota, as an integer; ties go to the earlier group.
    order = sorted(range(len(sizes)), key=lambda g: (-(total * sizes[g] % n), g))
    for group in order[: total - sum(counts)]:
        counts[group] += 1
    return counts


def stratified_sample(
    labels: Sequence[Hashable | float], size: int, *, seed: int, regression: bool = False
) -> list[int]:
    """``size`` row numbers, ascending, in which every class keeps its share of the rows.

    Raises:
        DataError: more rows asked than there are.
    """
    if not 0 <= size <= len(labels):
        raise DataError.build("sample", "not enough rows", found=len(labels), expected=size)
    if size == 0:
        return []
    rng = random.Random(seed)
    groups = strata(labels, regression=regression)
    counts = allocate([len(g) for g in groups], size)
    return sorted(i for g, k in zip(groups, counts, strict=True) for i in rng.sample(g, k))
