"""Heads beside a module on disk: there and back, in plain PEFT, names, damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import inputs_for, logits_of, random_module, tiny

from pem_composition import attach, load, save
from pem_composition.checkpoint import inspect_header
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule
from pem_composition.module import PEM, combine


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> PEM:
    """Two BERT modules with heads of their own, kept per task."""
    root = tmp_path_factory.mktemp("heads")
    for seed, name in ((1, "rte"), (2, "mnli")):
        random_module(tiny("bert"), seed=seed, head_seed=seed).save(root / name)
    modules = [load(root / "rte"), load(root / "mnli")]
    return combine(modules, [0.5, 0.5], head="per-task")


def test_heads_come_back_as_they_went(merged: PEM, tmp_path: Path) -> None:
    merged.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m" / "heads").iterdir()) == [
        "mnli.safetensors", "rte.safetensors",
    ]  # fmt: skip
    again = load(tmp_path / "m")
    assert list(again.heads) == ["rte", "mnli"]
    for name, head in merged.heads.items():
        assert again.heads[name].info == head.info
        for n, tensor in head.tensors.items():
            assert torch.equal(again.heads[name].tensors[n], tensor)
    header = inspect_header(tmp_path / "m")
    assert header.heads == {n: h.info for n, h in merged.heads.items()}
    again.save(tmp_path / "again")
    for file in ("adapter_model.safetensors", "heads/rte.safetensors", "heads/mnli.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()


def test_a_chosen_head_gives_the_logits_of_that_head(merged: PEM, tmp_path: Path) -> None:
    merged.save(tmp_path / "m")
    model = tiny("bert").double()
    for name, head in merged.heads.items():
        with attach(model, load(tmp_path / "m").with_head(name)):
            found = logits_of(model)
        with attach(model, merged.with_head(name)):
            assert torch.equal(logits_of(model), found)
        with attach(model, merged, head="ignore"), torch.no_grad():
            hidden = model.bert(**inputs_for(model)).pooler_output
        own = {n: t.double() for n, t in head.tensors.items()}
        expected = hidden @ own["classifier.weight"].T + own["classifier.bias"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_plain_peft_opens_it_without_looking_at_the_heads(merged: PEM, tmp_path: Path) -> None:
    from peft import PeftModel

    merged.save(tmp_path / "m")
    model = tiny("bert").double()
    with attach(model, merged, head="ignore"):
        expected = logits_of(model)
    opened = PeftModel.from_pretrained(tiny("bert"), tmp_path / "m").eval().double()
    torch.testing.assert_close(logits_of(opened), expected, rtol=1e-9, atol=1e-9)


def test_a_chosen_head_saved_is_a_plain_peft_module_with_that_head(
    merged: PEM, tmp_path: Path
) -> None:
    merged.with_head("mnli").save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert not (tmp_path / "m" / "heads").exists()
    tensors = load_file(tmp_path / "m" / "adapter_model.safetensors")
    key = "base_model.model.classifier.weight"
    assert torch.equal(tensors[key], merged.heads["mnli"].tensors["classifier.weight"])


def test_dtype_and_overwriting_count_for_heads_too(merged: PEM, tmp_path: Path) -> None:
    merged.save(tmp_path / "m", dtype="bfloat16")
    head = load_file(tmp_path / "m" / "heads" / "rte.safetensors")
    assert {t.dtype for t in head.values()} == {torch.bfloat16}
    merged.with_head("rte").save(tmp_path / "m", overwrite=True)
    assert not (tmp_path / "m" / "heads").exists()
    rounded = combine([merged], [1.0], head="first", dtype="bfloat16")
    assert rounded.heads["rte"].tensors["classifier.weight"].dtype == torch.bfloat16


def test_a_changed_head_is_caught(merged: PEM, tmp_path: Path) -> None:
    merged.save(tmp_path / "m")
    path = tmp_path / "m" / "heads" / "rte.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"heads/rte.safetensors: changed since") as error:
        load(tmp_path / "m")
    assert "found" in str(error.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rte.safetensors: no such file"):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", ["../rte", "a/b", ".x", "", "a" * 200])
def test_a_name_in_a_record_never_becomes_a_path(merged: PEM, tmp_path: Path, name: str) -> None:
    merged.save(tmp_path / "m")
    path = tmp_path / "m" / "pem.json"
    record = json.loads(path.read_text())
    record["heads"] = {name: record["heads"]["rte"]}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"pem.json: malformed.*is no name of a head"):
        load(tmp_path / "m")


def test_the_reference_layout_holds_one_head(merged: PEM, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModule, match=r"heads kept beside it \(rte, mnli\).*one head"):
        merged.save(tmp_path / "m", format="adapter-transformers")
    assert not (tmp_path / "m").exists()
    with pytest.raises(PEMError, match="no plain name"):
        PEM(
            merged.tensors, merged.config, heads={"a/b": merged.heads["rte"]}
        ).save(tmp_path / "m")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_keeps_heads_beside_it_too(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "rte", "mnli")):
        tiny("bert", seed=seed).save_pretrained(tmp_path / name)
    modules = [load(tmp_path / n, base=tmp_path / "base") for n in ("rte", "mnli")]
    merged = combine(modules, [0.5, 0.5], head="per-task")
    save(merged, tmp_path / "m", base=tmp_path / "base")
    again = load(tmp_path / "m", base=tmp_path / "base")
    assert list(again.heads) == ["rte", "mnli"]
    chosen = again.with_head("mnli").head_tensors()
    assert torch.equal(chosen["classifier.weight"], modules[1].head_tensors()["classifier.weight"])
