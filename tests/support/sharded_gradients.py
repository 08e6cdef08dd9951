"""One process of a launch: gradients of tiny models shared out among processes, and of whole ones.

The first one prints a line of JSON for each architecture.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny_models import BUILDERS
from torch.distributed.fsdp import FSDPModule

from pem_composition import launch
from pem_composition.evaluation import sharding

warnings.filterwarnings("ignore")
FACTORIES = (
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForCausalLM,
)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of each stored tensor, whole; every process has the same rows."""
    classifies = "SequenceClassification" in type(model).__name__
    labels = torch.arange(len(ids)) % 3 if classifies else ids
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    tensors = sharding.stored_tensors(model)
    return {n: sharding.whole(t.grad) for n, t in tensors.items() if t.grad is not None}


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Are names alike, how far are gradients apart, as a share of the largest, what is a unit."""
    if launch.is_main():
        torch.manual_seed(0)
        BUILDERS[name]().save_pretrained(folder)
    torch.distributed.barrier()
    config = transformers.AutoConfig.from_pretrained(folder)
    own = getattr(transformers, config.architectures[0])
    factory = next(f for f in FACTORIES if f._model_mapping.get(type(config), None) is own)
    alone = own.from_pretrained(folder).eval()
    parts = own.from_pretrained(folder, **sharding.keywords(factory, config, 2)).eval()
    ids = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
    first, second = gradients(alone, ids), gradients(parts, ids)
    largest = max(float(g.abs().max()) for g in first.values())
    blocks = [p.removesuffix(".*") for p in sharding.stacks(alone)]
    return {
        "name": name,
        "names": list(first) == list(second) and len(first),
        "worst": max(float((first[n] - second[n]).abs().max()) for n in first) / largest,
        "blocks": [
            isinstance(block, FSDPModule) for p in blocks for block in parts.get_submodule(p)
        ],
    }


def main(words: list[str]) -> int:
    """A folder, and names of architectures."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    launch.join_group()
    for name in words[1:]:
        found = compare(name, Path(words[0]) / name)
        if launch.is_main():
            sys.stdout.write(json.dumps(found) + "\n")
    launch.leave_group()
    return 0
