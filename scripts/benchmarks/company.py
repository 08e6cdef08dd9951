"""A training step beside other work: what the waiting of OpenMP's threads costs, as ratios.

Every setting is a process of its own that takes steps in turn with the others: forward and backward
of layers of MiniLM's shape. A round is measured alone and beside one and three processes that do
nothing but count; a ratio is that to torch's default alone, so a column compares settings in one
company.

    python scripts/benchmarks/company.py [--rounds 7] [--batch 16] [--threads 2]

On a machine that has other work the first column is not that of an idle machine: the load average
stands above the table.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pem_composition import threads

BUSY = (0, 1, 3)
OURS = "ours"


def settings(count: int) -> dict[str, dict[str, str]]:
    """Environment of each candidate."""
    own: dict[str, str] = {}
    threads.share_processors(own)
    found = {
        "torch's default": {},
        OURS: own,
        "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (0, 10000, 100000)},
    }
    found = {name: {"OMP_NUM_THREADS": str(count), **given} for name, given in found.items()}
    return found | {"one thread fewer": {"OMP_NUM_THREADS": str(max(1, count - 1))}}


def take_steps(batch: int, length: int) -> None:
    """Answer each line on stdin with the seconds of one step."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
    model = nn.TransformerEncoder(layer, 6)
    rows = torch.randn(batch, length, 384)
    for _ in sys.stdin:
        began = time.perf_counter()
        model(rows).sum().backward()
        print(time.perf_counter() - began, flush=True)


def ask(process: subprocess.Popen[str]) -> float:
    """Seconds of one step of a process."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        take_steps(args.batch, args.length)
        return
    load, candidates = os.getloadavg()[0], settings(args.threads)
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_", "KMP_"))}
    size = ["--batch", str(args.batch), "--length", str(args.length)]
    command = [sys.executable, str(Path(__file__)), "--step", *size]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {n: subprocess.Popen(command, env=plain | e, **pipes) for n, e in candidates.items()}
    seconds: dict[tuple[str, int], list[float]] = {}
    company: list[subprocess.Popen[bytes]] = []
    try:
        for worker in workers.values():
            ask(worker)
        for busy in BUSY:
            while len(company) < busy:
                company.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            for _ in range(args.rounds):
                for name, worker in workers.items():
                    seconds.setdefault((name, busy), []).append(ask(worker))
    finally:
        for process in [*company, *workers.values()]:
            process.kill()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load average {load:.1f} before, "
        f"{args.rounds} rounds\n\n| setting | alone, s | ratio alone | beside 1 | beside 3 |\n"
        "|---|---|---|---|---|"
    )
    base = statistics.median(seconds["torch's default", 0])
    for name in candidates:
        medians = [statistics.median(seconds[name, busy]) for busy in BUSY]
        ratios = " | ".join(f"{m / base:.2f}" for m in medians)
        print(f"| {name} | {medians[0]:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
