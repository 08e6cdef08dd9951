"""A 21-point sweep beside its lower bound and, for an encoder, beside a process per point.

Bound: as many bare forward passes of the base model over the same batches; of a text-to-text model
the encoder and the decoder's first step. The process per point is the reference's way
(process_per_point.py); it is run for a few points and compared point by point.

    python scripts/benchmarks/sweep.py --data_dir GLUE [--model minilm] [--points 21] [--runs 3]
    python scripts/benchmarks/sweep.py --data_dir GLUE --model flan-t5-small --tasks rte sst2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import report, side_by_side

from pem_composition import offline
from pem_composition.adapters import fresh_module, resolve_targets
from pem_composition.config import LoraConfig
from pem_composition.evaluation.attached import bfloat16_note
from pem_composition.evaluation.models import load_base, load_seq2seq
from pem_composition.evaluation.precision import reduced
from pem_composition.module import PEM
from pem_composition.objectives.answers import Answers
from pem_composition.objectives.classification import Classification
from pem_composition.sweep.points import Input, Settings, point
from pem_composition.sweep.result_store import ResultStore
from pem_composition.sweep.rows import Rows
from pem_composition.sweep.runner import Runner
from pem_composition.tasks.data import VALIDATION, RowFiles, TaskData, load_task

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
    parser.add_argument("--data_dir", required=True, help="folder of GLUE tasks; dev is read")
    parser.add_argument("--model", default="minilm", help="an encoder, or a text-to-text model")
    parser.add_argument("--tasks", nargs="+", default=["rte"])
    parser.add_argument("--rows", type=int, help="at most so many rows per task")
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3, help="points run as processes")
    args = parser.parse_args()
    case = Case(args)
    name = f"{args.points} bare forward passes"
    candidates: dict[str, Callable[[], object]] = {
        name: lambda: case.bare(bf16=False),
        "sweep, parameter space": lambda: case.sweep("parameter"),
        "sweep, delta space": lambda: case.sweep("delta"),
    }
    has_bfloat16 = bfloat16_note("cpu") is None
    if has_bfloat16:
        candidates[f"{name}, bfloat16"] = lambda: case.bare(bf16=True)
        candidates["sweep, parameter space, bfloat16"] = lambda: case.sweep("parameter", bf16=True)
    seconds = side_by_side(candidates, args.runs)
    report(seconds, base=name)
    medians = {k: statistics.median(v) / args.points for k, v in seconds.items()}
    ours = {"float32": medians["sweep, parameter space"]}
    if has_bfloat16:
        ours["bfloat16"] = medians["sweep, parameter space, bfloat16"]
        print(f"\nbfloat16: to its own bound {ours['bfloat16'] / medians[f'{name}, bfloat16']:.3f}")
        pairs = zip(case.sweep("parameter"), case.sweep("parameter", bf16=True), strict=True)
        change = max(abs(a - b) for a, b in pairs)
        print(f"largest change of a score by bfloat16: {change:.4f}")
    if not case.seq2seq and args.processes:
        alone = processes(case, args.processes)
        print(f"a point as processes of its own: {alone:.2f} s (median of {args.processes})")
        for precision, point in ours.items():
            print(f"in one process, {precision}: {point:.2f} s, ratio {alone / point:.1f}")


class Case:
    """Model, rows and modules."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = str(offline.resolve(args.model))
        self.data: list[TaskData] = [
            load_task(
                task,
                RowFiles(
                    data_dir=args.data_dir, splits=("validation",), max_eval_samples=args.rows
                ),
            )
            for task in args.tasks
        ]
        config = json.loads(Path(self.path, "config.json").read_text())
        self.seq2seq = bool(config.get("is_encoder_decoder"))
        if self.seq2seq:
            self.model, self.tokenizer, _ = load_seq2seq(self.path)
        else:
            self.model, self.tokenizer, _ = load_base(self.path, self.data[0].task)
        self.modules = [random_module(self.model, seed) for seed in (0, 1)]
        self.points = [i / (args.points - 1) for i in range(args.points)]
        self.batches = [
            batch
            for rows in self.rows()
            for batch in rows.prepare(self.model, self.tokenizer).batches
        ]

    def rows(self) -> list[Rows]:
        """The tasks' rows, not tokenised yet."""
        objective = Answers() if self.seq2seq else Classification()
        return [Rows(data.task, data.validation, objective) for data in self.data]

    def bare(self, *, bf16: bool) -> None:
        """Nothing but forward passes."""
        start: dict[str, Any] = {}
        self.model.eval()
        with torch.inference_mode(), reduced(self.model, bf16):
            for _ in self.points:
                for rows, inputs in self.batches:
                    if self.seq2seq:
                        first = torch.full((len(rows), 1), self.model.config.decoder_start_token_id)
                        start = {"decoder_input_ids": first}
                    self.model(**inputs, **start)

    def sweep(self, space: str, *, bf16: bool = False) -> list[float]:
        """From modules and text rows to a score per point and task, tokenising included."""
        settings = Settings(base=self.path, bf16=bf16)
        inputs = [Input(f"m{i}", m, str(i)) for i, m in enumerate(self.modules)]
        with tempfile.TemporaryDirectory() as folder:
            bench = Runner(
                lambda: (self.model, self.tokenizer),
                {VALIDATION: self.rows()},
                settings,
                ResultStore(Path(folder, "results.jsonl")),
                lambda _: None,
            )
            found = [
                bench.score(point(inputs, (t, 1 - t), space, settings), VALIDATION)
                for t in self.points
            ]
            bench.close()
        return [record["score"] for records in found for record in records]


def processes(case: Case, count: int) -> float:
    """Median seconds of a point in processes of its own."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        dirs = [str(Path(folder, n)) for n in "ab"]
        for module, where in zip(case.modules, dirs, strict=True):
            module.save(where)
        rows = Path(folder, "dev.jsonl")
        with rows.open("w") as f:
            for e in case.data[0].validation:
                row = {"sentence1": e.text, "sentence2": e.text_pair, "label": e.label}
                f.write(json.dumps(row) + "\n")
        run = [sys.executable, str(HERE / "process_per_point.py")]
        path = case.path
        for t in case.points[:count]:
            start = time.perf_counter()
            out = str(Path(folder, "out"))
            for stage in (["merge", path, *dirs, out, str(t)], ["evaluate", path, out, str(rows)]):
                subprocess.run([*run, *stage], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
