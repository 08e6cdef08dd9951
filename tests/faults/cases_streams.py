"""Log space, folding and extracting: what has no logarithm, no place or no low rank."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from faults import damage as d
from faults import oracle
from faults.case import Case
from faults.world import LAYER, WEIGHTS
from safetensors.torch import load_file, save_file

KEY = "roberta.encoder.layer.1.attention.self.key"
OTHER_SPACE = "use another space (--space parameter or delta)"
EMBEDDING = "roberta.embeddings.word_embeddings.weight"
FOLD_BAD = ("fold", "a", "--module", "a=bad", "-m", "base", "-p", "out")


def put_in(module: str, value: float) -> d.Damage:
    """One entry of an (IA)^3 vector, without the record that knows better."""

    def apply(folder: Path) -> None:
        path = folder / module / WEIGHTS
        held = load_file(path)
        held[f"base_model.model.{KEY}.ia3_l"][3] = value
        save_file(held, path, metadata={"format": "pt"})
        (folder / module / "pem.json").unlink()

    return apply


def rows(model: str, count: int) -> d.Damage:
    """A whole model with more tokens than the others."""

    def apply(folder: Path) -> None:
        path = folder / model / "model.safetensors"
        held = load_file(path)
        held[EMBEDDING] = torch.cat([held[EMBEDDING], torch.ones(count, 32)])
        save_file(held, path, metadata={"format": "pt"})
        config = json.loads((folder / model / "config.json").read_text())
        config["vocab_size"] += count
        (folder / model / "config.json").write_text(json.dumps(config))

    return apply


def infinite(folder: Path) -> None:
    """An infinity in the base, in a tensor that no module changes."""
    path = folder / "base" / "model.safetensors"
    held = load_file(path)
    held[EMBEDDING][5, 6] = float("inf")
    save_file(held, path, metadata={"format": "pt"})


def product(here: Path) -> None:
    """The vectors of out are those of ia3 and ia3b multiplied, in NumPy."""
    out, a, b = (load_file(here / n / WEIGHTS) for n in ("out", "ia3", "ia3b"))
    for name, tensor in out.items():
        if name.endswith("ia3_l"):
            exact = a[name].double().numpy() * b[name].double().numpy()
            assert abs(tensor.double().numpy() - exact).max() < 1e-6


def folded(here: Path) -> None:
    """The base with the update of bad in it, dense in float64, and the head of bad."""
    out, base = (load_file(here / n / "model.safetensors") for n in ("out", "base"))
    updates = oracle.updates(here / "bad")
    head = load_file(here / "bad" / WEIGHTS)
    for name, tensor in out.items():
        exact = base[name].double()
        if name.removesuffix(".weight") in updates:
            exact = exact + torch.from_numpy(updates[name.removesuffix(".weight")])
        if "classifier" in name:
            exact = head[f"base_model.model.{name}"].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=0, atol=1e-6)


LOG = (
    Case("LG1", "(IA)^3 vector with a negative entry, in log space",
         f"...b: '{KEY}.ia3' has an entry without a logarithm; found -0.3, expected entries > 0; "
         f"{OTHER_SPACE}",
         put_in("ia3b", -0.3),
         run=(("merge", "-a", "ia3", "ia3b", "-p", "out", "--space", "log"),
              ("negation", "-a", "ia3b", "-p", "out", "--space", "log"),
              ("analogy", "-a", "ia3", "ia3", "ia3b", "-p", "out", "--space", "log"),
              ("compose", "a - b", "--module", "a=ia3", "--module", "b=ia3b", "-p", "out",
               "--space", "log"))),
    Case("LG2", "(IA)^3 vector with a zero, in log space",
         f"ia3b: '{KEY}.ia3' has an entry without a logarithm; found 0, expected entries > 0; "
         f"{OTHER_SPACE}",
         put_in("ia3b", 0.0),
         run=(("merge", "-a", "ia3", "ia3b", "-p", "out", "--space", "log"),)),
    Case("LG3", "LoRA in log space",
         f"bad: log space multiplies (IA)^3 vectors; found kind lora, expected kind ia3; "
         f"{OTHER_SPACE}",
         run=(("merge", "-a", "bad", "good", "-p", "out", "--space", "log"),
              ("negation", "-a", "bad", "-p", "out", "--space", "log"))),
    Case("LG4", "a merging method in log space",
         "space: ties merges updates; found space log, expected space delta; leave --space out",
         run=(("merge", "-a", "ia3", "ia3b", "-p", "out", "--space", "log", "-w", "ties"),)),
    Case("LG5", "(IA)^3, 1 + 1 in log space",
         "out = +1*ia3 +1*ia3b  (space log, head average, error against prod l_i^c_i: ...e-...)",
         run=(("merge", "-a", "ia3", "ia3b", "-p", "out", "--coefficients", "1", "1", "--space",
               "log"),), code=0, check=product),
)  # fmt: skip

CHECKPOINTS = (
    Case("CK1", "fold into a base of the same shape with other weights",
         "--model base2 and a: base fingerprint differs; found ... in --model base2 and ... in "
         "a, expected equal values; use modules of one base model, or --allow_base_mismatch if "
         "these are the same weights",
         run=(("fold", "a", "--module", "a=good", "-m", "base2", "-p", "out"),)),
    Case("CK2", "fold into another architecture",
         "gpt2: no weight of layer " + ", ".join(
             LAYER.format(0, n) for n in ("query", "value")) + f", {LAYER.format(1, 'query')} and "
         "1 more; found ... tensors of other names, expected the names that the module has; give "
         "the base model that the module was trained on; if this is it, its class renames what the "
         "file holds: fold in memory (pem.fold), and save the model",
         run=(("fold", "a", "--module", "a=bad", "-m", "gpt2", "-p", "out",
               "--allow_base_mismatch"),)),
    Case("CK3", "fold with NaN in the module",
         f"bad/{WEIGHTS}: tensor '...' is not finite; found 1 NaN or infinite of ... values, "
         "expected finite values; the run that made it diverged; use an earlier checkpoint",
         d.put(float("nan")), run=(FOLD_BAD,)),
    Case("CK4", "fold into a base with an infinity in a tensor that no module changes",
         f"base/model.safetensors: tensor '{EMBEDDING}' is not finite; found 1 NaN or infinite of "
         "3072 values, expected finite values; the run that made it diverged; use an earlier "
         "checkpoint",
         infinite, run=(FOLD_BAD,)),
    Case("CK5", "fold a method over modules of two kinds",
         "expression, ties(a, f, density=0.2, election=total): a function of modules of several "
         "kinds; found a (lora) and f (full), expected modules of one kind; write a sum of "
         "functions instead",
         run=(("fold", "ties(a, f)", "--module", "a=good", "--module", "f=m1", "-m", "base", "-p",
               "out"),)),
    Case("CK6", "fold, output over the base",
         "base: the output would replace an input; found base; choose another --save_path",
         run=(("fold", "a", "--module", "a=good", "-m", "base", "-p", "base", "-o"),)),
    Case("CK6b", "the base of whole models is the output",
         "base: the output would replace an input; found base; choose another --save_path",
         run=(("negation", "-a", "m1", "-m", "base", "-p", "base", "-o"),
              ("merge", "-a", "m1", "m2", "-m", "base", "-p", "base", "-o"),
              ("analogy", "-a", "m1", "m2", "m1", "-m", "base", "-p", "base", "-o"))),
    Case("CK6c", "the base that modules are checked against is the output",
         "base: the output would replace an input; found base; choose another --save_path",
         run=(("negation", "-a", "good", "-m", "base", "-p", "base", "-o"),
              ("merge", "-a", "good", "bad", "-m", "base", "-p", "./base/", "-o"))),
    Case("CK6d", "an output inside the base",
         "base/new: the output would lie in an input; found base; choose another --save_path",
         run=(("negation", "-a", "m1", "-m", "base", "-p", "base/new"),)),
    Case("CK6e", "a model converted into itself",
         "base: the output would replace an input; found base; choose another OUT",
         run=(("convert", "base", "base", "-o"),)),
    Case("CK7", "fold a module as another tool writes it",
         "out = base + a  (space parameter, head average, error against the update in "
         "float64: ...)",
         run=(FOLD_BAD,), code=0, check=folded),
    Case("CK8", "extract from a module instead of a model",
         "TUNED: good is no whole model; found kind lora, expected a model directory; use the "
         "module as it is",
         run=(("extract", "base", "good", "-p", "out", "--rank", "4"),)),
    Case("CK9", "extract from equal models",
         "base: no linear layer to extract; found the wanted layers are equal to the base's, "
         "expected other values in these layers; give the base and a model that was tuned from it",
         run=(("extract", "base", "base", "-p", "out", "--rank", "4"),)),
    Case("CK10", "extract strictly from a model whose biases and embeddings were tuned, too",
         "m1: 25 tensors differ that the module cannot hold; found ...; ... of the difference's "
         "norm, expected differences in the adapted layers only; leave --strict out to leave them "
         "out, or keep the whole model",
         run=(("extract", "base", "m1", "-p", "out", "--rank", "4", "--strict"),)),
    Case("CK11", "extract with a target that no layer has",
         "target_modules: 'q_proj' names no matrix of m1; found dense, key, position_embeddings, "
         "query, token_type_embeddings, value, word_embeddings; name some of these",
         run=(("extract", "base", "m1", "-p", "out", "--rank", "4", "--target_modules",
               "q_proj"),)),
    Case("CK12", "extract from two architectures",
         "gpt2: tensor '...' does not fit the base base; found F32 (...), expected no such tensor; "
         "give the base model it was tuned from",
         run=(("extract", "base", "gpt2", "-p", "out", "--rank", "4"),)),
    Case("CK13", "whole models, one with more tokens",
         f"m2: tensor '{EMBEDDING}' differs; found F32 (99, 32), expected F32 (96, 32) as in m1; "
         "use models of one architecture, or --tokens first|largest for added tokens",
         rows("m2", 3), run=(("merge", "-a", "m1", "m2", "-p", "out", "--full_merge"),)),
    Case("CK14", "a method on whole models without their base",
         "base: a method merges the differences to the base; found no base model, expected "
         "--adapters DIR ... --model BASE",
         run=(("merge", "-a", "m1", "m2", "-p", "out", "--full_merge", "-w", "ties"),)),
    Case("CK15", "Fisher merging of whole models",
         "--fisher_list: fisher needs the fisher file of every module; found none; make them with "
         "pem fisher",
         run=(("merge", "-a", "m1", "m2", "-m", "base", "-p", "out", "--full_merge", "-w",
               "fisher"),)),
    Case("CK16", "a token policy for adapters",
         "--tokens: applies to whole models only; found first; leave it out",
         run=(("merge", "-a", "good", "bad", "-p", "out", "--tokens", "first"),)),
)  # fmt: skip
