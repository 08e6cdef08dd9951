"""merge.py on two RoBERTa-base-sized LoRA modules, whole process, beside its imports alone.

python scripts/benchmarks/merge_process.py [--runs 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import report, side_by_side

from pem_composition.config import BaseIdentity, LoraConfig
from pem_composition.module import PEM

REPOSITORY = Path(__file__).resolve().parents[2]


def roberta_base_lora(seed: int) -> PEM:
    """12 layers, hidden 768, r = 8 on query and value: 294,912 numbers, as the paper trains."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(12):
        for target in ("query", "value"):
            layer = f"roberta.encoder.layer.{i}.attention.self.{target}"
            tensors[f"{layer}.lora_A"] = torch.randn(8, 768, generator=g)
            tensors[f"{layer}.lora_B"] = torch.randn(768, 8, generator=g)
    config = LoraConfig(r=8, alpha=8, target_modules=("query", "value"))
    return PEM(tensors, config, BaseIdentity(name="roberta-base"))


def saved_pair(folder: str) -> list[str]:
    """Directories of two such modules."""
    dirs = [str(Path(folder, name)) for name in ("a", "b")]
    for seed, path in enumerate(dirs):
        roberta_base_lora(seed).save(path)
    return dirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        dirs = saved_pair(folder)
        merge = [
            sys.executable,
            str(REPOSITORY / "merge.py"),
            "-a",
            *dirs,
            "-p",
            f"{folder}/out",
            "-o",
        ]
        candidates = {
            "import torch, safetensors": [sys.executable, "-c", "import torch, safetensors"],
            "merge.py, parameter space": [*merge, "--coefficients", "0.3", "0.7"],
            "merge.py, delta space": [*merge, "--coefficients", "1", "-0.4", "--space", "delta"],
            "merge.py, delta space, rank 8": [*merge, "--space", "delta", "--rank", "8"],
        }
        calls = {
            name: lambda c=command: subprocess.run(c, check=True, stdout=subprocess.DEVNULL)
            for name, command in candidates.items()
        }
        report(side_by_side(calls, runs), base="import torch, safetensors")


if __name__ == "__main__":
    main()
