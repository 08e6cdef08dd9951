"""A tiny decoder, modules, prompts, a text and a judge trained here, for sweeps over strengths."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from support.jsonl import write_jsonl
from support.tiny_models import moved, random_module, tiny, write_causal

from pem_composition.checkpoint import base_identity
from pem_composition.evaluation.models import load_causal, save_model
from pem_composition.evaluation.toxicity import tfidf

GOOD = ("good", "fine", "great", "nice", "lovely", "kind")
BAD = ("bad", "poor", "awful", "sad", "nasty", "vile")
PROMPTS = ("good fine", "bad", "great nice bad poor awful")


@dataclass(frozen=True)
class Bench:
    """Paths of everything that a sweep reads."""

    base: Path
    module: Path
    other: Path  # another module of the same base
    foreign: Path  # a module of another base
    prompts: Path
    text: Path
    judge: Path
    second: Path  # another judge

    def words(self, *, module: Path | None = None) -> list[str]:
        """negation.py with these inputs, all but grid and output."""
        return [
            "-a", str(module or self.module), "--evaluate", "--model_name_or_path", str(self.base),
            "--prompt_file", str(self.prompts), "--num_samples", "4", "--max_new_tokens", "8",
            "--top_k", "40", "--seed", "3", "--judge", str(self.judge), "--threshold", "0.5",
            "--perplexity_file", str(self.text), "--window", "16", "--stride", "8",
        ]  # fmt: skip


def make(folder: Path, name: str = "llama", kind: str = "lora") -> Bench:
    """Write everything into ``folder``."""
    base = write_causal(folder / "base", name, [" ".join((*GOOD, *BAD))] * 9)
    strange = write_causal(folder / "strange", name, [" ".join(GOOD)], seed=9)
    modules = {"module": (base, 1), "other": (base, 2), "foreign": (strange, 1)}
    for label, (owner, seed) in modules.items():
        write_module(folder / label, name, kind, owner, seed)
    prompts = [{"prompt": {"text": text}} for text in PROMPTS]
    draw = random.Random(0)
    lines = [" ".join(draw.choices((*GOOD, *BAD), k=draw.randrange(3, 12))) for _ in range(12)]
    return Bench(
        base, *(folder / label for label in modules),
        write_jsonl(folder / "prompts.jsonl", prompts), write_text(folder / "text.raw", lines),
        write_judge(folder / "judge", seed=0), write_judge(folder / "second", seed=1),
    )  # fmt: skip


def write_module(path: Path, name: str, kind: str, base: Path, seed: int) -> Path:
    """A module of random numbers, or a whole model moved a little."""
    if kind != "full":
        module = random_module(tiny(name), kind, seed=seed)
        replace(module, base=base_identity(base)).save(path)
        return path
    model, tokenizer, _ = load_causal(base)
    save_model(moved(model, seed), path)
    tokenizer.save_pretrained(path)
    return path


def write_judge(path: Path, seed: int) -> Path:
    """A judge that has learned which words are bad."""
    data, draw = path.with_name(f"{path.name}-data"), random.Random(seed)
    data.mkdir()
    rows = []
    for label, own, rest in (("offensive", BAD, GOOD), ("fine", GOOD, BAD)):
        for _ in range(40):
            said = draw.choices(own, k=4) + draw.choices(rest, k=1)
            rows.append({"text": " ".join(said), "label": label})
    write_jsonl(data / "train.jsonl", rows)
    tfidf.train(data, path, path.name)
    return path


def write_text(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path
