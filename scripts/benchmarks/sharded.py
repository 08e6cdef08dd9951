"""Memory of each process and seconds of a step with pem train --fsdp, by the number of processes.

Each number of processes is a launch of its own; a process reports its private memory above that
after the imports: the peak while reading the base, what it holds then, the peak of the steps
(forward, backward and AdamW on random tokens), and the peaks of writing a checkpoint and the
result. Weights in the file's own dtype stay in it, mapped, and are not counted. On a GPU the
numbers are those of its memory.

    python scripts/benchmarks/sharded.py [--model smollm2-135m-instruct] [--adapter_config lora|fft]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MB = 2**20
HONEST = {
    "MALLOC_MMAP_THRESHOLD_": "1000000"
}  # what is freed goes back at once, and is not counted


class Peak:
    """Private memory of this process, looked at every few milliseconds; bytes."""

    def __init__(self) -> None:
        self.highest = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.highest = max(self.highest, self.now())
            time.sleep(0.002)

    def now(self) -> int:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(args: argparse.Namespace) -> None:
    """One process of a launch; writes what it saw into a folder."""
    import torch

    from pem_composition import launch
    from pem_composition.record import Provenance
    from pem_composition.training import shards
    from pem_composition.training.preparation import prepare
    from pem_composition.training.training_flags import TrainConfig

    peak, world = Peak(), launch.world_size()
    before = peak.now()
    config = TrainConfig(
        model_name_or_path=args.model, output_dir="unused", objective="causal_lm",
        train_file="unused", adapter_config=args.adapter_config, model_dtype=args.dtype,
        fsdp=world > 1,
    )  # fmt: skip
    start = prepare(config, None)
    model, weights = start.model, start.weights
    loading, held = peak.highest - before, peak.now() - before
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(5, 1000, (args.batch, args.length), device=next(model.parameters()).device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    peak.highest, seconds = 0, []
    for _ in range(args.steps):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    step, peak.highest, out = peak.highest - before, 0, Path(args.measure) / "written"
    out.mkdir(exist_ok=True)
    if launch.is_main() or weights.in_parts:
        weights.write(out / "checkpoint")
    if weights.in_parts:
        shards.write_optimizer(model, optimizer, out / "checkpoint")
    saving, peak.highest = peak.highest - before, 0
    if launch.is_main():
        (out / "result").mkdir()
        weights.publish(out / "result", "result", Provenance())
    else:
        weights.lend()
    found = {
        "base": base, "loading": loading, "held": held, "step": step, "saving": saving,
        "publishing": peak.highest - before, "seconds": sorted(seconds)[len(seconds) // 2],
    }  # fmt: skip
    (Path(args.measure) / f"{launch.rank()}.json").write_text(json.dumps(found))
    launch.leave_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter_config", default="lora")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    print("| processes | base | reading | held | steps | checkpoint | result, MB | step, s |")
    print("|---|---|---|---|---|---|---|---|")
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
            own = [str(Path(__file__)), *sys.argv[1:], "--measure", folder]
            subprocess.run([sys.executable, *torchrun, *own], check=True, env=os.environ | HONEST)
            found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
        most = {name: max(f[name] for f in found) for name in found[0]}
        names = ("base", "loading", "held", "step", "saving", "publishing")
        sizes = " | ".join(f"{most[n] / MB:.0f}" for n in names)
        print(f"| {count} | {sizes} | {most['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
