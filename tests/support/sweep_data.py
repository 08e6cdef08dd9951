"""Tiny base models with tokenizers, modules and labelled rows on disk, for sweeps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from support.tiny_models import VOCABULARY, moved, random_module, tiny, write_text_to_text
from transformers import T5ForConditionalGeneration

from pem_composition.evaluation.models import save_model

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


@dataclass(frozen=True)
class TextBench:
    """A text-to-text model and two tasks for it: pairs answered Yes or No, and sentiments."""

    base: Path
    modules: tuple[Path, ...]  # four
    pairs: tuple[Path, Path]  # validation, test
    reviews: tuple[Path, Path]
    documents: Path

    def flags(self, *tasks: str, modules: int = 2) -> list[str]:
        """Flags of a sweep over the tasks (rte, sst2) but program, grid and output."""
        files = [{"rte": self.pairs, "sst2": self.reviews}[task] for task in tasks]
        return [
            "-a",
            *map(str, self.modules[:modules]),
            "--model_name_or_path",
            str(self.base),
            "--objective",
            "seq2seq",
            "--task_name",
            *tasks,
            "--validation_file",
            *(str(validation) for validation, _ in files),
            "--test_file",
            *(str(test) for _, test in files),
        ]


def make_text(folder: Path, kind: str = "lora") -> TextBench:
    """Write base, four modules (or whole models) and rows into ``folder``."""
    words = [f"w{i}" for i in range(12)]
    answers = "Yes No yes or no negative positive review Does Is imply that Please answer either"
    base = write_text_to_text(folder / "base", [" ".join([*words, answers])] * 20)
    paths = tuple(folder / f"m{seed}" for seed in (1, 2, 3, 4))
    for seed, path in enumerate(paths, start=1):
        model = T5ForConditionalGeneration.from_pretrained(base)
        if kind == "full":
            save_model(moved(model, seed), path)
        else:
            random_module(model, kind, seed=seed).save(path)
    draw = random.Random(7)

    def text() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randrange(2, 9)))

    def write(name: str, count: int, labels: tuple[str, ...], *columns: str) -> Path:
        rows = [
            {**{c: text() for c in columns}, **({"label": draw.choice(labels)} if labels else {})}
            for _ in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    rte, sst2 = ("entailment", "not_entailment"), ("negative", "positive")
    pairs = [write(f"rte-{n}", c, rte, "sentence1", "sentence2") for n, c in (("d", 12), ("t", 10))]
    reviews = [write(f"sst2-{n}", c, sst2, "sentence") for n, c in (("d", 10), ("t", 14))]
    documents = write("documents", 30, (), "text")
    return TextBench(base, paths, tuple(pairs), tuple(reviews), documents)
