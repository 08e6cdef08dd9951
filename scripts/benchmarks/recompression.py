"""Two rank-16 modules reduced to rank 16 on 4096 x 4096 layers, beside PEFT's combination by svd.

Ours: pem.combine([a, b], [1, 0.5], space="delta", rank=16), without its certificate and with it.
PEFT: add_weighted_adapter(combination_type="svd") on the same tensors, which multiplies dW out and
takes its dense SVD. Each line is the seconds per layer; PEFT runs on --peft_layers of them. Both
results' singular values are compared with each other and, on one layer, with a dense float64 SVD.

    python scripts/benchmarks/recompression.py [--layers 16] [--peft_layers 1] [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

import pem_composition as pem
from pem_composition.config import BaseIdentity, LoraConfig

WIDTH, RANK = 4096, 16
COEFFICIENTS = (1.0, 0.5)


def module(seed: int, layers: int) -> pem.PEM:
    """A LoRA module with factors of the size that training gives them."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        tensors[f"layers.{i}.lora_A"] = torch.randn(RANK, WIDTH, generator=g) / WIDTH**0.5
        tensors[f"layers.{i}.lora_B"] = torch.randn(WIDTH, RANK, generator=g) / 100
    config = LoraConfig(r=RANK, alpha=RANK, target_modules=tuple(map(str, range(layers))))
    return pem.PEM(tensors, config, BaseIdentity(), name=f"m{seed}")


def peft_model(modules: list[pem.PEM], layers: int) -> torch.nn.Module:
    """Linear layers with both modules attached by PEFT."""
    base = torch.nn.Module()
    base.layers = torch.nn.ModuleList(
        torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)
    )
    config = PeftConfig(r=RANK, lora_alpha=RANK, target_modules=[str(i) for i in range(layers)])
    model = get_peft_model(base, config, adapter_name="m0")
    model.add_adapter("m1", config)
    with torch.no_grad():
        for m in modules:
            for i in range(layers):
                for side in "AB":
                    parameter = getattr(model.base_model.model.layers[i], f"lora_{side}")[m.name]
                    parameter.weight.copy_(m.tensors[f"layers.{i}.lora_{side}"])
    return model


def per_layer(call: Callable[[], object], layers: int, runs: int) -> list[float]:
    """Seconds per layer of each run, after one of warm-up where there are several."""
    seconds = []
    for _ in range(runs + (runs > 1)):
        start = time.perf_counter()
        call()
        seconds.append((time.perf_counter() - start) / layers)
    return seconds[-runs:]


def singular_values(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Of B A, in float64, through the QR of its factors."""
    R_B, R_A = (torch.linalg.qr(x.double(), mode="r").R for x in (B, A.mT))
    return torch.linalg.svdvals(R_B @ R_A.mT)


def values_of(merged: pem.PEM, i: int) -> torch.Tensor:
    """Singular values of layer i's update."""
    layer = f"layers.{i}"
    A, B = (merged.tensors[f"{layer}.lora_{side}"] for side in "AB")
    return merged.config.scaling(layer) * singular_values(A, B)


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative difference."""
    return float(((found - expected) / expected).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--peft_layers", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="of ours; PEFT runs once per layer")
    parser.add_argument("--no_dense", action="store_true", help="leave out the float64 dense SVD")
    args = parser.parse_args()
    modules = [module(seed, max(args.layers, args.peft_layers)) for seed in (0, 1)]

    def ours(certify: bool) -> pem.PEM:
        return pem.combine(modules, COEFFICIENTS, space="delta", rank=RANK, certify=certify)

    layers = len(modules[0].layers)
    seconds = {
        "pem.combine": per_layer(lambda: ours(False), layers, args.runs),
        "pem.combine, certified": per_layer(lambda: ours(True), layers, args.runs),
    }
    model = peft_model(modules, args.peft_layers)
    arguments = (["m0", "m1"], list(COEFFICIENTS), "merged", "svd")
    call = lambda: model.base_model.add_weighted_adapter(*arguments)  # noqa: E731
    seconds["PEFT, svd"] = per_layer(call, args.peft_layers, 1)

    print(f"{torch.get_num_threads()} threads, {args.runs} runs over {layers} layers\n")
    print("| candidate | s per layer (median) | min | max | PEFT / it |\n|---|---|---|---|---|")
    slow = statistics.median(seconds["PEFT, svd"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"| {name} | {middle:.5f} | {min(values):.5f} | {max(values):.5f} "
            f"| {slow / middle:.0f} |"
        )
    report_values(ours(False), model, modules, args)


def report_values(
    merged: pem.PEM, model: torch.nn.Module, modules: list[pem.PEM], args: argparse.Namespace
) -> None:
    """Largest relative deviations of singular values."""
    print()
    for i in range(args.peft_layers):
        layer = model.base_model.model.layers[i]
        theirs = singular_values(layer.lora_A["merged"].weight, layer.lora_B["merged"].weight)
        theirs = theirs * layer.scaling["merged"]
        own = values_of(merged, i)
        print(f"layer {i}: singular values, ours against PEFT's: {deviation(own, theirs):.1e}")
    if args.no_dense:
        return
    dW = sum(
        c * m.tensors["layers.0.lora_B"].double() @ m.tensors["layers.0.lora_A"].double()
        for c, m in zip(COEFFICIENTS, modules, strict=True)
    )
    exact = torch.linalg.svdvals(dW)[:RANK]
    print(
        f"layer 0: ours against a dense float64 SVD: {deviation(values_of(merged, 0), exact):.1e}"
    )


if __name__ == "__main__":
    main()
