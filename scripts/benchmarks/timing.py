"""Side-by-side timing: alternate the candidates in one run, report medians, spread and ratios."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping


def side_by_side(
    candidates: Mapping[str, Callable[[], object]],
    runs: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each candidate over ``runs`` rounds, A B A B ..., after one round of warm-up.

    Args:
        before: called before each of them, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(runs + 1):
        for name, call in candidates.items():
            before()
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: Mapping[str, list[float]], base: str) -> None:
    """Markdown table: median, min, max, and the median of the per-round ratios to ``base``."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {len(seconds[base])} rounds\n"
    )
    print(
        f"| candidate | median s | min | max | ratio to {base} (median, min-max of rounds) |\n"
        "|---|---|---|---|---|"
    )
    for name, values in seconds.items():
        ratios = [x / y for x, y in zip(values, seconds[base], strict=True)]
        print(
            f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) |"
        )
