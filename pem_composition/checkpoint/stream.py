"""Tensors computed block by block and written while the next block is computed.

A second thread hashes and writes (both release the interpreter's lock), so that a large file costs
the slower of computing and writing, not their sum. Memory: SLOTS buffers of SLOT_BYTES for what is
on its way to the disk, beside the block that is being computed.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo, write_values
from pem_composition.checkpoint.tensors import TORCH_NAMES, buffer_of, overflow

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**17  # entries of a block of a sum: its two float32 buffers stay in a core's cache
QUEUE = 6  # buffers that wait for the disk
SLOTS = QUEUE + 2  # and the one being written, and the one being filled
SLOT_BYTES = 2**20  # from 4 MB on Linux may take large pages for the file, at ten times the cost
FLUSH_BYTES = 2**24

Compute = Callable[[int, int], "Tensor"]  # entries start to stop, row-major -> values, flat


@dataclass(frozen=True)
class Output:
    """One tensor to be written.

    Args:
        info: dtype and shape in the file.
        compute: entries from start to stop, in any dtype; called once for every block, in order.
        step: entries of a block.
        blame: raises the error that names the input whose values are not finite; called where a
            result is not, and returns if every input is (then the dtype cannot hold it).
    """

    info: TensorInfo
    compute: Compute
    step: int
    blame: Callable[[], object] = lambda: None
    where: object = "tensor"

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.info.shape)


def whole(value: Callable[[], Tensor], info: TensorInfo) -> Output:
    """An output whose values come at once."""
    return Output(info, lambda start, stop: value().flatten(), max(1, math.prod(info.shape)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, and the threads it had afterwards.

    For arithmetic that a core does as fast as the disk takes it: threads that wait for one another
    at every block are slowed down by the thread that writes, and tenfold by any other job.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Sink:
    """A file written and hashed by a thread of its own.

    A signal can raise at any moment of ``write``. ``queue.Queue`` may then keep its lock for ever,
    and both threads wait; a ``SimpleQueue`` has none that Python holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()  # that are free in the queue
        for _ in range(QUEUE):
            self._places.put(None)
        self._written = self._handed = 0  # bytes in the file, and of these on their way to the disk
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def __enter__(self) -> Sink:
        self._file = self._path.open("wb", buffering=0)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        if self._error is not None and exc[0] is None:
            raise self._error

    def write(self, data: Any) -> None:
        """Take a buffer, which must not change before QUEUE + 1 further ones were taken."""
        if self._error is not None:
            raise self._error
        self._places.get()
        self._queue.put(data)

    def hexdigest(self) -> str:
        """sha256 of the file, once it is closed."""
        return self._digest.hexdigest()

    def _drain(self) -> None:
        while (data := self._queue.get()) is not None:
            self._places.put(None)
            if self._error is None:
                try:
                    self._digest.update(data)
                    self._put(memoryview(data).cast("B"))
                except BaseException as error:  # raised in the caller's thread
                    self._error = error

    def _put(self, data: memoryview) -> None:
        while data:
            count = self._file.write(data)
            data, self._written = data[count:], self._written + count
        pending = self._written - self._handed
        if pending >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # Linux starts to write these pages to the disk: less is left for the fsync at the end
            advice = os.POSIX_FADV_DONTNEED
            os.posix_fadvise(self._file.fileno(), self._handed, pending, advice)
            self._handed = self._written


class Ring:
    """Buffers that are filled one after another and come round when they have been written."""

    def __init__(self) -> None:
        import torch

        self._slots = [torch.empty(SLOT_BYTES, dtype=torch.uint8) for _ in range(SLOTS)]
        self._next = 0

    def take(self, dtype: Any) -> Tensor:
        """The next buffer, as entries of a dtype.

        It was taken SLOTS times ago and is free, if every buffer taken since has gone to the sink.
        """
        self._next = (self._next + 1) % SLOTS
        return self._slots[self._next].view(dtype)

    def buffers(self, name: str, output: Output) -> Iterator[Any]:
        """The bytes of one output, its floating values checked to be finite.

        Raises:
            PEMError: a value that is not, naming its input, or the dtype that cannot hold it.
        """
        import torch

        dtype = getattr(torch, TORCH_NAMES[output.info.dtype])
        floating = output.info.dtype in FLOAT_DTYPES
        slot, filled, size = None, 0, 0.0
        for start in range(0, output.size, output.step):
            values = output.compute(start, min(start + output.step, output.size))
            while len(values):
                if slot is None:  # not before there is something to put: see ``take``
                    slot, filled, size = self.take(dtype), 0, 0.0
                piece = slot[filled : filled + len(values)].copy_(values[: len(slot) - filled])
                size += float(piece.sum()) if floating else 0.0
                values, filled = values[len(piece) :], filled + len(piece)
                if filled == len(slot):
                    yield _checked(name, output, slot, size)
                    slot = None
        if slot is not None:
            yield _checked(name, output, slot[:filled], size)


def _checked(name: str, output: Output, values: Tensor, total: float) -> Any:
    """The bytes of finished values.

    Their sum is finite only if every value is, and costs an eighth of a test of each; where it is
    not, they are tested.
    """
    if not math.isfinite(total):
        import torch

        bad = int((~values.isfinite()).sum())
        if bad:
            output.blame()
            limit = torch.finfo(values.dtype).max
            raise overflow(output.where, name, values.dtype, f"{bad} values beyond it", limit)
    return buffer_of(values)


def stream_safetensors(path: Path, outputs: Mapping[str, Output], ring: Ring) -> str:
    """Write a safetensors file; returns its sha256."""
    with Sink(path) as sink:
        infos = {name: output.info for name, output in outputs.items()}
        write_values(sink.write, infos, lambda name: ring.buffers(name, outputs[name]))
    return sink.hexdigest()
