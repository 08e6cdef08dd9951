"""A whole model that changed since it was written is refused by every program that reads it, and
what a result records of a sharded input covers every shard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_models import random_module, tiny

import pem_composition as pem
from pem_composition.checkpoint import combine_full, extract_lora, fold_checkpoint
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.errors import CheckpointError
from pem_composition.evaluation.models import load_causal

SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole models in shards, as this package writes them: a base and two tuned ones; a module."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "m1", "m2"), start=10):
        tiny("gpt2", seed=seed).save_pretrained(root / f"{name}-as-it-came")
        convert(root / f"{name}-as-it-came", root / name, max_shard_bytes=SHARD_BYTES)
    random_module(tiny("gpt2")).save(root / "lora")
    return root


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "in", copy_function=os.link)
    return tmp_path / "in"


def damage(folder: Path, shard: int = -1) -> Path:
    """One byte of one weight, as a disk does it."""
    path = sorted(folder.glob("model-*.safetensors"))[shard]
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.unlink()  # the name alone: other names are those of undamaged copies
    path.write_bytes(data)
    return path


READERS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "sum": ("m1", lambda i, o: combine_full([i / "m1", i / "m2"], [0.5, 0.5], o)),
    "sum, second": ("m2", lambda i, o: combine_full([i / "m1", i / "m2"], [0.5, 0.5], o)),
    "sum, base": (
        "base", lambda i, o: combine_full([i / "m1", i / "m2"], [1, 1], o, base=i / "base"),
    ),
    "method": (
        "m2",
        lambda i, o: combine_full(
            [i / "m1", i / "m2"], [1, 1], o, base=i / "base", method="ties"
        ),
    ),
    "fold, base": (
        "base", lambda i, o: fold_checkpoint("a", {"a": i / "lora"}, i / "base", o),
    ),
    "fold, model": (
        "m1", lambda i, o: fold_checkpoint("-1*a", {"a": i / "m1"}, i / "base", o),
    ),
    "extract, base": ("base", lambda i, o: extract_lora(i / "base", i / "m1", rank=2).save(o)),
    "extract, model": ("m1", lambda i, o: extract_lora(i / "base", i / "m1", rank=2).save(o)),
    "convert": ("m1", lambda i, o: convert(i / "m1", o)),
    "load": ("m1", lambda i, o: pem.load(i / "m1", base=i / "base").save(o)),
    "load, base": ("base", lambda i, o: pem.load(i / "m1", base=i / "base").save(o)),
    "evaluate": ("m1", lambda i, o: load_causal(i / "m1")),
}  # fmt: skip


@pytest.mark.parametrize("shard", [0, -1])
@pytest.mark.parametrize("reader", READERS)
def test_a_shard_that_changed_since_it_was_written_is_refused(
    reader: str, shard: int, models: Path, tmp_path: Path
) -> None:
    name, read = READERS[reader]
    path = damage(models / name, shard)
    with pytest.raises(CheckpointError, match="changed since it was written") as error:
        read(models, tmp_path / "out")
    assert path.name in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]  # nothing is left, of any name


def test_a_module_in_memory_is_not_written_onto_a_damaged_base(
    models: Path, tmp_path: Path
) -> None:
    module = pem.load(models / "m1", base=models / "base")
    module = replace(
        module, base=replace(module.base, fingerprint=None)
    )  # it samples, and is quick
    damage(models / "base")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        module.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", [r for r in READERS if r != "evaluate"])
def test_undamaged_models_are_read(reader: str, models: Path, tmp_path: Path) -> None:
    READERS[reader][1](models, tmp_path / "out")
    assert (tmp_path / "out" / "pem.json").is_file()


def test_a_changed_model_is_read_once_its_record_is_gone(models: Path, tmp_path: Path) -> None:
    damage(models / "m1")
    (models / "m1" / "pem.json").unlink()
    combine_full([models / "m1", models / "m2"], [0.5, 0.5], tmp_path / "out")


def content(folder: Path) -> str:
    """sha256 over the lines "name sha256" of weights and configuration."""
    names = sorted(p.name for p in (*folder.glob("*.safetensors"), folder / "config.json"))
    digests = (hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names)
    lines = [f"{n} {d}" for n, d in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("reader", ["sum", "method", "fold, model", "extract, model", "convert"])
def test_the_record_of_a_sharded_input_covers_every_shard(
    reader: str, models: Path, tmp_path: Path
) -> None:
    for name in ("m1", "m2"):
        (models / name / "pem.json").unlink()  # as from elsewhere: only the result's record knows
    READERS[reader][1](models, tmp_path / "out")
    sources = json.loads((tmp_path / "out" / "pem.json").read_text())["sources"]
    for source in sources:
        assert source["content"] == content(Path(source["path"]))
        assert Path(source["path"]).name.startswith("m")
    assert rebuild(tmp_path / "out").equal
    damage(models / "m1", 0)  # the index stays as it was
    with pytest.raises(CheckpointError, match=r"input (m1|a): ") as error:
        rebuild(tmp_path / "out")
    assert "has changed: configuration or a shard" in str(error.value)
