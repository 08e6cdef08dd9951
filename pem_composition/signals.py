"""Requests to stop: at any moment a program ends with exit code 75, or is finished first.

SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and SIGINT raise Preempted where they arrive. In ``deferred()``,
as in a training step or while an output gets its name, they are only noted. ``StopRequest`` stands
around the run of every program; before and after it ``catch`` and ``ignore`` hold.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pem_composition.errors import EXIT_PREEMPTED, Preempted

REPEAT_SECONDS = 1.0
AGAIN_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
RESUME = "run the same command again to resume"

_current: StopRequest | None = None


class StopRequest:
    """Context manager that catches the signals of batch systems and terminals."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._depth = 0  # of deferred blocks
        self._outputs: set[Path] = set()
        self._previous: dict[signal.Signals, Any] = {}
        self._hook: Callable[..., object] | None = None
        self._process = os.getpid()
        self._last = self._raised = 0.0  # times of the last signal, and of the last exception

    def __enter__(self) -> StopRequest:
        global _current
        if threading.current_thread() is threading.main_thread():
            self._previous = _install(self._note)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
            self._outer, _current = _current, self
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        global _current
        if self._hook is not None:
            _current, sys.unraisablehook = self._outer, self._hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._raised and isinstance(error, Exception):
            self.check("before the end")  # C++ makes a TypeError of what is raised in its callbacks

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals instead of raising; whoever is inside or comes after looks at them."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def check(self, where: str) -> None:
        """Raise Preempted if a signal has arrived."""
        if self.received:
            self._raised = time.monotonic()
            raise Preempted.build(self.received, f"stopped {where}", do=RESUME)

    def finish_after(self, output: Path) -> None:
        """Once this output has its name, what is left takes less time than doing it all again."""
        self._outputs.add(output.resolve())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._end_child(number)
            return
        earlier, self._last = self._last, time.monotonic()
        first, self.received = self.received is None, self.received or signal.Signals(number).name
        # One Ctrl-C can arrive twice, from the terminal and from a launcher that passes it on.
        if number == signal.SIGINT and not first and self._last - earlier > REPEAT_SECONDS:
            raise KeyboardInterrupt  # a second Ctrl-C: the user does not want to wait for the step
        if not self._depth and _imports(frame):
            self._ask_again(number)
            return
        # A second signal does not interrupt the cleaning that the first one led to.
        if not self._depth and (not self._raised or self._last - self._raised > AGAIN_SECONDS):
            self.check("before the end")

    def _end_child(self, number: int) -> None:
        """A worker of a data loader: in a step its parent decides, else it ends as by default."""
        if not self._depth:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _unraisable(self, info: Any) -> None:
        """Where Python drops an exception (a destructor, a callback from C), ask again."""
        if not isinstance(info.exc_value, Preempted):
            if self._hook is not None:
                self._hook(info)
            return
        self._raised = 0.0
        self._ask_again(signal.Signals[self.received or "SIGTERM"])

    def _ask_again(self, number: int) -> None:
        later = threading.Timer(0.05, os.kill, (self._process, number))
        later.daemon = True
        later.start()


def _imports(frame: FrameType | None) -> bool:
    """True inside an import: an exception there can end a C++ extension, and Python with it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def finished_first() -> Iterator[None]:
    """A step that is not cut: a signal waits for its end, and then ends the program."""
    stop = _current
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with stop.deferred():
        yield
    if not stop._depth:
        stop.check("before the end")


def named(output: Path) -> None:
    """Say that an output has got its name: see ``finish_after``."""
    if _current is not None and output.resolve() in _current._outputs:
        _current._depth += 1


def current() -> StopRequest:
    """The one around this program; outside a program one that heeds nothing."""
    return _current or StopRequest()


def catch(prog: str) -> None:
    """From the start of a process until its StopRequest: nothing is begun, so end at once."""

    def end(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"{prog}: error: {name}: stopped at the start; {RESUME}\n".encode())
        os._exit(EXIT_PREEMPTED)

    _install(end)


def ignore() -> None:
    """After the run, whose exit code stands."""
    _install(signal.SIG_IGN)


def _install(handler: Any) -> dict[signal.Signals, Any]:
    """Set the handler and return those before; what ``nohup`` or a shell ignores stays ignored."""
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
