"""Whole models that are damaged or are not what they are taken for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from faults import damage as d
from faults.case import Case
from faults.cases_files import RESTORE
from faults.cases_pickles import load_model
from safetensors.torch import load_file, save_file

import pem_composition as library

PARAMETER = "roberta.encoder.layer.0.attention.self.query.weight"
FULL = ("merge", "-a", "m1", "m2", "-p", "out", "--full_merge")


def index_to(shard: str) -> d.Damage:
    """m2 as one shard in another folder, with an index that names this shard."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "m2" / "model.safetensors")
        (folder / "m2" / "model.safetensors").rename(folder / "elsewhere.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(held, shard)}
        (folder / "m2" / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def index_without(*, rest: bool) -> d.Damage:
    """m2 in two shards, one parameter alone in the second (or with the rest) and in no index."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "m2" / "model.safetensors")
        (folder / "m2" / "model.safetensors").unlink()
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        parts = [{n: t for n, t in held.items() if n != PARAMETER}, {PARAMETER: held[PARAMETER]}]
        table = dict.fromkeys(parts[0], names[0])
        if rest:
            moved = parts[0].popitem()
            parts[1] |= dict([moved])
            table[moved[0]] = names[1]
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / "m2" / name, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": table}
        (folder / "m2" / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def without(name: str) -> d.Damage:
    """m2 without one parameter."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "m2" / "model.safetensors")
        del held[name]
        save_file(held, folder / "m2" / "model.safetensors", metadata={"format": "pt"})

    return apply


def model_config(**changes: object) -> d.Damage:
    """m2 with changes to its config.json."""

    def apply(folder: Path) -> None:
        path = folder / "m2" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def half(folder: Path) -> None:
    """Both models in float16."""
    for name in ("m1", "m2"):
        path = folder / name / "model.safetensors"
        held = {n: t.half() for n, t in load_file(path).items()}
        save_file(held, path, metadata={"format": "pt"})


def cut_while_open(folder: Path) -> None:
    """What a reader that maps the file would die of: another process truncates it."""
    from pem_composition.checkpoint.full import Weights

    with Weights(Path("m2")) as held:
        os.truncate("m2/model.safetensors", 20_000)
        for name in held.infos:
            held.value(name)


def load_as_gpt2(folder: Path) -> None:
    from pem_composition.evaluation.models import load_causal

    load_causal("m2")


def mean_of_models(folder: Path) -> None:
    """The written model is the mean of both in their dtype, head included."""
    m1, m2, out = (load_file(folder / n / "model.safetensors") for n in ("m1", "m2", "out"))
    for name, tensor in out.items():
        exact = m1[name].float() / 2 + m2[name].float() / 2
        torch.testing.assert_close(tensor, exact.half(), rtol=0, atol=0)
    model = load_model("m2").model
    assert model.dtype == torch.float32


CASES = (
    Case(
        "F01", "index that names a shard in another folder",
        "m2/model.safetensors.index.json: tensor '...' lies outside the model's folder; "
        "found '../elsewhere.safetensors', expected the name of a file in the same folder; "
        f"{RESTORE}",
        index_to("../elsewhere.safetensors"),
        run=(FULL, ("negation", "-a", "m2", "-p", "out", "-m", "base"),
             ("merge", "-a", "good", "-p", "out", "-m", "m2")),
    ),
    Case(
        "N26", "index that lost the one tensor of a shard",
        "m2/model.safetensors.index.json: names no tensor of a shard; found 1 shards, "
        "model-00001-of-00002.safetensors, expected 2, as their names say; restore the file from "
        "its source",
        index_without(rest=False), run=(FULL,),
    ),
    Case(
        "N27", "index that lost a tensor",
        f"m2/model.safetensors.index.json: missing tensor '{PARAMETER}'; found a shard with it, "
        "expected every tensor in the index; restore the file from its source",
        index_without(rest=True), run=(FULL,),
    ),
    Case(
        "N28", "index that names a shard with a null byte",
        "m2/model.safetensors.index.json: tensor '...' lies outside the model's folder; "
        r"found 'a\x00b', expected the name of a file in the same folder; "
        f"{RESTORE}",
        index_to("a\0b"), run=(FULL,),
    ),
    Case(
        "F03", "whole model that lacks a weight",
        f"m1 and m2: set of weights ({PARAMETER} in m1 only) differs; found 37 in m1 and 36 in m2, "
        "expected equal values; use models of one architecture",
        without(PARAMETER), run=(FULL,),
    ),
    Case(
        "F03b", "whole model that lacks a weight, minus its base",
        f"m2: missing tensor '{PARAMETER}'; found ... tensors, expected every tensor of the base "
        "base; give the base model it was tuned from",
        without(PARAMETER), run=lambda here: library.load("m2", base="base"),
    ),
    Case(
        "F07", "RoBERTa directory as a GPT-2",
        "m2: a causal language model is needed; found a roberta model, which is no decoder alone, "
        "expected GPT-2, Llama or another decoder; give a decoder",
        run=load_as_gpt2,
    ),
    Case(
        "F07b", "whole models of two architectures",
        "m1 and gpt2: base model type differs; found roberta in m1 and gpt2 in gpt2, expected "
        "equal values; use modules of one base model, or --allow_base_mismatch if these are the "
        "same weights",
        run=(("merge", "-a", "m1", "gpt2", "-p", "out", "--full_merge"),),
    ),
    Case(
        "F11", "config.json with more layers than the file",
        "m2: not a complete RobertaForSequenceClassification; found 16 of ... weights missing: "
        "roberta.encoder.layer.2..., expected every weight outside the head; check the "
        "architecture in config.json",
        model_config(num_hidden_layers=3), run=lambda here: load_model("m2"),
    ),
    Case(
        "F12", "config.json with fewer layers than the file",
        "m2: holds layers that config.json leaves out; found 16 more weights: "
        "roberta.encoder.layer.1..., expected those of a RobertaForSequenceClassification as "
        "configured; correct the number of layers in config.json",
        model_config(num_hidden_layers=1), run=lambda here: load_model("m2"),
    ),
    Case(
        "F08", "float16 model, no dtype asked for",
        "out = +0.5*m1 +0.5*m2  (space parameter, head average, error against the update in "
        "float64: ...)",
        half, run=(FULL,), code=0, check=mean_of_models,
    ),
    Case(
        "F22", "file cut while it is read",
        "m2/model.safetensors: changed while it was read; run again when its writer is done",
        run=cut_while_open,
    ),
)  # fmt: skip
