"""Measures of pairs of modules beside what their merges score, and how the two correlate.

pairs   every module of --first with every one of --second: measures of pem compare, drift, and
        scores of their merges with equal weights in both spaces; one JSON line per pair
table   Spearman's rank correlation of every measure with gap and gains, per file

A gain is the score of the merge minus the mean of the two modules' scores; the gap is the gain in
delta space minus that in parameter space. Pairs share modules, so they are no independent draws: no
p-value is given, and n is the number of pairs. scripts/merge_prediction.sh makes the modules.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import pem_composition as pem
from pem_composition.adapters import fold
from pem_composition.arithmetic import updates
from pem_composition.arithmetic.comparison import compare
from pem_composition.evaluation import model_names, models
from pem_composition.module import PEM
from pem_composition.objectives.classification import Classification
from pem_composition.tasks.data import RowFiles, load_task

EQUAL = (0.5, 0.5)
MEASURES = (
    "cross_term_error", "cross_term_norm", "sum_norm", "cosine", "column_overlap", "row_overlap",
    "weighted_sign_conflict", "norm_imbalance", "drift",
)  # fmt: skip
TARGETS = ("gap", "gain_delta", "gain_parameter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs")
    for name in ("--model_name_or_path", "--task_name", "--data_dir", "--output"):
        pairs.add_argument(name, required=True)
    pairs.add_argument("--max_eval_samples", type=int)
    pairs.add_argument("--max_seq_length", type=int, default=128)
    pairs.add_argument("--first", nargs="+", required=True)
    pairs.add_argument("--second", nargs="+", required=True)
    table = commands.add_parser("table")
    table.add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.command == "pairs":
        write_pairs(args)
    else:
        print_table(args.files)


# --- pairs --------------------------------------------------------------------------------------


def write_pairs(args: argparse.Namespace) -> None:
    """Append one line per pair that the output does not have yet."""
    output = Path(args.output)
    known = {(r["a"], r["b"]) for r in read(output)} if output.exists() else set()
    score = scorer(args)
    loaded = {path: pem.load(path) for path in (*args.first, *args.second)}
    moved = {path: drift_of(path, module) for path, module in loaded.items()}
    alone = {path: score(module) for path, module in loaded.items()}
    with output.open("a", encoding="utf-8") as file:
        for a in args.first:
            for b in args.second:
                modules = [loaded[a], loaded[b]]
                if (modules[0].name, modules[1].name) not in known:
                    found = measures(modules) | {"drift": (moved[a] + moved[b]) / 2}
                    found |= scores(modules, (alone[a] + alone[b]) / 2, score)
                    file.write(json.dumps(found) + "\n")
                    file.flush()


def scorer(args: argparse.Namespace) -> Callable[[PEM], float]:
    """Score of the base with a module folded in, on the task's validation rows."""
    data = load_task(
        args.task_name,
        RowFiles(
            data_dir=args.data_dir, splits=["validation"], max_eval_samples=args.max_eval_samples
        ),
    )
    torch.manual_seed(0)
    model, tokenizer, _ = models.load_base(model_names.resolve(args.model_name_or_path), data.task)
    objective = Classification(max_seq_length=args.max_seq_length)
    evaluator = objective.evaluator(data.task, data.require("validation"), tokenizer, model.config)

    def score(module: PEM) -> float:
        with fold(model, module):
            return evaluator.score(evaluator.predict(model)).score

    return score


def drift_of(path: str, module: PEM) -> float:
    """Drift of lora_A from the module's own initial module."""
    initial = pem.load(module.provenance.training["flags"]["init_from"])
    return updates.drift(module.tensors, initial.tensors)["lora_A"]


def measures(modules: Sequence[PEM]) -> dict[str, Any]:
    """What pem compare tells of the pair as a whole."""
    (pair,) = compare(modules, EQUAL).pairs
    shared = modules[0].provenance.init == modules[1].provenance.init
    return {"a": pair.a, "b": pair.b, "shared_init": shared, **asdict(pair.total)}


def derived(row: dict[str, Any]) -> dict[str, Any]:
    """The row with ||(dW_a + dW_b) / 2||, the norm of the cross terms, and how unequal a, b are."""
    a, b = row["norm_a"], row["norm_b"]
    size = (a * a + b * b + 2 * row["cosine"] * a * b) ** 0.5 / 2
    own = {"sum_norm": size, "cross_term_norm": row["cross_term_error"] * size}
    return row | own | {"norm_imbalance": max(a / b, b / a)}


def scores(
    modules: Sequence[PEM], average: float, score: Callable[[PEM], float]
) -> dict[str, float]:
    """Gains of the equal-weight merges over the average of the modules."""
    merged = {
        space: score(pem.combine(modules, EQUAL, space=space, certify=False))
        for space in ("parameter", "delta")
    }
    return {
        "average": average,
        "gain_parameter": merged["parameter"] - average,
        "gain_delta": merged["delta"] - average,
        "gap": merged["delta"] - merged["parameter"],
    }


# --- table --------------------------------------------------------------------------------------


def print_table(files: Sequence[str]) -> None:
    """One table per file, and the range of what is correlated."""
    for path in files:
        rows = [derived(row) for row in read(Path(path))]
        groups = {
            "all": rows,
            "one initial module": [r for r in rows if r["shared_init"]],
            "two initial modules": [r for r in rows if not r["shared_init"]],
        }
        print(f"\n{path}\n")
        print("| pairs | n | target | mean (min, max) | " + " | ".join(MEASURES) + " |")
        print("|---" * (4 + len(MEASURES)) + "|")
        for group, chosen in groups.items():
            for target in TARGETS if len(chosen) > 2 else ():
                print(f"| {group} | {len(chosen)} | {target} | " + " | ".join(line(chosen, target)))


def line(rows: Sequence[dict[str, Any]], target: str) -> list[str]:
    """Mean and range of the target, and its correlation with every measure."""
    values = [r[target] for r in rows]
    cells = [f"{sum(values) / len(values):+.3f} ({min(values):+.3f}, {max(values):+.3f})"]
    for measure in MEASURES:
        rho = float(spearmanr([r[measure] for r in rows], values).statistic)
        cells.append(f"{rho:+.2f}")
    return [*cells[:-1], cells[-1] + " |"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may see enough
    main()
