"""A tiny base model, its tokenizer and learnable rows on disk, and a way to run ``pem`` on them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support import pem_process

from pem_composition.training.training_flags import TrainConfig

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "sad")
FILLER = tuple(f"w{i}" for i in range(40))
REPOSITORY = Path(__file__).resolve().parents[2]


def make_base(folder: Path, *, dropout: float = 0.1) -> Path:
    """A 2-layer BERT with random weights and a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=66,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        model = BertModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.15 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *, seed: int, regression: bool = False) -> Path:
    """Sentences whose class (or score) is the mood of their words."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        moods = [draw.random() < 0.5 for _ in range(3)]
        label = sum(moods) / 3 * 5 if regression else int(sum(moods) >= 2)
        words = [draw.choice(GOOD if m else BAD) for m in moods] + draw.choices(
            FILLER, k=draw.randrange(1, 9)
        )
        draw.shuffle(words)
        text = " ".join(words)
        rows.append(
            {"sentence1": text, "sentence2": "w1", "label": label}
            if regression
            else {"sentence": text, "label": label}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Bench:
    """Base model and rows in a folder, and ``pem train`` on them in processes of their own."""

    def __init__(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(1)  # as in the child processes: equal bits need equal sums
        self.folder = folder
        self.base = make_base(folder / "base")
        self.train = write_rows(folder / "train.jsonl", 203, seed=1)
        self.validation = write_rows(folder / "dev.jsonl", 60, seed=2)

    def flags(self, output: str, **changes: Any) -> dict[str, Any]:
        """Flags of a short LoRA run with dropout, evaluated every 20 steps; None omits a flag."""
        flags = {
            "model_name_or_path": self.base,
            "task_name": "sst2",
            "train_file": self.train,
            "validation_file": self.validation,
            "output_dir": self.folder / output,
            "max_steps": 40,
            "eval_steps": 20,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-2,
            "lora_dropout": 0.1,
            "max_seq_length": 32,
            "logging_steps": 5,
            "disable_tqdm": True,
        }
        return {k: v for k, v in (flags | changes).items() if v is not None}

    def config(self, output: str, **changes: Any) -> TrainConfig:
        """The same as a config."""
        flags = self.flags(output, **changes)
        return TrainConfig(**{k: str(v) if isinstance(v, Path) else v for k, v in flags.items()})

    def start(
        self,
        output: str,
        *,
        file_limit: int | None = None,
        variables: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> pem_process.Child:
        """Start ``pem train`` with these flags."""
        return pem_process.start(
            argv_of(self.flags(output, **changes)), self.folder / f"{output}.log",
            file_limit=file_limit, variables=variables,
        )  # fmt: skip

    def pair(self, output: str, **changes: Any) -> Path:
        """Train in two processes of one group; the folder that they have written."""
        children = [self.start(output, variables=rank, **changes) for rank in ranks()]
        codes = [child.wait() for child in children]
        assert codes == [0, 0], children[0].text()[-3000:]
        return self.folder / output


def ranks() -> list[dict[str, str]]:
    """What torchrun tells each of two processes of one group."""
    from pem_composition.training.processes import _free_port

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def environment() -> dict[str, str]:
    """The environment of a ``pem`` process: this checkout, one thread, no network."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def write_documents(path: Path, count: int, *, seed: int) -> Path:
    """Texts in which each word is followed by the next one of a fixed order."""
    draw = random.Random(seed)
    words = (*GOOD, *BAD)
    rows = []
    for _ in range(count):
        start = draw.randrange(len(words))
        rows.append({"text": " ".join(words[(start + i) % len(words)] for i in range(12))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(folder: Path, name: str = "all_results.json") -> Any:
    """A result file of a run."""
    return json.loads((folder / name).read_text())


def losses(folder: Path, name: str = "loss") -> list[float]:
    """The values of that name in a run's log."""
    log = results(folder, "trainer_state.json")["log_history"]
    return [entry[name] for entry in log if name in entry]


def a_batch(config: TrainConfig) -> tuple[Any, Any, Any]:
    """A model ready to train, one training batch of it, and its loss function."""
    from pem_composition.training import execution, runs
    from pem_composition.training.identity import RunPlan
    from pem_composition.training.preparation import prepare
    from pem_composition.training.runs import trained_objective

    objective = trained_objective(config)
    data = runs.read_data(config, objective)
    start = prepare(config, data.task)
    loader = execution.make_loader(config, RunPlan(objective, data, {}, None), start, print)
    return start, next(iter(loader)), objective.loss(data.task)


def numpy_cross_entropy(logits: Any, labels: Any) -> float:
    """Mean over the labels that count, in float64."""
    import numpy as np

    wide = logits.detach().double().numpy()
    top = wide.max(-1, keepdims=True)
    log_p = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(labels.numpy(), 0)[..., None], -1)[..., 0]
    return -float(picked[labels.numpy() != -100].mean())


def refusal(capsys: Any, argv: Sequence[object]) -> str:
    """The one line that a program ends with."""
    from pem_composition.cli import main

    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def argv_of(flags: Mapping[str, object]) -> list[str]:
    """The command line of ``pem train`` with these flags."""
    words = ["train"]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words
