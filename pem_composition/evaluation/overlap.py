"""ROUGE-L: how much of a reference text an answer has, in the same order.

    P = LCS(x, y) / |x|,  R = LCS(x, y) / |y|,  F = 2 P R / (P + R)

x the words of the answer, y those of the reference, LCS the length of their longest common
subsequence. Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
Words are runs of letters and digits without case; nothing is stemmed.

A proxy of helpfulness, no more: another good answer has other words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case."""
    return WORD.findall(text.casefold())


def rouge_l(answer: str, reference: str) -> float:
    """F of the two texts; 0 where one of them has no word."""
    x, y = words(answer), words(reference)
    common = longest_common(x, y)
    return 2 * common / (len(x) + len(y)) if common else 0.0


def longest_common(x: Sequence[str], y: Sequence[str]) -> int:
    """Length of the longest common subsequence, by rows of the usual table."""
    row = [0] * (len(y) + 1)
    for a in x:
        before = row
        row = [0]
        for j, b in enumerate(y, start=1):
            row.append(before[j - 1] + 1 if a == b else max(before[j], row[-1]))
    return row[-1]
