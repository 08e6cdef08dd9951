"""pem fold, pem extract, and whole models in merge: what is printed, written and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.tiny_models import moved, random_module, tiny

from pem_composition.checkpoint import base_identity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a LoRA a, an (IA)^3 l, and models f and g tuned from the base."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny("llama").save_pretrained(root / "base")
    identity = base_identity(root / "base")
    for name, kind in (("a", "lora"), ("l", "ia3")):
        module = random_module(tiny("llama"), kind, seed=1)
        vectors = {n: t.abs() if n.endswith("ia3") else t for n, t in module.tensors.items()}
        replace(module, base=identity, tensors=vectors).save(root / name)
    for seed, name in enumerate("fg"):
        moved(tiny("llama"), seed).save_pretrained(root / name)
    return root


def test_fold_and_rebuild(folder: Path, tmp_path: Path, pem) -> None:
    out = tmp_path / "out"
    bindings = [w for n in "alf" for w in ("--module", f"{n}={folder / n}")]
    done = pem("fold", "-a + 0.5*l - f", *bindings, "-m", folder / "base", "-p", out)
    assert done.code == 0, done.err
    told, _, error = done.out.rstrip(")\n").rpartition(": ")
    assert told == (
        f"{out} = {folder / 'base'} -a + 0.5*l - f  (space delta, no head, error against the "
        "update in float64"
    )
    assert 0 < float(error) < 1e-6  # of float32
    assert pem("rebuild", out).out.startswith(f"{out}: equal, bit for bit\n")
    again = pem("fold", "a", *bindings[:2], "-m", folder / "base", "-p", out)
    assert "the output exists" in again.err
    assert pem("fold", "a", *bindings[:2], "-m", folder / "base", "-p", out, "-o").code == 0
    moved = folder.rename(folder.with_name("moved"))
    try:
        assert "input a" in pem("rebuild", out).err
        found = pem("rebuild", out, "--module", f"a={moved / 'a'}", "-m", moved / "base")
        assert found.code == 0, found
    finally:
        moved.rename(folder)


def test_extract_and_rebuild(folder: Path, tmp_path: Path, pem) -> None:
    out = tmp_path / "out"
    done = pem("extract", folder / "base", folder / "f", "-p", out, "--rank", "3")
    assert done.code == 0, done.err
    line, note = done.out.splitlines()
    assert line.startswith(f"{out} = +1*f  (space delta, error against sum c_i dW_i: 0.")
    assert note.startswith("note: 7 tensors that differ are left out, 0.")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    assert pem("rebuild", out).code == 0
    strict = pem(
        "extract", folder / "base", folder / "f", "-p", tmp_path / "s", "--rank", "3", "--strict"
    )
    assert (strict.code, strict.out) == (2, "")
    assert "7 tensors differ that the module cannot hold" in strict.err
    assert pem("extract", folder / "base", folder / "f", "-p", out, "--rank", "0").code == 2


def test_methods_on_whole_models(folder: Path, tmp_path: Path, program, pem) -> None:
    out = tmp_path / "out"
    whole = ("-a", folder / "f", folder / "g", "-m", folder / "base", "-p", out)
    done = program("merge", *whole, "-w", "ties", "--setting", "density=0.3")
    assert done.code == 0, done.err
    assert done.out.startswith(
        f"{out} = ties(f, g, density=0.3, election=total)  (space delta, no head, error against "
        "the method's own result: "
    )
    assert pem("rebuild", out).code == 0
    refused = program("merge", *whole, "-o", "-w", "tsv")
    assert (refused.code, "tsv" in refused.err) == (2, True)
    named = ("-t", "one", "two", "--coefficients", "0.5", "0.25")
    assert program("merge", *whole, *named).out.startswith(
        f"{out / 'one_two'} = +0.5*one +0.25*two  (space parameter, no head, error against the "
    )


def test_log_space_in_every_program(folder: Path, tmp_path: Path, program, pem) -> None:
    vectors = load_file(folder / "l" / "adapter_model.safetensors")

    def power(name: str) -> dict[str, float]:
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        return {
            round(float((found[n].double().log() / t.double().log()).median()), 4)
            for n, t in vectors.items()
        }

    two = ("-a", folder / "l", folder / "l", "--space", "log", "-p")
    line = "(space log, no head, error against prod l_i^c_i: "
    done = program("merge", *two, tmp_path / "merge", "--coefficients", "0.5", "0.75")
    assert line in done.out
    assert power("merge") == {1.25}
    program("negation", *two[:2], *two[3:], tmp_path / "negation", "--strength", "0.5")
    assert power("negation") == {-0.5}
    three = ("-a", *[folder / "l"] * 3, "--space", "log", "-p", tmp_path / "analogy")
    program("analogy", *three, "--coefficient", "0.25")
    assert power("analogy") == {0.25}
    bound = ("--module", f"l={folder / 'l'}", "--space", "log", "-p", tmp_path / "compose")
    pem("compose", "mean(l, 2*l) - negate(l)", *bound)
    assert power("compose") == {2.5}
    program("merge", *two, tmp_path / "grid", "--grid", "0", "0.5", "1")
    assert power("grid/0.5") == {1.0}
    for name in ("merge", "negation", "analogy", "compose", "grid/0.5"):
        assert json.loads((tmp_path / name / "pem.json").read_text())["space"] == "log"
        assert pem("rebuild", tmp_path / name).code == 0
