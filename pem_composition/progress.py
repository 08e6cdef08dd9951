"""Progress bars with an estimate, for steps that take longer than two seconds, on a terminal only.

    for batch in progress.over(batches, "evaluating"):
        ...

Where standard error is no terminal nothing is written and nothing is imported.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
DELAY = 2.0  # seconds before a bar is shown
_shown: list[Any] = []


@contextmanager
def bar(total: int | None, what: str, unit: str = "") -> Iterator[Callable[[int], object]]:
    """A bar; it gives the function that says how many more are done.

    Args:
        total: of what is counted; None: not known, so there is no estimate.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _count: None
        return
    from tqdm import tqdm

    size = shutil.get_terminal_size()  # some terminals say 0 x 0, on which tqdm shows nothing
    with tqdm(
        total=total, desc=what, unit=f" {unit}" if unit else "", delay=DELAY, leave=False,
        ncols=size.columns, nrows=size.lines, file=sys.stderr,
    ) as shown:  # fmt: skip
        _shown.append(shown)
        try:
            yield shown.update
        finally:
            _shown.remove(shown)


def over(items: Iterable[T], what: str, unit: str = "", total: int | None = None) -> Iterator[T]:
    """The items, with a bar that counts them."""
    size = len(items) if total is None and isinstance(items, Sized) else total
    with bar(size, what, unit) as done:
        for item in items:
            yield item
            done(1)


def say(line: str) -> None:
    """Print a line at once, above any bar that is shown by now."""
    now = time.time()
    if any(now - shown.start_t >= DELAY for shown in _shown):
        _shown[-1].write(line, file=sys.stdout)
    else:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
