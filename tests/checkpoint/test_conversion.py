"""Conversions: golden modules there and back bit for bit, dtypes, heads, shards, pickled models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import inputs_for, logits_of, random_module, tiny
from transformers import AutoModelForSequenceClassification

from pem_composition import load
from pem_composition.checkpoint import inspect_header
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule
from pem_composition.module import combine

REFERENCE = [
    f"{family}_{kind}_{i}/task{i}"
    for family in ("roberta", "t5", "gpt2")
    for kind in ("lora", "ia3")
    for i in (1, 2)
]
PEFT = [f"roberta_{kind}_1" for kind in ("lora", "rslora", "ia3")] + ["llama_lora_2"]
BINS = ("pytorch_adapter.bin", "pytorch_model_head.bin")


@pytest.mark.parametrize("name", REFERENCE)
def test_a_module_of_the_reference_there_and_back(name: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "adapter_transformers" / name
    convert(golden, tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / golden.name, format="adapter-transformers")
    for file in BINS:
        old, new = (
            torch.load(p / file, weights_only=True) for p in (golden, tmp_path / golden.name)
        )
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) for k in old)
    for file in ("adapter_config.json", "head_config.json"):
        old, new = (json.loads((p / file).read_text()) for p in (golden, tmp_path / golden.name))
        assert old == new
    assert rebuild(tmp_path / golden.name).equal
    (source,) = load(tmp_path / "peft").provenance.sources
    notes = json.loads((tmp_path / "peft" / "pem.json").read_text())["notes"]
    assert notes == ["converted from the adapter-transformers layout (pytorch_adapter.bin)"]
    assert source.sha256 is not None


@pytest.mark.parametrize("name", [n for n in PEFT if n != "roberta_ia3_1"])
def test_a_module_of_peft_keeps_its_bits(name: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "peft" / name
    convert(golden, tmp_path / "again")
    old, new = (load_file(p / "adapter_model.safetensors") for p in (golden, tmp_path / "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)


def test_peft_to_the_reference_and_back(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "peft" / "roberta_lora_1"
    convert(golden, tmp_path / "at", format="adapter-transformers")
    convert(tmp_path / "at", tmp_path / "back")
    a, b = load(golden), load(tmp_path / "back")
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert [a.config.scaling(n) for n in a.layers] == [b.config.scaling(n) for n in b.layers]
    with pytest.raises(UnsupportedModule, match="does not cover this model"):
        convert(shared / "golden" / "peft" / "llama_lora_2", tmp_path / "x",
                format="adapter-transformers")  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_stored_dtypes_are_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    module = random_module(tiny("bert"), seed=1, head_seed=1)
    module.save(tmp_path / "in")
    path = tmp_path / "in" / "adapter_model.safetensors"
    tensors = load_file(path)
    mixed = {k: t.bfloat16() if "lora" in k else t for k, t in tensors.items()}
    save_file(mixed, path)
    (tmp_path / "in" / "pem.json").unlink()
    convert(tmp_path / "in", tmp_path / "same")
    found = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in mixed.items())
    convert(tmp_path / "in", tmp_path / "half", dtype="float16")
    found = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert all(torch.equal(found[k], t.to(torch.float16)) for k, t in mixed.items())
    assert rebuild(tmp_path / "half").equal


def test_heads_and_training_record_go_along(tmp_path: Path) -> None:
    model = tiny("bert")
    for seed, name in ((1, "rte"), (2, "mnli")):
        random_module(model, seed=seed, head_seed=seed).save(tmp_path / name)
    merged = combine([load(tmp_path / n) for n in ("rte", "mnli")], [1, 1], head="per-task",
                     dtype="bfloat16")  # fmt: skip
    merged.save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "c")
    for file in ("adapter_model.safetensors", "heads/rte.safetensors", "heads/mnli.safetensors"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    assert load(tmp_path / "c").heads["rte"].info == merged.heads["rte"].info
    with pytest.raises(UnsupportedModule, match="heads kept beside it"):
        convert(tmp_path / "m", tmp_path / "x", format="adapter-transformers")


def test_a_pickled_module_becomes_safetensors(tmp_path: Path) -> None:
    module = random_module(tiny("bert"), seed=1, head_seed=1)
    module.save(tmp_path / "in")
    path = tmp_path / "in" / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "in" / "adapter_model.bin")
    expected = path.read_bytes()
    path.unlink()
    (tmp_path / "in" / "pem.json").unlink()
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == expected


# --- whole models ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bert"
    tiny("bert").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            out |= {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    return out


def same(a: Path, b: Path) -> bool:
    x, y = tensors_of(a), tensors_of(b)
    return x.keys() == y.keys() and all(
        torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x
    )


def test_a_model_into_shards_and_back(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "one")
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert same(model, tmp_path / "shards")
    assert same(model, tmp_path / "one")
    for folder in ("shards", "one"):
        assert rebuild(tmp_path / folder).equal
        assert (tmp_path / folder / "tokenizer.json").read_text() == "{}"
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config == json.loads((model / "config.json").read_text())
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "shards").eval()
    with torch.no_grad():
        assert torch.equal(logits_of(opened), logits_of(tiny("bert"), inputs_for(opened)))


def test_a_pickled_model_is_read_safely_and_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = tiny("t5")
    model.save_pretrained(tmp_path / "t5")
    expected = tensors_of(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "t5" / "pytorch_model.bin")
    convert(tmp_path / "t5", tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], t) for k, t in expected.items())


def test_a_model_in_another_dtype(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "half", dtype="bfloat16")
    expected = {k: t.bfloat16() for k, t in tensors_of(model).items()}
    found = tensors_of(tmp_path / "half")
    assert all(torch.equal(found[k], t) for k, t in expected.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    convert(tmp_path / "half", tmp_path / "again")
    assert same(tmp_path / "half", tmp_path / "again")
    assert {i.dtype for i in inspect_header(tmp_path / "again").infos.values()} == {"BF16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "adapter-transformers"}, "a full model has one layout"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_what_a_model_cannot_become_is_refused(
    options: dict, message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(PEMError, match=message):
        convert(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_refusals_leave_nothing_behind(model: Path, tmp_path: Path) -> None:
    random_module(tiny("bert"), seed=1).save(tmp_path / "m")
    with pytest.raises(PEMError, match="only full models are written in shards"):
        convert(tmp_path / "m", tmp_path / "out", max_shard_bytes=10)
    tensors = tensors_of(model)
    tensors["classifier.bias"][0] = float("nan")
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    (tmp_path / "bad" / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"'classifier.bias' is not finite"):
        convert(tmp_path / "bad", tmp_path / "out")
    convert(tmp_path / "m", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        convert(tmp_path / "m", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "m", "out"]
