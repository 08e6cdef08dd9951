"""A grid on tasks of the lm-evaluation-harness: one sweep beside one ``lm_eval`` for each point.

    python scripts/benchmarks/harness.py [--model smollm2-135m-instruct] [--points 5] [--limit 20]

Two random LoRA modules are made, and three tasks of Rotten Tomatoes rows (``pem offline``): one of
choices, one of generation, one of perplexity. The other way starts, for every point, the harness's
own program on the base and the written composition; writing is not timed. Both run on the CPU in
float32, each as whole processes, in turn. Exit code 1 where one of the scores is not equal to the
last digit. Needs lm-eval and peft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

from sweep import random_module
from timing import report, side_by_side

from pem_composition import json_lines, offline
from pem_composition.evaluation.models import load_causal
from pem_composition.tasks.data import RowFiles, load_task

Scores = dict[tuple[str, str, str], float]  # by coefficient, task and metric

SWEEP, LM_EVAL = "pem sweep", "lm_eval for each point"
TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_target": "label",
        "doc_to_text": "{{text}}\nIs this positive or negative?",
        "doc_to_choice": ["negative", "positive"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "words": {
        "output_type": "generate_until", "doc_to_target": "{{text.split()[0]}}",
        "doc_to_text": "{{text}}\nThe first word of this is:",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [{"name": "first", "filter": [
            {"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"},
        ]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


def main() -> int:
    """Exit code: 0, 1 where scores differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a decoder")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--limit", type=int, default=20, help="rows of each task")
    parser.add_argument("--runs", type=int, default=1, help="rounds after one of warm-up")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(args, Path(folder))
        found: dict[str, list[Scores]] = {SWEEP: [], LM_EVAL: []}
        seconds = side_by_side(
            {
                SWEEP: lambda: found[SWEEP].append(grid.swept()),
                LM_EVAL: lambda: found[LM_EVAL].append(grid.one_by_one()),
            },
            args.runs,
        )
    print(f"{args.model}, {args.points} points, {len(TASKS)} tasks of {args.limit} rows\n")
    report(seconds, base=SWEEP)
    print()
    expected = found[LM_EVAL][0]
    for what in dict.fromkeys((task, metric) for _, task, metric in expected):
        over = [score for (_, *of), score in expected.items() if tuple(of) == what]
        print(*what, f"{min(over):.6g} to {max(over):.6g}")
    different = {
        key: (score, scores.get(key))
        for scores in (*found[SWEEP], *found[LM_EVAL])
        for key, score in expected.items()
        if scores.get(key) != score
    }
    print(f"{len(expected)} scores, {len(different)} of them not equal to the last digit")
    for key, values in different.items():
        print(*key, *values)
    return 1 if different else 0


class Grid:
    """Modules, their compositions as folders, and task files."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.limit, self.folder, self.fresh = args.limit, folder, count()
        self.base = str(offline.resolve(args.model))
        model, _, _ = load_causal(self.base)
        self.modules = [folder / name for name in "ab"]
        for seed, path in enumerate(self.modules):
            random_module(model, seed).save(path)
        # As a range makes them, so that both ways have the same numbers.
        self.step = 1 / (args.points - 1)
        self.written = {f"{i * self.step:g}": folder / f"point-{i}" for i in range(args.points)}
        for i, path in enumerate(self.written.values()):
            run("pem_composition", "merge", "-a", *self.modules, "-p", path, "--coefficients",
                i * self.step, 1 - i * self.step, "--space", "parameter")  # fmt: skip
        self.tasks = folder / "tasks"
        self.tasks.mkdir()
        rows = load_task("rotten_tomatoes", RowFiles(splits=("validation",))).validation
        file = self.tasks / "rows.jsonl"
        lines = [{"text": row.text, "label": row.label} for row in rows]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        for name, settings in TASKS.items():
            task = {
                "task": name, "dataset_path": "json", "test_split": "validation",
                "dataset_kwargs": {"data_files": {"validation": str(file)}},
                "metadata": {"version": 1.0},
            }  # fmt: skip
            # JSON is YAML.
            (self.tasks / f"{name}.yaml").write_text(json.dumps(task | settings), encoding="utf-8")

    def swept(self) -> Scores:
        """Scores of one process."""
        out = self.folder / f"sweep-{next(self.fresh)}"
        run("pem_composition", "sweep", "-a", *self.modules, "-p", out, "--model_name_or_path",
            self.base, "--harness_tasks", *TASKS, "--harness_include", self.tasks, "--limit",
            self.limit, "--grid", 0, self.step, 1, "--space", "parameter", "--use_cpu")  # fmt: skip
        *records, summary = json_lines.read(out / "results.jsonl")
        by_key = {record["key"]: record for record in records}
        return {
            (f"{point['coefficients'][0]:g}", record["task"], metric): score
            for point in summary["curve"]["parameter"]
            for record in map(by_key.__getitem__, point["keys"])
            for metric, score in record["scores"].items()
        }

    def one_by_one(self) -> Scores:
        """The same by a process for each point, which loads the base again."""
        found = {}
        for t, path in self.written.items():
            out = path / f"harness-{next(self.fresh)}"
            run("lm_eval", "--model", "hf", "--model_args",
                f"pretrained={self.base},peft={path},dtype=float32", "--tasks", ",".join(TASKS),
                "--include_path", self.tasks, "--limit", self.limit, "--device", "cpu",
                "--output_path", out)  # fmt: skip
            (file,) = out.rglob("results*.json")
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
            for task, scores in results.items():
                for name, score in scores.items():
                    metric, _, kept = name.partition(",")
                    if kept and not metric.endswith("_stderr"):
                        found[t, task, metric if kept == "none" else name] = score
        return found


def run(*words: object) -> None:
    """A program of this interpreter; what it said where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}")


if __name__ == "__main__":
    sys.exit(main())
