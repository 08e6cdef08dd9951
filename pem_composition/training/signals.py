"""Requests to stop: SIGTERM, SIGUSR1, SIGUSR2, SIGINT lead to exit 75 without losing a step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pem_composition.errors import Preempted

REPEAT_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Context manager that catches the signals of batch systems.

    Outside ``deferred()`` a signal raises Preempted where it arrives; inside, it is only noted, so
    that the training loop can finish its step and save.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._last = 0.0  # time of the last signal

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals instead of raising; afterwards raise for one that nobody acted on."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self, where: str) -> None:
        """Raise Preempted if a signal has arrived."""
        if self.received:
            raise self._preempted(where)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader worker: its parent decides
            return
        earlier, self._last = self._last, time.monotonic()
        first, self.received = self.received is None, self.received or signal.Signals(number).name
        # One Ctrl-C can arrive twice, from the terminal and from a launcher that passes it on.
        if number == signal.SIGINT and not first and self._last - earlier > REPEAT_SECONDS:
            raise KeyboardInterrupt  # a second Ctrl-C: the user does not want to wait for the step
        if not self._deferred:
            self.check("outside the training loop")

    def _preempted(self, where: str) -> Preempted:
        return Preempted.build(
            self.received, f"stopped {where}", do="run the same command again to resume"
        )  # type: ignore[return-value]
