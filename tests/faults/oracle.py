"""What a module does, read from its PEFT files with NumPy in float64: the judge of results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

Updates = dict[str, np.ndarray]


def updates(folder: Path) -> Updates:
    """Layer -> dW = scaling B A, or l - 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    held = {
        name.removeprefix("base_model.model."): tensor.astype(np.float64)
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    found = {n.removesuffix(".ia3_l"): t.ravel() - 1 for n, t in held.items() if "ia3_l" in n}
    for name, A in held.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            B = held[f"{layer}.lora_B.weight"]
            found[layer] = _scaling(config, layer, A.shape[0]) * B @ A
    return found


def _scaling(config: dict, layer: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    named = [v for k, v in patterns.items() if f".{layer}".endswith(f".{k.strip('^$')}")]
    alpha = named[0] if named else config["lora_alpha"]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def head(folder: Path) -> Updates:
    """Head tensors by name."""
    held = load_file(folder / "adapter_model.safetensors")
    return {n: t for n, t in held.items() if "classifier" in n}


def weighted(*terms: tuple[float, Updates]) -> Updates:
    """sum_i c_i u_i over all layers; a layer that one lacks is zero there."""
    out: Updates = {}
    for c, term in terms:
        for layer, value in term.items():
            out[layer] = out.get(layer, 0.0) + c * value
    return out


def truncated(exact: Updates, rank: int) -> Updates:
    """The best approximation of each layer's rank (Eckart and Young)."""
    out = {}
    for layer, value in exact.items():
        U, S, V = np.linalg.svd(value)
        out[layer] = U[:, :rank] * S[:rank] @ V[:rank]
    return out


def distance(found: Updates, exact: Updates) -> float:
    """Relative Frobenius distance over all layers."""
    assert found.keys() == exact.keys()
    return norm({n: found[n] - exact[n] for n in exact}) / norm(exact)


def norm(value: Updates) -> float:
    """Frobenius norm over all layers."""
    return float(np.sqrt(sum((v**2).sum() for v in value.values())))


def close(found: Updates, exact: Updates) -> None:
    """Equal to the rounding of float32."""
    assert found.keys() == exact.keys()
    assert norm({n: found[n] - exact[n] for n in exact}) <= 1e-6 * norm(exact)
