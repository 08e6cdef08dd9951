"""Folders laid out as the hub's cache, and folders that hold a module one level down."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import random_module, tiny

import pem_composition as pem
from pem_composition.checkpoint import combine_full, extract_lora, fold_checkpoint
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.provenance import find_base
from pem_composition.errors import CheckpointError
from pem_composition.evaluation.model_names import resolve

COMMIT, OLD = "0f" * 20, "1a" * 20


def cached(folder: Path, root: Path, commit: str = COMMIT, *, main: bool = True) -> Path:
    """The folder as the hub's client keeps it: names that lead to blobs, beside refs."""
    model = root / f"models--org--{folder.name}"
    (model / "blobs").mkdir(parents=True, exist_ok=True)
    (model / "refs").mkdir(exist_ok=True)
    for file in (p for p in folder.rglob("*") if p.is_file()):
        blob = model / "blobs" / f"{commit[:4]}{len(list((model / 'blobs').iterdir()))}"
        shutil.copy(file, blob)
        link = model / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(
            Path(*[".."] * (len(link.relative_to(model).parts) - 1), "blobs", blob.name)
        )
    if main:
        (model / "refs" / "main").write_text(commit)
    return model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "m1"), start=3):
        tiny("gpt2", seed=seed).save_pretrained(tmp_path / "in" / name)
    random_module(tiny("gpt2")).save(tmp_path / "in" / "lora")
    return tmp_path / "in"


def equal(a: Path, b: Path) -> bool:
    names = [p.name for p in a.glob("*.safetensors")]
    return bool(names) and all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


@pytest.mark.parametrize("form", ["model", "snapshot", "subfolder"])
def test_a_folder_of_the_cache_is_the_folder_that_it_holds(
    form: str, plain: Path, tmp_path: Path
) -> None:
    place = {}
    for name in ("base", "m1", "lora"):
        if form == "subfolder":
            shutil.copytree(plain / name, tmp_path / "deep" / name / "sub")
            model = cached(tmp_path / "deep" / name, tmp_path / "hub")
            place[name] = model / "snapshots" / COMMIT / "sub"
        else:
            model = cached(plain / name, tmp_path / "hub")
            place[name] = model if form == "model" else model / "snapshots" / COMMIT
    for where, own in (("a", {n: plain / n for n in place}), ("b", place)):
        out = tmp_path / where
        combine_full([own["m1"], own["base"]], [0.5, 0.5], out / "merge")
        combine_full([own["m1"]], [0.5], out / "around", base=own["base"])
        fold_checkpoint("m", {"m": own["lora"]}, own["base"], out / "fold")
        extract_lora(own["base"], own["m1"], rank=2).save(out / "extract")
        convert(own["m1"], out / "convert")
        pem.load(own["m1"], base=own["base"]).save(out / "back")
        (0.5 * pem.load(own["lora"])).save(out / "module")
    results = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(results) == 7
    assert all(equal(tmp_path / "a" / n, tmp_path / "b" / n) for n in results)
    assert (Path(resolve(place["base"])) / "config.json").is_file()


def test_the_snapshot_is_the_one_that_main_names_or_the_only_one(
    plain: Path, tmp_path: Path
) -> None:
    model = cached(plain / "base", tmp_path, OLD, main=False)
    assert find_base(str(model)) == model / "snapshots" / OLD
    cached(plain / "base", tmp_path, COMMIT, main=False)
    for read in (find_base, pem.load, resolve):
        with pytest.raises(CheckpointError, match="which snapshot to read") as error:
            read(str(model))
        assert OLD in str(error.value) and f"give one of {model / 'snapshots'}" in str(error.value)
    (model / "refs" / "main").write_text(f"{COMMIT}\n")
    assert find_base(str(model)) == model / "snapshots" / COMMIT


def test_a_link_out_of_the_cache_is_refused_still(plain: Path, tmp_path: Path) -> None:
    model = cached(plain / "lora", tmp_path / "hub")
    link = model / "snapshots" / COMMIT / "adapter_model.safetensors"
    link.unlink()
    link.symlink_to(plain / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        pem.load(model)


def test_a_named_adapter_as_peft_writes_it_is_read_and_of_several_one_is_asked_for(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(tiny("gpt2"), config, adapter_name="one")
    model.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert (
        pem.load(tmp_path / "run").tensors.keys()
        == pem.load(tmp_path / "run" / "one").tensors.keys()
    )
    model.add_adapter("two", config)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match="several modules in subfolders") as error:
        pem.load(tmp_path / "run")
    assert f"e.g. {tmp_path / 'run' / 'two'}" in str(error.value)


@pytest.mark.parametrize("kind", ["lora", "m1"])
def test_of_a_run_with_checkpoints_only_one_is_read_and_several_are_named_in_order(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain / kind, run / "checkpoint-500")
    base = None if kind == "lora" else plain / "base"
    assert pem.load(run, base=base).tensors
    shutil.copytree(plain / kind, run / "checkpoint-1000")
    with pytest.raises(CheckpointError, match="found checkpoint-500, checkpoint-1000") as error:
        pem.load(run, base=base)
    assert f"e.g. {run / 'checkpoint-1000'}" in str(error.value)
