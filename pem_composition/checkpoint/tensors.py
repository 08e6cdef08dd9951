"""Tensors of a module file: read as float32 (float64 kept), checked, cast and written.

Either file format, one interface: ``infos`` (name -> dtype, shape), ``read(name)``, ``sha256()``.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.updates import all_finite, wider
from pem_composition.checkpoint.files import (
    FLOAT_DTYPES,
    SafetensorsFile,
    TensorInfo,
    write_safetensors,
)
from pem_composition.checkpoint.pickles import TorchZipFile
from pem_composition.errors import CheckpointError, PEMError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

TensorFile = SafetensorsFile | TorchZipFile


def open_tensors(path: Path, root: Path | None = None) -> TensorFile:
    """Open a ``.safetensors`` or (through the restricted unpickler) a torch zip file."""
    return (SafetensorsFile if path.suffix == ".safetensors" else TorchZipFile)(path, root)


def check_float(infos: Mapping[str, TensorInfo], path: Path) -> None:
    """Refuse integer, boolean and 8-bit tensors, naming the first."""
    for name, info in infos.items():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError.build(
                path,
                f"tensor {name!r} has a dtype that has no exact sum",
                found=info.dtype,
                expected=", ".join(FLOAT_DTYPES),
                do="save the module in a floating dtype",
            )


def read_raw(file: TensorFile, name: str) -> Tensor:
    """One tensor as stored."""
    import torch

    info = file.infos[name]
    dtype = getattr(torch, TORCH_NAMES[info.dtype])
    if not info.nbytes:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(file.read(name), dtype=dtype).reshape(info.shape)


def read_float(file: TensorFile, name: str) -> Tensor:
    """One tensor in float32 (float64 kept), refused by name if a value is not finite."""
    tensor = widen(read_raw(file, name))
    check_finite(tensor, name, file.path)
    return tensor


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of opened files: each is read and widened when it is asked for; none is kept
    but the last two of which several names are parts.

    A tensor is searched for NaN the first time it is read; a file that was written to since it was
    opened is refused.

    Args:
        places: name -> the file and the key in it.
        form: gives the tensor stored under a name its canonical shape.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[TensorFile, str]],
        form: Callable[[str, Tensor], Tensor],
    ) -> None:
        self._places, self._form = places, form
        self._finite: set[tuple[TensorFile, str]] = set()
        uses = Counter(places.values())
        self._shared = frozenset(place for place, n in uses.items() if n > 1)
        self._kept: dict[tuple[TensorFile, str], Tensor] = {}
        self.files = tuple(dict.fromkeys(file for file, _ in places.values()))
        weakref.finalize(self, _close, self.files)

    def __getitem__(self, name: str) -> Tensor:
        place = file, key = self._places[name]
        tensor = self._kept.get(place)
        if tensor is None:
            tensor = widen(read_raw(file, key))
            if place not in self._finite:
                check_finite(tensor, key, file.path)
                self._finite.add(place)
            if place in self._shared:
                self._kept = dict([*self._kept.items()][-1:]) | {place: tensor}
        return self._form(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the files, as the end of this mapping does; a later read opens them again."""
        _close(self.files)


def _close(files: Iterable[TensorFile]) -> None:
    for file in files:
        file.close()


def widen(tensor: Tensor, written: Any = None) -> Tensor:
    """float32, or float64 if it was, or if what is computed from it is written so."""
    import torch

    double = torch.float64 in (tensor.dtype, written)
    return tensor.to(torch.float64 if double else torch.float32)


DIVERGED = "the run that made it diverged; use an earlier checkpoint"


def check_finite(tensor: Tensor, name: str, path: object, do: str = DIVERGED) -> None:
    """Refuse NaN and infinities, naming the tensor and how many, with a remedy."""
    if not all_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise CheckpointError.build(
            path,
            f"tensor {name!r} is not finite",
            found=f"{bad} NaN or infinite of {tensor.numel()} values",
            expected="finite values",
            do=do,
        )


def cast(tensor: Tensor, name: str, dtype: torch.dtype | None, where: object) -> Tensor:
    """Contiguous CPU copy in ``dtype``; a value that overflows to infinity is refused."""
    out = tensor.detach().to("cpu", dtype).contiguous()
    if not all_finite(out):
        check_finite(tensor, name, where, "use smaller coefficients, if it is a sum")
        size = float(tensor.abs().max())
        raise overflow(where, name, out.dtype, f"magnitude {size:.4g}", size)
    return out


def overflow(where: object, name: str, dtype: torch.dtype, found: str, size: float) -> PEMError:
    """The error for a finite value of this size, or a larger one, that the dtype does not hold."""
    return PEMError.build(
        where, f"tensor {name!r} overflows in {dtype}", found=found, expected="finite values",
        do=f"choose --dtype {wider(size)}",
    )  # fmt: skip


def info_of(tensor: Tensor) -> TensorInfo:
    """Header entry of a tensor."""
    names = {v: k for k, v in TORCH_NAMES.items()}
    return TensorInfo(names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def buffer_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, without a copy (valid while the tensor lives)."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous CPU tensors as safetensors."""
    infos = {n: info_of(t) for n, t in tensors.items()}
    write_safetensors(path, infos, lambda name: [buffer_of(tensors[name])], metadata)
