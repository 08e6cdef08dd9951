"""A grid on tasks of the lm-evaluation-harness: one sweep beside the harness called for each point.

    python scripts/benchmarks/harness.py --model smollm2-135m-instruct --modules runs/a runs/b \\
        --tasks my_task --include tasks --limit 20 --points 3

The other way writes each point with merge.py and starts ``lm_eval`` on it. Prints the seconds of
both, their ratio, and how many of the scores are equal to the digit. Needs lm-eval and peft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pem_composition import json_lines
from pem_composition.evaluation.model_names import resolve


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True, capture_output=True)


def swept(flags: argparse.Namespace, out: Path) -> dict[tuple[str, str], float]:
    """Scores by coefficient and metric, of one process."""
    step = 1 / (flags.points - 1)
    run("pem_composition", "sweep", "-a", *flags.modules, "-p", out, "--model_name_or_path",
        flags.model, "--harness_tasks", *flags.tasks, "--harness_include", flags.include,
        "--limit", flags.limit, "--grid", 0, step, 1, "--space", "parameter")  # fmt: skip
    *records, summary = json_lines.read(out / "results.jsonl")
    by_key = {r["key"]: r for r in records}
    points = summary["curve"]["parameter"]
    return {
        (f"{p['coefficients'][0]:g}", f"{r['task']} {metric}"): score
        for p in points
        for r in map(by_key.get, p["keys"])
        for metric, score in r["scores"].items()
    }


def one_by_one(flags: argparse.Namespace, out: Path) -> dict[tuple[str, str], float]:
    """The same by a process for each point, which loads the base again."""
    found = {}
    for place in range(flags.points):
        t, point = place / (flags.points - 1), out / str(place)
        run("pem_composition", "merge", "-a", *flags.modules, "-p", point, "--coefficients", t,
            1 - t)  # fmt: skip
        given = f"pretrained={resolve(flags.model)},peft={point},dtype=float32"
        run("lm_eval", "--model", "hf", "--model_args", given, "--tasks", ",".join(flags.tasks),
            "--include_path", flags.include, "--limit", flags.limit, "--device", "cpu",
            "--output_path", point / "harness")  # fmt: skip
        (file,) = (point / "harness").rglob("results*.json")
        for task, scores in json.loads(file.read_text())["results"].items():
            for name, score in scores.items():
                metric, _, kept = name.partition(",")
                if kept and not metric.endswith("_stderr"):
                    label = metric if kept == "none" else name
                    found[f"{t:g}", f"{task} {label}"] = score
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--modules", nargs=2, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include", required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--points", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, scores = [], []
        for name, way in (("sweep", swept), ("one by one", one_by_one)):
            began = time.perf_counter()
            scores.append(way(flags, Path(folder) / name.replace(" ", "-")))
            seconds.append(time.perf_counter() - began)
            print(f"{name}: {seconds[-1]:.1f} s for {flags.points} points")
    ours, theirs = scores
    equal = sum(ours.get(key) == score for key, score in theirs.items())
    print(f"one by one / sweep: {seconds[1] / seconds[0]:.1f}")
    print(f"scores equal to the digit: {equal} of {len(theirs)}")


if __name__ == "__main__":
    main()
