"""A 21-point sweep beside its lower bound and beside a process per point.

Bound: as many bare forward passes of the base model over the same batches. The process per point is
the reference's way (process_per_point.py); it is run for a few points and compared point by point.

    python scripts/benchmarks/sweep.py --data_dir GLUE [--model minilm] [--points 21] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from timing import report, side_by_side

from pem_composition import offline, sweep
from pem_composition.adapters import fresh_module, resolve_targets
from pem_composition.config import LoraConfig
from pem_composition.evaluation import classify
from pem_composition.evaluation.models import load_base
from pem_composition.module import PEM
from pem_composition.tasks.data import load_task

HERE = Path(__file__).parent


def random_module(model: torch.nn.Module, seed: int) -> PEM:
    """LoRA r = 8 on query and value with a B that is not zero; numbers do not change the time."""
    targets = resolve_targets(model, "lora")
    config = LoraConfig(r=8, alpha=8, target_modules=targets.target_modules)
    module = fresh_module(model, config, seed=seed)
    g = torch.Generator().manual_seed(seed)
    noise = {n: 0.02 * torch.randn(t.shape, generator=g) for n, t in module.tensors.items()}
    return replace(module, tensors={n: t + noise[n] for n, t in module.tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder of GLUE tasks; RTE's dev is read")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3, help="points run as processes")
    args = parser.parse_args()
    path = str(offline.resolve(args.model))
    data = load_task("rte", data_dir=args.data_dir, splits=("validation",))
    model, tokenizer, _ = load_base(path, data.task)
    modules = [random_module(model, seed) for seed in (0, 1)]
    batches = classify.batches(classify.encode(tokenizer, data.validation, max_seq_length=128))
    points = [i / (args.points - 1) for i in range(args.points)]

    def bare() -> None:
        for _ in points:
            classify.predict(model, batches)

    def in_one_process(space: str) -> None:
        """From modules and text rows to a score per point, tokenising included."""
        rows = sweep.Rows(data.task, data.validation, 128, 32)
        settings = sweep.Settings(base=path, task="rte", max_seq_length=128, head="average")
        inputs = [sweep.Input(f"m{i}", m, str(i)) for i, m in enumerate(modules)]
        with tempfile.TemporaryDirectory() as folder:
            ledger = sweep.Ledger(Path(folder, "results.jsonl"))
            bench = sweep.Bench(
                lambda: (model, tokenizer),
                {sweep.VALIDATION: rows},
                settings,
                ledger,
                lambda _: None,
            )
            for t in points:
                bench.score(sweep.point(inputs, (t, 1 - t), space, "average"), sweep.VALIDATION)
            bench.close()

    name = f"{args.points} bare forward passes"
    seconds = side_by_side(
        {
            name: bare,
            "sweep, parameter space": lambda: in_one_process("parameter"),
            "sweep, delta space": lambda: in_one_process("delta"),
        },
        args.runs,
    )
    report(seconds, base=name)
    point = statistics.median(seconds["sweep, parameter space"]) / args.points
    alone = processes(path, modules, data.validation, points[: args.processes])
    print(f"\nper point: {point:.2f} s in one process, {alone:.2f} s as processes of its own")
    print(f"ratio {alone / point:.1f} (median of {args.processes} points)")


def processes(path: str, modules: list[PEM], examples: list, points: list[float]) -> float:
    """Median seconds of a point in processes of its own."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        dirs = [str(Path(folder, n)) for n in "ab"]
        for module, where in zip(modules, dirs, strict=True):
            module.save(where)
        rows = Path(folder, "dev.jsonl")
        with rows.open("w") as f:
            for e in examples:
                row = {"sentence1": e.text, "sentence2": e.text_pair, "label": e.label}
                f.write(json.dumps(row) + "\n")
        run = [sys.executable, str(HERE / "process_per_point.py")]
        for t in points:
            start = time.perf_counter()
            out = str(Path(folder, "out"))
            for stage in (["merge", path, *dirs, out, str(t)], ["evaluate", path, out, str(rows)]):
                subprocess.run([*run, *stage], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
