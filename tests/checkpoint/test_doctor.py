"""The doctor: every finding with both values, and verdicts that agree with the programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import random_module, tiny

from pem_composition import load
from pem_composition.checkpoint.doctor import Diagnosis, diagnose
from pem_composition.config import BaseIdentity, HeadInfo, IA3Config
from pem_composition.errors import PEMError
from pem_composition.module import PEM, combine
from pem_composition.record import Provenance

BASE = BaseIdentity("org/base", "f" * 64, "bert", 32)


def module(kind: str = "lora", *, seed: int = 1, name: str = "bert", **options) -> PEM:
    made = random_module(tiny(name), kind, seed=seed, head_seed=seed, **options)
    origin = Provenance(init="1" * 64)
    return replace(
        made, base=BASE, head=replace(made.head, labels=("a", "b", "c")), provenance=origin
    )


def change(made: PEM, **fields: object) -> PEM:
    return replace(made, **fields)


A = module()
EMBEDDED = {"bert.embeddings.word_embeddings.weight.head": torch.zeros(96, 32)}
LARGER = {"bert.embeddings.word_embeddings.weight.head": torch.zeros(98, 32)}
CASES: dict[str, tuple[PEM, PEM, str, str, tuple[bool, bool]]] = {
    # what differs: modules, severity, words of the finding, (parameter, delta) accept
    "kind": (A, module("ia3", seed=2), "error", "kind differs", (False, False)),
    "rank": (A, module(seed=2, r=6, alpha=9), "warning", "rank r differs", (False, True)),
    "alpha": (A, module(seed=2, alpha=9), "warning", "scaling differs", (False, True)),
    "rslora": (
        A, module(seed=2, use_rslora=True), "warning", "rsLoRA and plain LoRA are mixed",
        (False, True),
    ),
    "targets": (
        A, module(seed=2, target_modules=("query",)), "warning", "adapted layers differ",
        (False, True),
    ),
    "fingerprint": (
        A, change(module(seed=2), base=replace(BASE, fingerprint="e" * 64)), "error",
        "base fingerprint differs", (False, False),
    ),
    "base by name": (
        A, change(module(seed=2), base=BaseIdentity("org/other", None, "bert", 32)), "error",
        "base model differs by name", (False, False),
    ),
    "base unknown": (
        A, change(module(seed=2), base=BaseIdentity("org/base", None, "bert", 32)), "note",
        "the base's weights are not recorded", (True, True),
    ),
    "model type": (
        A, change(module(seed=2), base=replace(BASE, model_type="roberta")), "error",
        "base model type differs", (False, False),
    ),
    "initialisation": (
        A, change(module(seed=2), provenance=Provenance(init="2" * 64)), "warning",
        "initialisations differ", (True, True),
    ),
    "initialisation unknown": (
        A, change(module(seed=2), provenance=Provenance()), "note", "initialisation unknown",
        (True, True),
    ),
    "labels": (
        A, change(module(seed=2), head=HeadInfo(("c", "b", "a"), "classification")), "warning",
        "labels differ", (True, True),
    ),
    "no head": (
        A, change(module(seed=2), tensors=module(seed=2).adapter_tensors(), head=None), "note",
        "not every module has a head", (True, True),
    ),
    "placement": (
        module("ia3"), change(module("ia3", seed=2), config=IA3Config(
            module("ia3").config.target_modules, ())), "error", "(IA)^3 placement differs",
        (False, False, False),
    ),
    "embeddings": (
        change(A, tensors=dict(A.tensors) | EMBEDDED),
        change(module(seed=2), tensors=dict(module(seed=2).tensors) | LARGER), "warning",
        "embedding sizes differ", (True, True),
    ),
    "saved parameters": (
        A, change(module(seed=2), tensors=dict(module(seed=2).tensors) | EMBEDDED), "warning",
        "saves whole parameters of the base", (True, True),
    ),
}  # fmt: skip


def written(folder: Path, *modules: PEM) -> list[Path]:
    paths = [folder / name for name in "xyz"[: len(modules)]]
    for path, made in zip(paths, modules, strict=True):
        made.save(path)
    return paths


def severities(found: Diagnosis) -> dict[str, str]:
    return {f.what: f.severity for f in found.findings}


@pytest.mark.parametrize("name", CASES)
def test_every_difference_is_found_with_its_values(name: str, tmp_path: Path) -> None:
    first, second, severity, words, accepts = CASES[name]
    paths = written(tmp_path, first, second)
    found = diagnose(paths, ["x", "y"])
    (hit,) = [f for f in found.findings if f.what.startswith(words)]
    assert hit.severity == severity
    assert set(hit.values) <= {"x", "y"}
    assert hit.do or severity == "note"
    assert tuple(reason is None for reason in found.refused.values()) == accepts


def test_delta_space_is_no_remedy_where_it_refuses(tmp_path: Path) -> None:
    """The kind, the size of a layer or the names of layers can stand against every space."""
    ranked = module(seed=2, r=6, alpha=9)
    bare = {n.removeprefix("bert."): t for n, t in ranked.adapter_tensors().items()}
    narrow = {n: t[:, :8] if "lora_A" in n else t for n, t in ranked.adapter_tensors().items()}
    others = {
        "kind": module("ia3", seed=2, target_modules=("query",)),
        "size": change(ranked, tensors=narrow, head=None),
        "spelling": change(ranked, tensors=bare, head=None),
    }
    for name, other in others.items():
        (tmp_path / name).mkdir()
        found = diagnose(written(tmp_path / name, A, other), ["x", "y"])
        assert found.refused["delta"], name
        remedies = [f.do for f in found.findings if "--space delta" in f.do]
        assert not remedies, name
        assert any(f.severity == "warning" for f in found.findings), name


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_that_of_the_sum_itself(name: str, tmp_path: Path) -> None:
    first, second, *_ = CASES[name]
    paths = written(tmp_path, first, second)
    found = diagnose(paths, ["x", "y"])
    for space, reason in found.refused.items():
        modules = [load(p) for p in paths]
        try:
            combine(modules, [1, 1], space=space, head="none")
        except PEMError as error:
            assert reason == str(error)
        else:
            assert reason is None


def test_modules_that_fit_give_no_finding(tmp_path: Path) -> None:
    found = diagnose(written(tmp_path, A, module(seed=2)), ["x", "y"])
    assert found.findings == ()
    assert found.compatible
    assert found.heads == ("average", "first", "last", "none", "per-task", "concat")


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    other = change(
        module(seed=2, r=6, use_rslora=True), base=replace(BASE, fingerprint="e" * 64),
        provenance=Provenance(init="2" * 64),
    )  # fmt: skip
    found = severities(diagnose(written(tmp_path, A, other), ["x", "y"]))
    assert list(found.values()) == sorted(found.values(), key=["error", "warning", "note"].index)
    assert len([w for w in found if "differ" in w or "mixed" in w]) >= 4


def test_a_module_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    paths = written(tmp_path, A, module(seed=2, r=6), module(seed=3))
    config = json.loads((paths[2] / "adapter_config.json").read_text())
    (paths[2] / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (paths[2] / "pem.json").unlink()
    found = diagnose([*paths, tmp_path / "nowhere"], ["x", "y", "z", "w"])
    unreadable = {
        n: v for f in found.findings if f.severity == "error" for n, v in f.values.items()
    }
    assert unreadable.keys() == {"z", "w"}
    assert "DoRA" in unreadable["z"]
    assert "no such directory" in unreadable["w"]
    assert not found.compatible
    assert "rank r differs" in severities(found)


def test_layers_of_different_size_are_found_in_the_headers(tmp_path: Path) -> None:
    wide = {n: torch.cat([t, t], 0 if n.endswith("lora_B") else 1) if "lora" in n else t
            for n, t in module(seed=2).tensors.items()}  # fmt: skip
    found = diagnose(written(tmp_path, A, change(module(seed=2), tensors=wide)), ["x", "y"])
    assert not found.compatible
    assert "the updates have different sizes" in found.refused["delta"]


def test_the_base_model_is_compared_by_its_weights(tmp_path: Path) -> None:
    from pem_composition.checkpoint import base_identity

    for seed, name in ((0, "base"), (5, "other")):
        tiny("bert", seed=seed).save_pretrained(tmp_path / name)
    own = base_identity(tmp_path / "base")
    paths = written(tmp_path, change(A, base=own), change(module(seed=2), base=own))
    assert diagnose(paths, ["x", "y"], model=str(tmp_path / "base")).findings == ()
    found = diagnose(paths, ["x", "y"], model=str(tmp_path / "other"))
    assert [f.what for f in found.findings] == ["base fingerprint differs"] * 2
    assert not found.compatible
    allowed = diagnose(paths, ["x", "y"], model=str(tmp_path / "other"), allow_base_mismatch=True)
    assert allowed.compatible
    assert {f.severity for f in allowed.findings} == {"warning"}
    unknown = diagnose(paths, ["x", "y"], model="org/nowhere")
    assert any("neither a model folder" in f.what for f in unknown.findings)


def test_tokenizers_are_compared_by_their_tokens(tmp_path: Path) -> None:
    paths = written(tmp_path, A, module(seed=2))
    words = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<x>"}]}
    for path in paths:
        (path / "tokenizer.json").write_text(json.dumps(words | {"padding": path.name}))
    assert diagnose(paths, ["x", "y"]).findings == ()
    larger = words | {"added_tokens": [{"id": 2, "content": "<x>"}, {"id": 3, "content": "<y>"}]}
    (paths[1] / "tokenizer.json").write_text(json.dumps(larger))
    (found,) = diagnose(paths, ["x", "y"]).findings
    assert found.what == "tokenizers differ"
    assert found.values["x"].startswith("2 tokens, 1 added")
    assert found.values["y"].startswith("2 tokens, 2 added")


def test_one_module_given_twice_and_notes_of_its_record(tmp_path: Path) -> None:
    (path,) = written(tmp_path, change(A, provenance=Provenance(notes=("its purpose",))))
    found = {f.what: f.values for f in diagnose([path, path], ["x", "y"]).findings}
    assert found["one module given twice"] == {"x, y": str(path)}
    assert found["recorded"] == {"y": "its purpose"}


def test_the_doctor_needs_no_torch(tmp_path: Path) -> None:
    paths = written(tmp_path, A, module(seed=2, r=6))
    tiny("bert").save_pretrained(tmp_path / "base")
    code = (
        "import sys; from pem_composition.checkpoint.doctor import diagnose;"
        "diagnose(sys.argv[1:3], ['x', 'y'], model=sys.argv[3]);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    command = [sys.executable, "-c", code, *map(str, paths), str(tmp_path / "base")]
    subprocess.run(command, check=True, env={**os.environ})
