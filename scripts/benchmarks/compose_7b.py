"""merge.py on two 7B-shaped LoRA modules beside a process that only reads and writes as much.

Modules: 32 layers, q, k, v and o of 4096 x 4096, r = 16, float32 (what PEFT saves after training;
--dtype bfloat16 for the other usual form: then the result is bfloat16, too). Every candidate is a
whole process. The bound reads both modules with safetensors, writes as many bytes as the output
has with safetensors and fsyncs them, as merge.py does. PEFT's add_weighted_adapter works on a base
model of the same shape without weights (meta device). Peak is the process's largest resident set.

    python scripts/benchmarks/compose_7b.py [--layers 32] [--runs 7] [--dtype bfloat16] [--no_peft]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from timing import report, side_by_side

REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTH, RANK = 4096, 16
MB = 1 << 20
# Bytecode is kept, as of an installed package; PEFT looks for the base's files on no network.
USUAL = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
    "HF_HUB_OFFLINE": "1"
}

# Programs of their own, so that this process stays small: a child's peak starts at its parent's.
MAKE = f"""
import sys
import torch
from pem_composition.config import BaseIdentity, LoraConfig
from pem_composition.module import PEM
out, seed, layers, dtype = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
g = torch.Generator().manual_seed(seed)
tensors = {{}}
for i in range(layers):
    for target in {TARGETS}:
        layer = f"model.layers.{{i}}.self_attn.{{target}}"
        tensors[f"{{layer}}.lora_A"] = torch.randn({RANK}, {WIDTH}, generator=g) / 64
        tensors[f"{{layer}}.lora_B"] = torch.randn({WIDTH}, {RANK}, generator=g) / 100
config = LoraConfig(r={RANK}, alpha=32, target_modules={TARGETS})
PEM(tensors, config, BaseIdentity(name="huggyllama/llama-7b")).save(out, dtype=dtype)
"""
BOUND = """
import os, sys
from safetensors.torch import load_file, save_file
a, b, out, modules, sync = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
read = [load_file(f"{path}/adapter_model.safetensors") for path in (a, b)]
save_file({f"{i}.{k}": v for i, m in enumerate(read[:modules]) for k, v in m.items()}, out)
if sync:
    with open(out, "rb") as file:
        os.fsync(file.fileno())
"""
PEFT = f"""
import sys
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
a, b, out, kind, layers = *sys.argv[1:5], int(sys.argv[5])
with torch.device("meta"):
    base = LlamaForCausalLM(LlamaConfig(hidden_size={WIDTH}, num_hidden_layers=layers))
base.to_empty(device="cpu")
model = PeftModel.from_pretrained(base, a, adapter_name="a", low_cpu_mem_usage=True)
model.load_adapter(b, "b", low_cpu_mem_usage=True)
model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", combination_type=kind)
model.save_pretrained(out, selected_adapters=["merged"])
"""


class Processes:
    """Runs commands and remembers the largest peak of each, in MB."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def run(self, name: str, command: Sequence[str]) -> None:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY, env=USUAL
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{name}: exit code {child.returncode}")
        self.peaks[name] = max(self.peaks.get(name, 0.0), usage.ru_maxrss * 1024 / MB)


def compare(title: str, candidates: Mapping[str, Sequence[str]], runs: int, inputs: float) -> None:
    """Times to the first candidate, the bound, and peaks to that of the import, the second."""
    processes = Processes()
    calls = {n: lambda n=n, c=c: processes.run(n, c) for n, c in candidates.items()}
    print(f"\n{title}\n")
    bound, imported = list(candidates)[:2]
    report(side_by_side(calls, runs), base=bound)
    print("\n| candidate | peak MB | / inputs | above the import, / inputs |\n|---|---|---|---|")
    for name, peak in processes.peaks.items():
        above = peak - processes.peaks[imported]
        print(f"| {name} | {peak:.0f} | {peak / inputs:.2f} | {above / inputs:.2f} |")


def peft_can(command: Sequence[str]) -> bool:
    """Run PEFT once; where it fails say why."""
    done = subprocess.run(command, capture_output=True, text=True, env=USUAL)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        print(f"\nPEFT cannot: {last[0] if last else done.returncode}")
    return not done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no_peft", action="store_true")
    parser.add_argument("--dir", help="where to write (default: the temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        a, b, out = (f"{folder}/{name}" for name in ("a", "b", "out"))
        for seed, path in enumerate((a, b)):
            make = [sys.executable, "-c", MAKE, path, str(seed), str(args.layers), args.dtype]
            subprocess.run(make, check=True, cwd=REPOSITORY)
        sizes = [Path(path, "adapter_model.safetensors").stat().st_size / MB for path in (a, b)]
        print(f"{args.layers} layers, {args.dtype}, inputs {sizes[0]:.1f} + {sizes[1]:.1f} MB")
        merge = [sys.executable, "merge.py", "-a", a, b, "-p", out, "-o", "--dtype", args.dtype,
                 "--coefficients", "0.5", "0.5"]  # fmt: skip
        tables = {
            "delta space": (2, "cat", {"exact sum, rank 32": ["--space", "delta"]}),
            "output of one module's size": (
                1,
                "linear",
                {
                    "parameter space": [],
                    "delta space, rank 16": ["--space", "delta", "--rank", "16"],
                },
            ),
        }
        for title, (modules, kind, ours) in tables.items():
            copy = [sys.executable, "-c", BOUND, a, b, f"{folder}/copy", str(modules)]
            candidates = {
                "read, write, fsync": [*copy, "1"],
                "import torch, safetensors": [sys.executable, "-c", "import safetensors.torch"],
                "read, write": [*copy, "0"],
                **{f"merge.py, {name}": [*merge, *flags] for name, flags in ours.items()},
            }
            peft = [sys.executable, "-c", PEFT, a, b, f"{folder}/peft", kind, str(args.layers)]
            if not args.no_peft and peft_can(peft):
                candidates[f"PEFT, {kind}, with its imports"] = peft
            compare(title, candidates, args.runs, sum(sizes))
            shutil.rmtree(f"{folder}/peft", ignore_errors=True)


if __name__ == "__main__":
    main()
