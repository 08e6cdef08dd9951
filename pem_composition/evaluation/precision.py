"""Evaluation in bfloat16: what every matrix product of a model multiplies is rounded once.

``torch.autocast`` rounds a float32 weight each time it is used, which for a model that is asked
many times (batches, and above all tokens) costs as much as the products. Here the weights of linear
layers are rounded once, when the context is entered; what is computed is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pem_composition.adapters.layer import is_linear


@contextmanager
def reduced(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within, the model computes in bfloat16, without gradients; then it has its own weights again.

    Tied weights stay as they are in layers that are not linear, such as an embedding. Costs two
    bytes per number of the linear layers for as long as the context lasts.
    """
    if not enabled:
        yield
        return
    device = next(model.parameters()).device.type
    kept = [(layer, layer.weight) for layer in model.modules() if _rounds(layer)]
    try:
        for layer, weight in kept:
            layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        with torch.autocast(device, torch.bfloat16):
            yield
    finally:
        for layer, weight in kept:
            layer.weight = weight


def _rounds(layer: nn.Module) -> bool:
    """True for a layer whose weight autocast rounds at every use, and nobody else looks at."""
    weight = getattr(layer, "weight", None)
    # out_proj of nn.MultiheadAttention is a linear layer whose weight is handed to a fused kernel.
    owned = not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (
        is_linear(layer)
        and owned
        and isinstance(weight, nn.Parameter)
        and weight.dtype == torch.float32
    )
