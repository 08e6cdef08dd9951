"""Tasks of different classes on one tiny encoder: a module with a head of its own for each."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from support.sweep_data import write_tokenizer
from support.tiny_models import VOCABULARY, random_module, tiny

import pem_composition as library
from pem_composition.module import HeadInfo

LABELS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "rte": ("entailment", "not_entailment"),
    "stsb": (),
}
COLUMNS = {"mnli": ("premise", "hypothesis")}


@dataclass(frozen=True)
class Bench:
    """Paths of base, modules and rows; the tasks in the order of the modules."""

    base: Path
    tasks: tuple[str, ...]
    modules: tuple[Path, ...]
    rows: dict[tuple[str, str], Path]  # (task, split)

    def flags(self, modules: tuple[int, ...] | None = None) -> list[str]:
        """Flags of a sweep or search but grid, head and output."""
        places = range(len(self.tasks)) if modules is None else modules
        tasks = [self.tasks[i] for i in places]
        return [
            "-a", *(str(self.modules[i]) for i in places),
            "--model_name_or_path", str(self.base), "--task_name", *tasks,
            "--validation_file", *(str(self.rows[t, "validation"]) for t in tasks),
            "--test_file", *(str(self.rows[t, "test"]) for t in tasks),
        ]  # fmt: skip


def make(
    folder: Path, kind: str = "lora", tasks: tuple[str, ...] = ("mnli", "rte", "stsb")
) -> Bench:
    """Write everything into ``folder``."""
    model = tiny("roberta")
    base = folder / "base"
    model.roberta.save_pretrained(base)  # without a head: every task has its own
    write_tokenizer(base)
    modules = []
    for seed, task in enumerate(tasks, start=1):
        modules.append(folder / task)
        own_head(random_module(model, kind, seed=seed, head_seed=seed), task).save(modules[-1])
    rows = {}
    for split, count, seed in (("validation", 24, 0), ("test", 18, 1)):
        for task in tasks:
            rows[task, split] = write_rows(folder / f"{task}-{split}.jsonl", task, count, seed)
    return Bench(base, tasks, tuple(modules), rows)


def own_head(module: library.PEM, task: str) -> library.PEM:
    """The module with as many outputs as the task has answers."""
    count = len(LABELS[task]) or 1
    tensors = {
        n: t[:count] if n.startswith("classifier.out_proj") else t
        for n, t in module.tensors.items()
    }
    problem = "classification" if LABELS[task] else "regression"
    return replace(module, tensors=tensors, head=HeadInfo(LABELS[task], problem), name=task)


def write_rows(path: Path, task: str, count: int, seed: int) -> Path:
    """Random pairs with random labels."""
    draw = random.Random(f"{task} {seed}")
    first, second = COLUMNS.get(task, ("sentence1", "sentence2"))

    def sentence() -> str:
        return " ".join(f"w{draw.randrange(5, VOCABULARY)}" for _ in range(draw.randrange(2, 12)))

    def label() -> str | float:
        return draw.choice(LABELS[task]) if LABELS[task] else round(draw.uniform(0, 5), 2)

    rows = [{first: sentence(), second: sentence(), "label": label()} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Hand:
    """One freshly loaded model per task, whose head has the task's number of outputs."""

    def __init__(self, bench: Bench) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.bench = bench
        self.tokenizer = AutoTokenizer.from_pretrained(bench.base)
        self.models = {}
        for task, module in zip(bench.tasks, bench.modules, strict=True):
            model = AutoModelForSequenceClassification.from_pretrained(
                bench.base, num_labels=len(LABELS[task]) or 1, ignore_mismatched_sizes=True
            )
            library.attach(model, library.load(module))  # its head; the adapter is taken off
            library.adapters.set_active(model)
            self.models[task] = model.eval()

    @torch.no_grad()
    def outputs(self, task: str, split: str, module: library.PEM) -> torch.Tensor:
        """Logits of every row, one at a time, with the module's adapter and the task's head."""
        model, out = self.models[task], []
        with library.attach(model, module, name="merged", head="ignore"):
            for line in self.bench.rows[task, split].read_text().splitlines():
                row = json.loads(line)
                texts = [row[c] for c in COLUMNS.get(task, ("sentence1", "sentence2"))]
                out.append(model(**self.tokenizer(*texts, return_tensors="pt")).logits[0])
        return torch.stack(out)
