"""A second device on the CPU, strict as a GPU: what mixes the two fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "lazy"  # a device that torch knows and does not try to start


class There(Tensor):
    """A tensor on the other device; its numbers are held by a tensor of the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.size(), strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE,
            storage_offset=numbers.storage_offset(),
        )  # fmt: skip
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Lists to tensors and back, which no dispatch mode sees."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device", "cpu")).type == DEVICE:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if function is Tensor.tolist:
            return args[0].cpu().tolist()
        if function is Tensor.__getitem__ and isinstance(args[0], There):
            return function(args[0], _places(args[1]))
        if function is Tensor.__setitem__ and isinstance(args[0], There):
            if isinstance(args[2], Tensor) and args[2].dim() and not isinstance(args[2], There):
                raise RuntimeError("tensors on two devices")
            return function(args[0].numbers, _numbers(_places(args[1])), _numbers(args[2]))
        return function(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """Makes tensors there where the device is asked for, and moves them between the two."""

    def __enter__(self):
        self._lists = _Lists()
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    asked = kwargs.get("device")
    moves = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    here = [t for t in tensors if not isinstance(t, There) and t.dim()]
    if there and here and not moves:
        raise RuntimeError(f"{operation}: tensors on two devices")
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    done = operation(*_numbers(args), **_numbers(kwargs))
    if asked is not None:
        return _wrapped(done) if torch.device(asked).type == DEVICE else done
    if operation is torch.ops.aten.copy_.default:
        return args[0]
    return _wrapped(done) if there else done


def _places(index: Any) -> tuple[Any, ...]:
    """An index whose lists are tensors there, as torch makes them."""
    index = index if isinstance(index, tuple) else (index,)
    return tuple(
        There(torch.tensor(i, dtype=torch.long)) if isinstance(i, list) else i for i in index
    )


def _numbers(tree: Any) -> Any:
    return tree_map(lambda t: t.numbers if isinstance(t, There) else t, tree)


def _wrapped(tree: Any) -> Any:
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, tree)
