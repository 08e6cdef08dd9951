"""Small random modules in memory, and their updates written densely in float64 NumPy."""

from __future__ import annotations

import numpy as np
import torch

from pem_composition.config import FullConfig, IA3Config, LoraConfig
from pem_composition.module import PEM, HeadInfo

LAYERS = ("enc.0.query", "enc.1.query")
OUT, IN = 9, 7  # distinct, so that a transpose cannot go unnoticed


def lora(
    seed: int,
    r: int = 3,
    alpha: float = 6,
    layers: tuple[str, ...] = LAYERS,
    *,
    rslora: bool = False,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, int] = (OUT, IN),
) -> PEM:
    """A LoRA module of rank r with a head of its own."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_A"] = torch.randn(r, size[1], generator=g, dtype=dtype)
        tensors[f"{layer}.lora_B"] = torch.randn(size[0], r, generator=g, dtype=dtype)
    tensors["classifier.weight.head"] = torch.randn(2, 5, generator=g, dtype=dtype)
    config = LoraConfig(r=r, alpha=alpha, target_modules=("query",), use_rslora=rslora)
    return PEM(tensors, config, name=f"m{seed}", head=HeadInfo(labels=("no", "yes")))


def ia3(seed: int, layers: tuple[str, ...] = LAYERS) -> PEM:
    """An (IA)^3 module with vectors around 1."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"{layer}.ia3": 1 + 0.2 * torch.randn(OUT, generator=g, dtype=torch.float64)
        for layer in layers
    }
    return PEM(tensors, IA3Config(target_modules=("query",)), name=f"m{seed}")


def full(seed: int) -> PEM:
    """A difference to a base model: a matrix, a vector and a three-dimensional tensor."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"enc.0.query.weight": (OUT, IN), "enc.0.norm.bias": (OUT,), "conv.weight": (4, 3, 2)}
    tensors = {
        f"{name}.delta": torch.randn(shape, generator=g, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return PEM(tensors, FullConfig(), name=f"m{seed}")


def dense(module: PEM, layer: str) -> np.ndarray:
    """The update dW (d_out, d_in) of a LoRA layer."""
    A, B = (module.tensors[f"{layer}.lora_{side}"].double().numpy() for side in "AB")
    return module.config.scaling(layer) * B @ A


def updates(m: PEM) -> dict[str, np.ndarray]:
    """What the module changes, layer by layer: dW, l - 1 or delta."""
    if m.kind == "lora":
        return {layer: dense(m, layer) for layer in m.layers}
    neutral = 1.0 if m.kind == "ia3" else 0.0
    return {
        n.rpartition(".")[0]: t.double().numpy() - neutral for n, t in m.adapter_tensors().items()
    }


def same_updates(a: PEM, b: PEM, atol: float = 1e-10) -> None:
    """Assert that two modules do the same."""
    x, y = updates(a), updates(b)
    assert x.keys() == y.keys()
    for layer in x:
        np.testing.assert_allclose(x[layer], y[layer], atol=atol, err_msg=layer)


def regauged(m: PEM, seed: int = 0) -> PEM:
    """The same updates from other factors: B G, G^-1 A with a random G."""
    from dataclasses import replace

    g = torch.Generator().manual_seed(seed)
    tensors = dict(m.tensors)
    for layer in m.layers:
        A, B = (m.tensors[f"{layer}.lora_{side}"] for side in "AB")
        G = torch.randn(len(A), len(A), generator=g, dtype=A.dtype)
        tensors[f"{layer}.lora_A"] = torch.linalg.solve(G, A)
        tensors[f"{layer}.lora_B"] = B @ G
    return replace(m, tensors=tensors)
