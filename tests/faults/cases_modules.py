"""Modules whose config, tensors, base or name do not fit: PEFT's directories and attaching them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from faults import damage as d
from faults.case import READERS, Case
from faults.oracle import close, updates
from faults.world import CONFIG, KEY, LAYER, WEIGHTS

import pem_composition as library

FILE, JSON = f"bad/{WEIGHTS}", f"bad/{CONFIG}"
SAVE_AGAIN = "save the module again with the library that made it"
CORRECT = "correct the config"
ONE = (("merge", "-a", "bad", "-p", "out"),)
SAME = "out = +1*bad  (space parameter, head average, error against sum c_i dW_i: 0)"


def unchanged(here: Path) -> None:
    close(updates(here / "out"), updates(here / "good"))


def is_bad(here: Path) -> None:
    close(updates(here / "out"), updates(here / "bad"))


def is_wrapped(here: Path) -> None:
    found = {n.removeprefix("module."): u for n, u in updates(here / "bad").items()}
    close(updates(here / "out"), {n.removeprefix("base_model.model."): u for n, u in found.items()})


def missing(key: str) -> str:
    return (
        f"{JSON}: {key} is missing; expected a value; defaults differ between versions; add {key} "
        "as the module was trained"
    )


def lost(key: str) -> str:
    return (
        f"{JSON}: {key} is missing although ... is there, so it was removed or lost; expected true "
        f"or false; add {key} as the module was trained"
    )


def model(name: str, kind: str = "SequenceClassification", **options: Any) -> Any:
    """A live model from its directory."""
    import transformers

    factory = getattr(transformers, f"AutoModelFor{kind}")
    return factory.from_pretrained(name, **options).eval()


def attach(module: str, to: str, name: str = "default", **options: Any) -> Callable[[Path], Any]:
    """Attach a module directory to a live model."""

    def run(_folder: Path) -> None:
        library.attach(model(to, **options), library.load(module), name=name)

    return run


def attach_twice(alpha: float | None) -> Callable[[Path], Any]:
    """Two modules under one name, the second with another alpha where one is given."""

    def run(_folder: Path) -> None:
        base, bad = model("base"), library.load("bad")
        library.attach(base, library.load("good"), head="ignore")
        config = replace(bad.config, alpha=alpha or bad.config.alpha)
        library.attach(base, replace(bad, config=config), head="ignore")

    return run


def without_identity(folder: Path) -> None:
    """bad says nothing of its base, as files of early PEFT do."""
    d.config(base_model_name_or_path=None)(folder)


def other_base(folder: Path) -> None:
    """bad's layers and sizes fit base2, whose weights are others."""
    d.record()(folder)


def zeros(held: dict[str, torch.Tensor]) -> None:
    for name, tensor in held.items():
        if "lora_B" in name:
            tensor.zero_()


def cases(key: str) -> tuple[str, str]:
    return f"{KEY.format(0, key)}.lora_A.weight", f"{KEY.format(0, key)}.lora_B.weight"


def extra_layer(held: dict[str, torch.Tensor]) -> None:
    A, B = cases("key")
    held[A], held[B] = torch.ones(4, 32), torch.ones(32, 4)


CONFIGS = (
    Case(
        "P01", "r 8 in the config, 4 in the weights",
        f"{FILE}: rank of layer '{LAYER.format(0, 'query')}' differs from the config; found lora_A "
        "(4, 32), lora_B (32, 4), expected rank 8; correct r or rank_pattern",
        d.config(r=8),
    ),
    Case(
        "P02", "the same, with ignore_mismatched_sizes",
        "--ignore_mismatched_sizes: unknown flag; see pem merge --help",
        d.config(r=8),
        run=(("merge", "-a", "good", "bad", "-p", "out", "--ignore_mismatched_sizes"),),
    ),
    Case("P12", "no lora_alpha", missing("lora_alpha"), d.config(lora_alpha=d.REMOVED)),
    Case("P13", "no r", missing("r"), d.config(r=d.REMOVED)),
    Case("P14", "no use_rslora", lost("use_rslora"), d.config(use_rslora=d.REMOVED)),
    Case("P14b", "no use_dora", lost("use_dora"), d.config(use_dora=d.REMOVED)),
    Case(
        "P15", "config cut after 200 characters",
        f"{JSON}: not valid JSON: ... line ... column ...; restore the file from its source",
        d.config_text(lambda text: text[:200]),
    ),
    Case(
        "P16", "no peft_type",
        f"{JSON}: peft_type is missing; expected LORA or IA3; restore the config",
        d.config(peft_type=d.REMOVED),
    ),
    Case(
        "P17", "peft_type LORAX",
        f"{JSON}: peft_type cannot be represented; found 'LORAX', expected LORA or IA3",
        d.config(peft_type="LORAX"),
    ),
    Case(
        "P18", "typo lora_alfa",
        f"{JSON}: unknown key 'lora_alfa'; found 8, expected 'lora_alpha'; rename it",
        d.config(lora_alfa=8, lora_alpha=d.REMOVED),
    ),
    Case(
        "P19", "lora_alpha is text",
        f"{JSON}: lora_alpha; found '8', expected a number > 0; {CORRECT}",
        d.config(lora_alpha="8"),
    ),
    Case(
        "P20", "lora_alpha is NaN",
        f"{JSON}: not valid JSON: NaN is not a JSON number; restore the file from its source",
        d.config(lora_alpha=float("nan")),
    ),
    Case(
        "P21b", "r is a billion",
        f"{JSON}: r; found 1000000000, expected a whole number from 1 to 1000000; {CORRECT}",
        d.config(r=10**9), run=READERS[:3], memory=400 * 1024**2,
    ),
    Case(
        "P31", "target_modules is a catastrophic regular expression",
        SAME,
        d.config(target_modules="^(.*(a|a.)*)*x(.+)+.*(query|value)$"), run=ONE, code=0,
        check=is_bad,
    ),
    Case(
        "M11", "targets as a list in one module, as a regular expression in the other",
        "out = +1*good +0*bad  (...",
        d.config(target_modules=r".*\.(query|value)"),
        run=(("merge", "-a", "good", "bad", "-p", "out", "--coefficients", "1", "0"),), code=0,
        check=unchanged,
    ),
)  # fmt: skip

TENSORS = (
    Case(
        "P04", "one of the target modules is in no layer",
        f"{SAME}\nnote: bad: target_modules names 'nowhere', for which there is no tensor",
        d.config(target_modules=["query", "value", "nowhere"]), run=ONE, code=0, check=is_bad,
    ),
    Case(
        "P05", "tensors of other layers than the targets",
        f"{FILE}: extra tensors for layer '{LAYER.format(0, 'key')}'; found a layer target_modules "
        "does not name, expected target_modules ['query', 'value']; correct target_modules",
        d.renamed(lambda name: name.replace("query", "key")),
    ),
    Case(
        "P06", "tensors of one more layer",
        f"{FILE}: extra tensors for layer '{LAYER.format(0, 'key')}'; found a layer target_modules "
        "does not name, expected target_modules ['query', 'value']; correct target_modules",
        d.tensors(extra_layer),
    ),
    Case(
        "P07", "one layer lacks its tensors",
        SAME, d.drop("layer.0", "query"), run=ONE, code=0, check=is_bad,
    ),
    Case(
        "P08", "a tensor that belongs to nothing",
        f"{FILE}: extra tensor 'base_model.model.extra.weight'; found neither an adapter tensor "
        "nor in modules_to_save, expected modules_to_save ['classifier']; add its module to "
        "modules_to_save, or remove the tensor",
        d.add("base_model.model.extra.weight", torch.ones(2)),
    ),
    Case(
        "P09", "names without PEFT's prefix",
        f"{FILE}: tensor '...' lacks PEFT's prefix; found ..., expected base_model.model.; rename "
        "the tensors to base_model.model.<name>, or save the module with save_pretrained",
        d.renamed(lambda name: name.removeprefix("base_model.model.")),
    ),
    Case(
        "P09b", "names with a wrapper's prefix module.",
        SAME, d.renamed(lambda name: f"module.{name}"), run=ONE, code=0, check=is_wrapped,
    ),
    Case(
        "P22b", "int8 weights",
        f"{FILE}: tensor '{cases('query')[0]}' has a dtype that has no exact sum; found I8, "
        "expected F64, F32, F16, BF16; save the module in a floating dtype",
        d.add(cases("query")[0], torch.ones(4, 32, dtype=torch.int8)),
    ),
    Case(
        "P25", "lora_B all zero",
        f"note: bad changes nothing (untrained?)\n{SAME}",
        d.tensors(zeros), run=ONE, code=0, check=lambda here: None,
    ),
    Case(
        "P32", "no tensors for modules_to_save",
        f"{FILE}: missing tensors: modules_to_save names 'classifier'; found 0 head tensors, "
        "expected tensors of classifier; restore the file, or remove it from modules_to_save",
        d.drop("classifier"),
    ),
)  # fmt: skip

LIVE = (
    Case(
        "P03", "the model has none of the module's layers",
        f"layer {LAYER.format(0, 'query')}: not in GPT2LMHeadModel (4 of the module's 4 are not); "
        "found linear layers named attn.c_attn, attn.c_proj, ..., expected the module's names, "
        f"e.g. {LAYER.format(0, 'query')}, ...; load the base model that the module was trained on",
        run=lambda here: library.attach(model("gpt2", "CausalLM"), library.load("bad"),
                                        head="ignore"),
    ),
    Case(
        "P11", "RoBERTa module on a GPT-2",
        "module ours: belongs to another base model; found base (...), expected gpt2 (...); load "
        "its own base, or pass allow_base_mismatch=True",
        run=lambda here: library.attach(model("gpt2", "CausalLM"), library.load("ours"),
                                        head="ignore"),
    ),
    Case(
        "P10", "module of another base of the same shape, attached",
        "module ours: belongs to another base model; found base (...), expected base2 (...); load "
        "its own base, or pass allow_base_mismatch=True",
        run=attach("ours", to="base2"),
    ),
    Case(
        "P10a", "module of another base of the same shape, merged",
        "--model base2 and ours: base fingerprint differs; found ... in --model base2 and ... in "
        "ours, expected equal values; use modules of one base model, or --allow_base_mismatch if "
        "these are the same weights",
        run=(("merge", "-a", "ours", "-p", "out", "-m", "base2"),
             ("negation", "-a", "ours", "-p", "out", "-m", "base2")),
    ),
    Case(
        "P10b", "config names another base model",
        "good and bad: base model differs; found base in good and meta-llama/Meta-Llama-3-8B in "
        "bad, expected equal values; use modules of one base model, or --allow_base_mismatch if "
        "these are the same weights",
        d.config(base_model_name_or_path="meta-llama/Meta-Llama-3-8B"),
        run=(READERS[0],),
    ),
    Case(
        "P26", "a module under a name that is taken",
        "attachment 'default': the model already holds one of that name; detach it, swap its "
        "numbers, or choose another name",
        run=attach_twice(None),
    ),
    Case(
        "P26c", "the same, with another alpha",
        "attachment 'default': the model already holds one of that name; detach it, swap its "
        "numbers, or choose another name",
        run=attach_twice(99),
    ),
    Case(
        "P27", "attachment name with a dot",
        "attachment name: cannot be used; found 'a.b', expected a name without dots",
        run=attach("bad", to="base", name="a.b"),
    ),
    Case(
        "P28", "empty attachment name",
        "attachment name: cannot be used; found '', expected a name without dots",
        run=attach("bad", to="base", name=""),
    ),
    Case(
        "P29", "a name that is a path",
        "--adatasks: not a name; found '../../x', expected a plain name without '/', '\\' or '..'",
        run=(("merge", "-a", "good", "bad", "-p", "out", "-t", "../../x", "y"),
             ("negation", "-a", "bad", "-p", "out", "-t", "../../x")),
    ),
    Case(
        "P32b", "head of 3 labels on a model of 2",
        "head classifier.out_proj.bias: shapes differ; found (3,) in the module, expected (2,) in "
        "RobertaForSequenceClassification; load the model with the module's number of labels, or "
        "pass head='ignore'",
        run=attach("bad", to="base", num_labels=2, ignore_mismatched_sizes=True),
    ),
)  # fmt: skip
