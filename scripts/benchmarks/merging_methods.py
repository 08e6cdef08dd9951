"""KnOTS and TSV on 8 LoRA modules of 4096 x 4096 layers, from factors, beside the dense rules.

Ours: pem.combine(modules, [1, ...], method="knots" or "tsv"), r = 16, in a process of its own for
its peak memory. Dense, the published rules in float64 on one layer:

    KnOTS  [dW_1 ... dW_T] = U S [V_1^T ... V_T^T];  U ties(S V_1^T, ..., S V_T^T)
    TSV-M  dW_t = U_t S_t V_t^T, r_t triples each;   P diag(S_1 ... S_T) Q^T

of U and V side by side orthogonalised (P, Q). KnOTS takes the SVD of a 4096 x (8 x 4096) matrix
through the eigenvectors of its 4096 x 4096 Gram matrix: a direct SVD only takes longer. The
difference is that of the two results, relative, in the Frobenius norm.

    python scripts/benchmarks/merging_methods.py [--layers 4] [--runs 5] [--modules 8] [--no_dense]
                                                 [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import pem_composition as pem
from pem_composition.config import BaseIdentity, LoraConfig

RANK, DENSITY, MB = 16, 0.2, 1 << 20
SETTINGS = {"knots": {"inner": "ties", "density": DENSITY}, "tsv": {}}


def modules_of(args: argparse.Namespace) -> list[pem.PEM]:
    """Modules that share part of their update, as those of one base and related tasks do."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / args.width**0.5

    shapes = {"lora_A": (RANK, args.width), "lora_B": (args.width, RANK)}
    shared = {(i, s): draw(*shapes[s]) for i in range(args.layers) for s in shapes}
    config = LoraConfig(r=RANK, alpha=RANK, target_modules=tuple(map(str, range(args.layers))))
    return [
        pem.PEM(
            {f"layers.{i}.{s}": 0.5 * t + draw(*shapes[s]) for (i, s), t in shared.items()},
            config, BaseIdentity(), name=f"m{k}",
        )
        for k in range(args.modules)
    ]  # fmt: skip


def ours(modules: list[pem.PEM], method: str, device: str) -> pem.PEM:
    """The library's merge."""
    ones = [1.0] * len(modules)
    return pem.combine(modules, ones, method=method, settings=SETTINGS[method], device=device)


def measure(args: argparse.Namespace) -> None:
    """Seconds per layer and what the merge adds to the peak; a process runs this for one method."""
    modules = modules_of(args)
    before = peak_kb()
    seconds = []
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        ours(modules, args.measure, args.device)
        seconds.append((time.perf_counter() - start) / args.layers)
    peak = peak_kb()
    print(json.dumps([seconds[1:], (peak - before) * 1024 / MB, peak * 1024 / MB]))


def peak_kb() -> int:
    """Largest resident set so far (getrusage would count this process's parent, too)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0])


def updates(modules: list[pem.PEM]) -> list[torch.Tensor]:
    """The dense dW_t of layer 0."""
    return [
        m.tensors["layers.0.lora_B"].double() @ m.tensors["layers.0.lora_A"].double()
        for m in modules
    ]


def ties(stacked: torch.Tensor) -> torch.Tensor:
    """Trim each to its largest entries, elect a sign per entry, average what agrees."""
    kept = int(DENSITY * stacked[0].numel())
    trimmed = torch.zeros_like(stacked)
    for full, out in zip(stacked.flatten(1), trimmed.flatten(1), strict=True):
        at = full.abs().topk(kept, sorted=False).indices
        out[at] = full[at]
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def dense_knots(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Directions without an update, rounding alone, are left out: the rank is at most T r."""
    gram = sum(d @ d.mT for d in deltas)
    _, vectors = torch.linalg.eigh(gram)
    U = vectors[:, -RANK * len(deltas) :].flip(1)
    return U @ ties(torch.stack([U.mT @ d for d in deltas]))


def dense_tsv(deltas: list[torch.Tensor]) -> torch.Tensor:
    """A dense SVD per module, then orthogonal Procrustes of the vectors side by side."""
    triples = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    U = torch.cat([u[:, :RANK] for u, _, _ in triples], dim=1)
    V = torch.cat([vh[:RANK].mT for _, _, vh in triples], dim=1)
    S = torch.cat([s[:RANK] for _, s, _ in triples])

    def nearest(X: torch.Tensor) -> torch.Tensor:
        P, _, Qh = torch.linalg.svd(X, full_matrices=False)
        return P @ Qh

    return (nearest(U) * S) @ nearest(V).mT


DENSE = {"knots": dense_knots, "tsv": dense_tsv}


def difference(merged: pem.PEM, exact: torch.Tensor) -> float:
    """Of layer 0, relative, in the Frobenius norm."""
    A, B = (merged.tensors[f"layers.0.lora_{side}"].double() for side in "AB")
    written = merged.config.scaling("layers.0") * (B @ A)
    return float((written - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--modules", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--no_dense", action="store_true")
    parser.add_argument("--device", default="cpu", help="of ours; the dense rules stay on the CPU")
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    print(f"{args.modules} modules of {args.layers} layers, {torch.get_num_threads()} threads\n")
    print("| method | ours, s per layer (median, min-max) | peak MB, of it by the merge | "
          "dense s | ratio | difference |\n|---|---|---|---|---|---|")  # fmt: skip
    for method in SETTINGS:
        child = subprocess.run(
            [sys.executable, *sys.argv, "--measure", method],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        seconds, added, peak = json.loads(child.stdout)
        middle = statistics.median(seconds)
        spread = f"({min(seconds):.3f}-{max(seconds):.3f})"
        row = f"| {method} | {middle:.3f} {spread} | {peak:.0f}, {added:.0f} "
        if args.no_dense:
            print(f"{row}| | | |")
            continue
        args.layers = 1
        modules = modules_of(args)
        deltas = updates(modules)
        start = time.perf_counter()
        exact = DENSE[method](deltas)
        slow = time.perf_counter() - start
        distance = difference(ours(modules, method, args.device), exact)
        print(f"{row}| {slow:.1f} | {slow / middle:.0f} | {distance:.1e} |", flush=True)


if __name__ == "__main__":
    main()
