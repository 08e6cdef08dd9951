"""Detoxify's "unbiased" RoBERTa: its checkpoint converted once, by a reader that runs no code.

The released file is torch.save({"state_dict": tensors, "config": plain values}). Detoxify reads it
with an unrestricted unpickler; here only tensors and plain values can come out of it. The score is
the sigmoid of the first output, "toxicity" (the outputs are not exclusive).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pem_composition import offline, safe_files
from pem_composition.checkpoint import files
from pem_composition.checkpoint.pickles import TorchZipFile
from pem_composition.errors import CheckpointError, RunFailed, UsageError, install, installed
from pem_composition.evaluation.encoded import encode
from pem_composition.evaluation.padded import batches, collect, in_order
from pem_composition.evaluation.toxicity.classifier import (
    RECORD,
    Identity,
    read_record,
    verify,
    write_record,
)
from pem_composition.tasks.data import Example

KIND, VERSION = "detoxify", "unbiased"
BASE_MODEL = "roberta-base"  # configuration and tokenizer; the checkpoint holds neither
WEIGHTS = "model.safetensors"
OUTPUT = "classifier.out_proj.weight"
MAX_TOKENS = 512
BATCH_SIZE, TOKEN_BUDGET = 64, 16384


@dataclass(frozen=True)
class DetoxifyJudge:
    """The classifier and its tokenizer."""

    identity: Identity
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Sigmoid (n,) of the toxicity output; longer texts are cut at 512 tokens."""
        if not len(texts):
            return np.zeros(0)
        limit = min(MAX_TOKENS, self.tokenizer.model_max_length)
        examples = [Example(text, None, None, number) for number, text in enumerate(texts)]
        layout = {
            "batch_size": BATCH_SIZE,
            "token_budget": TOKEN_BUDGET,
            "device": self.model.device,
        }
        rows = batches(encode(self.tokenizer, examples, max_seq_length=limit), **layout)
        logits = in_order(*collect(self.model, rows, lambda model, given: model(**given).logits))
        return np.asarray(expit(logits[:, 0].astype(np.float64)))

    def seen(self, texts: Sequence[str]) -> None:
        """Unknown: the checkpoint does not say what it was trained on, text by text."""


def load(folder: Path) -> DetoxifyJudge:
    """Read a converted checkpoint; on an accelerator where there is one.

    Raises:
        CheckpointError: damaged, or weights missing.
    """
    identity = verify(folder, read_record(folder), (WEIGHTS, "config.json"))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        names = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        raise CheckpointError.build(folder, "not the weights of its architecture", found=names[:3])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DetoxifyJudge(identity, model.eval().to(device), tokenizer)


def prepared() -> Path:
    """Folder of the converted checkpoint in the cache; fetched and converted on first use.

    The file is taken from torch's hub folder if it is there, where Detoxify itself keeps it.

    Raises:
        UsageError: the package detoxify is not installed.
        RunFailed: checkpoint, configuration or tokenizer could not be fetched.
    """
    folder = offline.cache_root() / f"judge-{KIND}-{VERSION}"
    if (folder / RECORD).is_file():
        return folder
    if not installed("detoxify"):
        raise UsageError.build(
            "--judge detoxify", "the judge is not installed",
            do=f"{install('detoxify')}, or use --judge offline",
        )  # fmt: skip
    from detoxify.detoxify import MODEL_URLS

    convert(_fetched(MODEL_URLS[VERSION]), BASE_MODEL, folder)
    return folder


def _fetched(url: str) -> Path:
    """The checkpoint; its name ends with the first digits of its sha256, which are compared."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    digits = re.fullmatch(r".*-([0-9a-f]{8,})\.ckpt", path.name)
    if digits is None:
        raise CheckpointError.build(url, "no hash in the file's name")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits[1])
        except (OSError, RuntimeError) as error:
            raise RunFailed.build(
                url, f"could not be fetched ({error})", do=f"put the file at {path}"
            ) from None
    found = safe_files.sha256_file(path)
    if not found.startswith(digits[1]):
        raise CheckpointError.build(
            path, "not the released file", found=f"sha256 {found}", expected=f"{digits[1]}...",
            do="delete it and run again",
        )  # fmt: skip
    return path


def convert(checkpoint: Path, base: str, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a checkpoint.

    Args:
        base: hub name or folder with the configuration and tokenizer of the architecture.

    Raises:
        CheckpointError: not a file of this layout, or its first output is not toxicity.
        RunFailed: the configuration or the tokenizer could not be fetched.
    """
    with TorchZipFile(checkpoint, inside="state_dict") as file:
        classes = _classes(file.beside, checkpoint)
        # A buffer of older versions, which newer ones make themselves.
        infos = {n: i for n, i in file.infos.items() if not n.endswith(".position_ids")}
        if OUTPUT not in infos:
            raise CheckpointError.build(checkpoint, "no classifier", expected=OUTPUT)
        outputs = infos[OUTPUT].shape[0]
        try:
            config = AutoConfig.from_pretrained(base, num_labels=outputs)
            tokenizer = AutoTokenizer.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise RunFailed.build(
                base, f"configuration or tokenizer could not be fetched ({error})"
            ) from None
        config.architectures = ["RobertaForSequenceClassification"]
        config.id2label |= dict(enumerate(classes[:outputs]))
        config.label2id = {word: number for number, word in config.id2label.items()}
        with safe_files.atomic_directory(folder) as out:
            files.write_safetensors(out / WEIGHTS, infos, lambda name: [file.read(name)])
            config.save_pretrained(out)
            tokenizer.save_pretrained(out)
            write_record(out, KIND, KIND, VERSION, source_sha256=safe_files.sha256_file(checkpoint))


def _classes(beside: Mapping[str, Any], path: Path) -> list[str]:
    """The names of the outputs that the checkpoint's own configuration gives."""
    match beside:
        case {"config": {"dataset": {"args": {"classes": [*classes]}}}} if classes:
            if classes[0] in ("toxicity", "toxic"):
                return [str(word) for word in classes]
            raise CheckpointError.build(
                path, "another first output", found=classes[0], expected="toxicity"
            )
    raise CheckpointError.build(
        path, "not a Detoxify checkpoint", expected="config with dataset, args, classes"
    )
