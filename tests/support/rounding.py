"""How far apart float32 results of one computation may lie.

Two orders of operations, two processors or two libraries round differently. What both compute here
is compared in float64; a recorded float32 result is compared with ``assert_within_rounding``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pem_composition.module import PEM


def assert_within_rounding(recorded: Tensor, found: Tensor, exact: Tensor) -> None:
    """A float32 result of elsewhere is as near to the float64 result as the one of this machine.

    Args:
        recorded: float32, in an order of operations that is not known.
        found: the same in float32, here; its distance from ``exact`` holds the size of the values
            and the length of the sums.
        exact: the same in float64.
    """
    rounding = (found.double() - exact).abs().max()
    one = torch.finfo(torch.float32).eps * exact.abs().max()
    assert rounding < 1000 * one, "this is no rounding"
    torch.testing.assert_close(
        recorded.double(), exact, rtol=0, atol=float(8 * torch.maximum(rounding, one))
    )


def exact_difference(module: PEM, tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> PEM:
    """The module of a whole model in float64, where adding it to the base loses nothing.

    Its own tensors are that difference, rounded to float32.
    """
    tensors = {
        f"{name}.delta": tensor.double() - base[name].double() for name, tensor in tuned.items()
    }
    for name in module.adapter_names:
        torch.testing.assert_close(
            module.tensors[name].double(), tensors[name],
            rtol=torch.finfo(torch.float32).eps, atol=0,
        )  # fmt: skip
    return replace(module, tensors={n: tensors[n] for n in module.adapter_names})


def of_sum(labels: Tensor) -> float:
    """Relative error of a float32 sum of losses, none below 0, one for each label that counts.

    n terms added in any order are off by at most n - 1 roundings; each term has its own.
    """
    return int((labels != -100).sum()) * torch.finfo(torch.float32).eps
