"""Task arithmetic on whole sharded checkpoints, streamed, beside copying the same bytes.

python scripts/benchmarks/full_stream.py [--gigabytes 6] [--runs 5] [--folder DIR] [--mergekit]

Three bfloat16 checkpoints (a base and two models tuned from it) of --gigabytes in all, in shards.
Every candidate is a process of its own, imports included, so that its peak resident memory is its
own: (a) read all three through safetensors and write one of them, flushed to disk as (b) does;
(a') the same, not flushed; (b) pem merge --full_merge around the base; (c) with --mergekit,
mergekit's task_arithmetic, in an environment that is made for it. Before each, what others left to
be written goes to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from timing import report, side_by_side

REPOSITORY = Path(__file__).resolve().parents[2]
HIDDEN, FORWARD, VOCABULARY, HEADS = 2048, 5632, 32000, 16  # TinyLlama's proportions
SHARD = "500MB"
NAMES = ("base", "a", "b")

MAKE = """
import sys, torch, transformers
from pathlib import Path
folder, layers, hidden, forward, vocabulary, heads, shard = sys.argv[1:]
sizes = dict(hidden_size=int(hidden), intermediate_size=int(forward), vocab_size=int(vocabulary))
config = transformers.LlamaConfig(
    **sizes, num_hidden_layers=int(layers), num_attention_heads=int(heads), dtype="bfloat16"
)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = transformers.LlamaForCausalLM(config)
for name in ("base", "a", "b"):
    with torch.no_grad():
        for parameter in model.parameters() if name != "base" else ():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(Path(folder, name), max_shard_size=shard)
"""

COPY = """
import os, sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
folder, flush = Path(sys.argv[1]), sys.argv[2] == "True"
out = folder / "copy"
out.mkdir(exist_ok=True)
for name in ("base", "a", "b"):
    for shard in sorted((folder / name).glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        if name == "b":
            save_file(tensors, out / shard.name, metadata={"format": "pt"})
            if flush:
                handle = os.open(out / shard.name, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the three inputs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoints are made; removed at the end")
    parser.add_argument("--mergekit", action="store_true", help="install mergekit and time it, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full-stream-", dir=options.folder) as temporary:
        folder = Path(temporary)
        make(folder, options.gigabytes)
        size = sum(f.stat().st_size for n in NAMES for f in (folder / n).glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB read, {size / 3e9:.2f} GB written\n")
        commands = {
            "copy": [sys.executable, "-c", COPY, str(folder), "True"],
            "copy, not flushed": [sys.executable, "-c", COPY, str(folder), "False"],
            "pem merge --full_merge": merge(folder),
        }
        if options.mergekit:
            commands |= mergekit(folder)
        used: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        calls = {
            name: lambda name=name: used[name].append(run(commands[name], folder))
            for name in commands
        }
        seconds = side_by_side(calls, options.runs, before=os.sync)
        report(seconds, base="copy")
        print_use(used)
        print_throughput(seconds, size * 4 / 3)


def make(folder: Path, gigabytes: float) -> None:
    """The three checkpoints, as many layers as the size asks for."""
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * FORWARD)
    layers = max(1, round((gigabytes * 1e9 / 3 - 4 * HIDDEN * VOCABULARY) / layer))
    free = shutil.disk_usage(folder).free
    needed = 3 * gigabytes * 1e9
    if free < needed:
        raise SystemExit(f"{folder}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")
    sizes = [layers, HIDDEN, FORWARD, VOCABULARY, HEADS]
    subprocess.run(
        [sys.executable, "-c", MAKE, str(folder), *map(str, sizes), SHARD],
        check=True, capture_output=True,
    )  # fmt: skip


def merge(folder: Path) -> list[str]:
    """theta_0 + 0.4 (theta_a - theta_0) + 0.4 (theta_b - theta_0)."""
    return [
        sys.executable, "-m", "pem_composition", "merge", "--full_merge", "-a", str(folder / "a"),
        str(folder / "b"), "-m", str(folder / "base"), "--coefficients", "0.4", "0.4",
        "--dtype", "bfloat16", "-p", str(folder / "ours"), "-o",
    ]  # fmt: skip


def mergekit(folder: Path) -> Mapping[str, list[str]]:
    """mergekit's command in an environment of its own; empty, with a line, where pip cannot."""
    home = folder / "mergekit-environment"
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "mergekit"], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"mergekit is left out: pip could not install it ({reason})\n")
        return {}
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(folder / "base"), "dtype": "bfloat16",
        "models": [
            {"model": str(folder / name), "parameters": {"weight": 0.4}} for name in ("a", "b")
        ],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    out = str(folder / "mergekit")
    return {"mergekit": [str(home / "bin" / "mergekit-yaml"), str(folder / "recipe.yaml"), out]}


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a process; its peak resident memory in GB and its processor seconds."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}: {told}")
    return usage.ru_maxrss / 1e6, usage.ru_utime + usage.ru_stime


def print_use(used: Mapping[str, list[tuple[float, float]]]) -> None:
    print("\n| candidate | peak resident GB (largest of the rounds) | processor s (median) |")
    print("|---|---|---|")
    for name, values in used.items():
        peak, processor = max(v[0] for v in values), statistics.median(v[1] for v in values)
        print(f"| {name} | {peak:.2f} | {processor:.1f} |")


def print_throughput(seconds: Mapping[str, list[float]], size: float) -> None:
    """GB/s, and the median over the rounds of the share of the copy's."""
    print("\n| candidate | GB/s | of the copy's | of the copy's, not flushed |")
    print("|---|---|---|---|")
    for name, values in seconds.items():
        shares = [
            statistics.median(y / x for x, y in zip(values, seconds[base], strict=True))
            for base in ("copy", "copy, not flushed")
        ]
        print(
            f"| {name} | {size / 1e9 / statistics.median(values):.2f} "
            f"| {shares[0]:.0%} | {shares[1]:.0%} |"
        )


if __name__ == "__main__":
    main()
