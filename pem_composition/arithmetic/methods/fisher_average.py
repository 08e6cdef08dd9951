"""Fisher merging: a weighted average of parameters, each by how much its module's answers need it.

    t = sum_i c_i F_i t_i / sum_i c_i F_i        element by element

F_i is the diagonal of module i's Fisher information on its own task. Source: Matena and Raffel
2022 (arXiv:2111.09832).

It acts on the modules' own tensors. For LoRA these are the factors: A and B of one update can be
written in many ways (A -> Q A, B -> B Q^-1), and F and the result turn with them, so modules should
share their initial A. A form on the update dW itself would need a Fisher matrix of the size of the
layer, and its quotient has no low rank; it is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pem_composition.errors import PEMError


def fisher(
    tensors: Sequence[Mapping[str, Tensor]],
    fishers: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    *,
    floor: float,
    normalize: str,
) -> dict[str, Tensor]:
    """The average of tensors of the same names and shapes, in float64.

    Args:
        fishers: name -> F_i, of the same shape.
        shares: c_i >= 0.
        floor: an entry of F_i counts at least as this share of the mean of F_i, so that no
            entry is left without a weight and entries that no module needs are averaged.
        normalize: none, or norm: c_i / norm(F_i), the norm over all its tensors.

    Raises:
        PEMError: a Fisher without an entry for a tensor, or one that is zero everywhere.
    """
    total: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}
    for place, (own, diagonal, share) in enumerate(zip(tensors, fishers, shares, strict=True)):
        floored = _floored(own, diagonal, floor, place)
        if normalize == "norm":
            share = share / sum(float(f.square().sum()) for f in floored.values()) ** 0.5
        for name, tensor in own.items():
            w = share * floored[name]
            total[name] = total.get(name, 0.0) + w * tensor.double()
            weight[name] = weight.get(name, 0.0) + w
    return {name: total[name] / weight[name] for name in total}


def _floored(
    own: Mapping[str, Tensor], diagonal: Mapping[str, Tensor], floor: float, place: int
) -> dict[str, Tensor]:
    for name, tensor in own.items():
        if name not in diagonal or diagonal[name].shape != tensor.shape:
            raise PEMError.build(
                f"Fisher of module {place}",
                f"has no entry for tensor {name!r}",
                found=f"{len(diagonal)} tensors",
                expected=f"shape {tuple(tensor.shape)}",
                do="compute it again with pem fisher",
            )
    wide = {name: diagonal[name].double() for name in own}
    count = sum(f.numel() for f in wide.values())
    mean = sum(float(f.sum()) for f in wide.values()) / count
    if not mean > 0:
        raise PEMError.build(
            f"Fisher of module {place}", "is zero everywhere: its answers depend on none of it"
        )
    least = floor * mean
    return {name: torch.clamp(f, min=least) for name, f in wide.items()}
