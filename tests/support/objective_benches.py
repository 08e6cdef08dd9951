"""Models and rows for objectives beside classification, on the bench of the training tests."""

from __future__ import annotations

import json
from typing import Any

from support.pem_process import Child
from support.tiny_models import write_causal, write_text_to_text
from support.training_bench import BAD, FILLER, GOOD, Bench, write_documents

from pem_composition.training.training_flags import TrainConfig


class ObjectiveBench:
    """Runs with flags of an objective's own."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.folder = bench, bench.folder

    def own(self, name: str | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def flags(self, output: str, name: str | None = None, **changes: Any) -> dict[str, Any]:
        return self.bench.flags(output, **(self.own(name) | changes))

    def config(self, output: str, name: str | None = None, **changes: Any) -> TrainConfig:
        return self.bench.config(output, **(self.own(name) | changes))

    def start(self, output: str, name: str, variables: dict[str, str], **changes: Any) -> Child:
        return self.bench.start(output, variables=variables, **(self.own(name) | changes))


class ClassBench(ObjectiveBench):
    """The bench itself, without dropout."""

    def own(self, name: str | None = None) -> dict[str, Any]:
        off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        return off | {"lora_dropout": None}


class CausalBench(ObjectiveBench):
    """Tiny decoders with documents of different lengths, a third of which has a high score."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        texts = [" ".join([*GOOD, *BAD])]
        self.bases = {n: write_causal(self.folder / n, n, texts) for n in ("gpt2", "llama")}
        self.texts = texts
        plain = write_documents(self.folder / "plain.jsonl", 90, seed=5)
        rows = [json.loads(line) for line in plain.read_text().splitlines()]
        self.documents = self.folder / "scored.jsonl"
        with self.documents.open("w") as file:
            for i, row in enumerate(rows):
                words = row["text"].split()[: 2 + i % 11]
                scored = {"text": " ".join(words), "toxicity": 0.9 if i % 3 == 0 else 0.2}
                file.write(json.dumps(scored) + "\n")

    def own(self, name: str | None = None) -> dict[str, Any]:
        return {
            "objective": "causal_lm", "model_name_or_path": self.bases[name or "gpt2"],
            "task_name": None, "train_file": self.documents, "validation_file": self.documents,
            "lora_dropout": None,
        }  # fmt: skip


class Seq2SeqBench(ObjectiveBench):
    """A tiny T5 and rows for it, beside those of the classification tests."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.texts = [" ".join([*GOOD, *BAD, *FILLER, "negative", "positive"])]
        self.base = write_text_to_text(self.folder / "t5", self.texts)
        self.prompt = self.folder / "prompt.json"
        answers = {"negative": "sad w1", "positive": "good"}  # two tokens and one
        self.prompt.write_text(json.dumps({"template": "{sentence}", "answers": answers}))
        self.documents = write_documents(self.folder / "documents.jsonl", 120, seed=5)

    def own(self, name: str | None = None) -> dict[str, Any]:
        """``blocks``: the next block of a domain's documents instead of a label's words."""
        own = {"objective": "seq2seq", "model_name_or_path": self.base, "prompt": self.prompt}
        if name != "blocks":
            return own
        return own | {
            "target": "next_block", "block_size": 8, "prompt": None, "task_name": None,
            "train_file": self.documents, "validation_file": self.documents,
            "max_eval_samples": 30,
        }  # fmt: skip
