"""A tiny base model with a tokenizer, three modules and labelled rows on disk, for sweeps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tiny import VOCABULARY, random_module, tiny

LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Bench:
    """Paths of everything a sweep reads."""

    base: Path
    modules: tuple[Path, Path]
    full_set: Path
    validation: Path
    test: Path

    def flags(self) -> list[str]:
        """Flags of ``pem sweep`` but grid and output."""
        return [
            "-a",
            *map(str, self.modules),
            "--model_name_or_path",
            str(self.base),
            "--task_name",
            "mnli",
            "--validation_file",
            str(self.validation),
            "--test_file",
            str(self.test),
        ]


def make(folder: Path, kind: str = "lora") -> Bench:
    """Write base, modules and rows into ``folder``."""
    base = folder / "base"
    model = tiny("roberta")
    model.save_pretrained(base)
    write_tokenizer(base)
    paths = []
    for seed in (1, 2, 3):
        paths.append(folder / f"half{seed}")
        random_module(model, kind, seed=seed, head_seed=seed).save(paths[-1])
    rows = [
        write_rows(folder / f"{name}.jsonl", count, seed)
        for name, count, seed in (("dev", 40, 0), ("test", 30, 1))
    ]
    return Bench(base, (paths[0], paths[1]), paths[2], *rows)


def write_tokenizer(folder: Path) -> None:
    """Words w5 ... w95 are the token ids of that number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    words |= {f"w{i}": i for i in range(5, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Random sentence pairs of different length with random labels."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(f"w{draw.randrange(5, VOCABULARY)}" for _ in range(draw.randrange(2, 12)))

    rows = [
        {"premise": sentence(), "hypothesis": sentence(), "label": draw.choice(LABELS)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
