"""The folder that every case starts from: tiny real modules and models, written once.

good, bad    LoRA of rank 4 on query and value, with a classifier; bad as another tool writes it
ours         as bad, but with our pem.json
wide         LoRA of rank 6; rs: rank-stabilised; late: one layer of another rank
ia3, ia3b    (IA)^3
base, base2  the model they belong to, and one of the same shape with other weights
m1, m2       whole models tuned from base; gpt2: another architecture
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from support.sweep_data import write_tokenizer
from support.tiny_models import moved, random_module, tiny

from pem_composition.checkpoint import base_identity
from pem_composition.module import PEM

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LAYER = "roberta.encoder.layer.{}.attention.self.{}"
KEY = "base_model.model." + LAYER
# What PEFT 0.21 writes beside the keys that carry meaning.
PEFTS_KEYS = {
    "peft_version": "0.21.2",
    "auto_mapping": None,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "eva_config": None,
    "corda_config": None,
}


def build(root: Path) -> Path:
    """Write the folder."""
    model = tiny("roberta")
    model.save_pretrained(root / "base")
    tiny("roberta", seed=7).save_pretrained(root / "base2")
    tiny("gpt2").save_pretrained(root / "gpt2")
    for seed, name in ((1, "m1"), (2, "m2")):
        moved(tiny("roberta"), seed, 0.01).save_pretrained(root / name)
    write_tokenizer(root / "m2")  # as every model on the hub has one
    base = replace(base_identity(root / "base"), name="base")

    def module(name: str, kind: str = "lora", *, seed: int, **options: object) -> PEM:
        made = random_module(model, kind, seed=seed, head_seed=seed, **options)
        return replace(made, base=base, name=name)

    late = {LAYER.format(1, "value"): 2}
    for made in (
        module("good", seed=1),
        module("bad", seed=2),
        module("wide", seed=3, r=6),
        module("rs", seed=4, use_rslora=True),
        module("late", seed=5, rank_pattern=late),
        module("ia3", "ia3", seed=6),
        module("ia3b", "ia3", seed=8),
    ):
        made.save(root / made.name)
    shutil.copytree(root / "bad", root / "ours")
    foreign(root / "bad")
    return root


def foreign(folder: Path) -> None:
    """Leave what PEFT would have written: no record, and its own keys in the config."""
    (folder / "pem.json").unlink()
    (folder / "README.md").unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | PEFTS_KEYS, indent=2))
