"""pem.json is read back, a changed file is noticed, fingerprints tell models apart."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pem_composition.checkpoint import (
    base_identity,
    inspect_header,
    load,
    provenance,
)
from pem_composition.checkpoint.content import content_digest
from pem_composition.config import BaseIdentity, IA3Config
from pem_composition.errors import CheckpointError
from pem_composition.module import PEM, HeadInfo
from pem_composition.record import Certificate, Provenance, Source, Term, initialisation_fingerprint
from pem_composition.safe_files import sha256_file

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def module() -> PEM:
    tensors = {f"m.layers.{i}.k.ia3": torch.rand(5) for i in range(2)}
    return PEM(
        tensors | {"lm_head.weight.head": torch.rand(7, 5)},
        IA3Config(("k",)),
        BaseIdentity("org/base", "a" * 64, "llama", 5),
        "mix",
        HeadInfo(("a", "b"), "causal_lm", {"x": 1}),
        Provenance(
            terms=(Term(0.3, "a"), Term(-0.7, "b|c`d")),
            sources=(Source("a", "runs/a", "1" * 64, "i" * 64), Source("b")),
            space="parameter",
            method="sum",
            certificate=Certificate(0.25, {"m.layers.0.k": 0.5}),
            init="i" * 64,
            head_policy="average",
            training={"steps": 3},
            notes=("a note",),
        ),
    )


def test_every_field_is_read_back(module: PEM, tmp_path: Path) -> None:
    module.save(tmp_path / "m")
    record = provenance.read(tmp_path / "m")
    assert record is not None
    assert record.provenance == module.provenance == inspect_header(tmp_path / "m").provenance
    assert (record.base, record.head, record.kind) == (module.base, module.head, "ia3")
    assert record.expression == "+0.3*a -0.7*b|c`d"
    assert record.files == {
        f: sha256_file(tmp_path / "m" / f) for f in ("adapter_config.json", WEIGHTS)
    }
    raw = json.loads((tmp_path / "m" / "pem.json").read_text())
    assert raw["versions"]["torch"] == torch.__version__


def test_a_loaded_module_is_one_source_and_notes_what_it_was_made_of(
    module: PEM, tmp_path: Path
) -> None:
    module.save(tmp_path / "m")
    again = load(tmp_path / "m")
    (source,) = again.provenance.sources
    assert source == Source(
        "m", str(tmp_path / "m"), sha256_file(tmp_path / "m" / WEIGHTS), "i" * 64,
        content_digest(tmp_path / "m"),
    )  # fmt: skip
    assert str(again) == "m"
    assert again.provenance.notes[-1] == "m was made as +0.3*a -0.7*b|c`d in parameter space"
    assert str(0.25 * again) == "+0.25*m"


def test_the_card_is_one_table_whatever_the_names_are(module: PEM, tmp_path: Path) -> None:
    module.save(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "peft"\nbase_model: "org/base"\n')
    assert "+0.3*a -0.7*b/c'd" in card
    assert "| a | `" + "1" * 64 + "` |" in card
    assert "0.25" in card


def test_a_flipped_bit_is_caught_and_both_sums_named(module: PEM, tmp_path: Path) -> None:
    module.save(tmp_path / "m")
    path = tmp_path / "m" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since it was written") as error:
        load(tmp_path / "m")
    recorded = json.loads((tmp_path / "m" / "pem.json").read_text())["files"][WEIGHTS]
    assert f"found {sha256_file(path)[:16]}" in str(error.value)
    assert f"expected {recorded[:16]}" in str(error.value)
    assert "delete pem.json" in str(error.value)
    (tmp_path / "m" / "pem.json").unlink()
    assert load(tmp_path / "m").kind == "ia3"


def test_a_changed_config_is_caught(module: PEM, tmp_path: Path) -> None:
    module.save(tmp_path / "m")
    config = tmp_path / "m" / "adapter_config.json"
    config.write_text(config.read_text().replace("org/base", "org/case"))
    for read in (load, inspect_header):
        with pytest.raises(CheckpointError, match=r"adapter_config.json: changed since"):
            read(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "format_version; found 3, expected 1 or 2"),
        ({"kind": "lora"}, "another module"),
        ({"terms": [{"x": 1}]}, "malformed"),
        ({"sources": "x"}, "malformed"),
        ({"base": {"x": 1}}, "malformed"),
        ({"files": {"a": 1}}, "malformed"),
        ({"space": 3}, "malformed"),
        ({"head": 5}, "malformed"),
        ({"format_version": True}, "format_version; found True"),
        ({"space": "sum"}, "space must be parameter or delta or log, found 'sum'"),
        ({"head_policy": "mean"}, "head_policy must be average or .*, found 'mean'"),
        ({"written": {"format": "gguf"}}, "format must be peft or .*, found 'gguf'"),
        ({"written": {"dtype": "int8"}}, "dtype must be float32 or .*, found 'int8'"),
        ({"base": {"hidden_size": 0}}, "hidden_size must be from 1 to inf, found 0"),
        ({"certificate": {"total": -1, "layers": {}}}, "total must be from 0 to inf, found -1.0"),
        ({"certificate": {"total": 0, "layers": {"l": -0.5}}}, "l must be from 0 to inf, found"),
        ({"certificate": {"total": 0, "layers": {"l": "x"}}}, "l must be of type float"),
        ({"certificate": {"total": 0, "layers": {}, "kept_energy": 2}}, "from 0 to 1, found 2.0"),
        ({"head": {"labels": "ab", "problem": None}}, "labels must be texts, found 'ab'"),
        *(
            ({"head": {"labels": ["a", "b"], "problem": None, "extra": {"tasks": tasks}}}, message)
            for tasks, message in (
                ({"t": {"start": 0, "stop": -1, "labels": ["a"]}}, "'t' must be 1 from 0"),
                ({"t": {"start": 1, "stop": 3, "labels": ["a", "b"]}}, "'t' must be 2 from 0"),
                ({"t": {"start": 0, "stop": 3, "labels": ["a", "b", "c"]}}, "must be 3 from 0"),
            )
        ),
    ],
)
def test_a_malformed_record_is_refused(
    module: PEM, tmp_path: Path, change: dict, words: str
) -> None:
    module.save(tmp_path / "m")
    path = tmp_path / "m" / "pem.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words) as error:
        load(tmp_path / "m")
    assert "pem.json" in str(error.value)


def test_saving_again_gives_the_same_weights_file(module: PEM, tmp_path: Path) -> None:
    for name in ("a", "b"):
        module.save(tmp_path / name)
    assert sha256_file(tmp_path / "a" / WEIGHTS) == sha256_file(tmp_path / "b" / WEIGHTS)
    load(tmp_path / "a").save(tmp_path / "c")
    assert sha256_file(tmp_path / "a" / WEIGHTS) == sha256_file(tmp_path / "c" / WEIGHTS)


def test_the_initialisation_fingerprint_sees_a_and_head_but_not_b() -> None:
    start = {
        "x.q.lora_A": torch.rand(2, 3),
        "x.q.lora_B": torch.zeros(3, 2),
        "c.weight.head": torch.rand(2),
    }
    mark = initialisation_fingerprint(start)
    assert mark == initialisation_fingerprint(dict(reversed(start.items())))
    assert mark == initialisation_fingerprint({**start, "x.q.lora_B": torch.ones(3, 2)})
    for name in ("x.q.lora_A", "c.weight.head"):
        assert mark != initialisation_fingerprint({**start, name: start[name] + 1e-3})


# --- base identity ------------------------------------------------------------------------------


def base_folder(path: Path, seed: int = 0) -> Path:
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": torch.rand(600, 50, generator=generator),
        "b.bias": torch.rand(3, generator=generator),
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "bert", "hidden_size": 50}')
    return path


def test_a_base_is_known_by_its_tensors_not_by_its_files(tmp_path: Path) -> None:
    one = base_identity(base_folder(tmp_path / "one"))
    assert (one.model_type, one.hidden_size) == ("bert", 50)
    assert one.name == str(tmp_path / "one")
    sharded = base_folder(tmp_path / "sharded")
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, sharded / f"model-{i}.safetensors")
    table = {"weight_map": {n: f"model-{i}.safetensors" for i, n in enumerate(tensors)}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(table))
    assert base_identity(sharded).fingerprint == one.fingerprint
    assert base_identity(base_folder(tmp_path / "two", seed=1)).fingerprint != one.fingerprint
    assert base_identity("org/unknown-model") == BaseIdentity(name="org/unknown-model")


def test_first_and_last_bytes_of_every_tensor_count(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    mark = base_identity(folder).fingerprint
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for at in (8 + length, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert base_identity(folder).fingerprint != mark


def test_a_base_in_the_hub_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0123abcd" * 5
    model = tmp_path / "hub" / "models--org--name"
    base_folder(model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = base_identity("org/name")
    assert found.name == "org/name"
    assert found.fingerprint == base_identity(base_folder(tmp_path / "same")).fingerprint
    (model / "refs" / "main").write_text("../../../../same")
    assert base_identity("org/name").fingerprint is None


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "..", "a/b.safetensors", 3]
)
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, shard: object) -> None:
    folder = base_folder(tmp_path / "base")
    base_folder(tmp_path / "other")
    (folder / "model.safetensors").unlink()  # it would be read, as transformers reads it
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.weight": shard}})
    )
    with pytest.raises(CheckpointError, match="outside the model's folder") as error:
        base_identity(folder)
    assert repr(shard) in str(error.value)


def test_headers_and_fingerprints_need_no_torch(module: PEM, tmp_path: Path) -> None:
    replace(module, base=BaseIdentity()).save(tmp_path / "m")
    base_folder(tmp_path / "base")
    module.save(tmp_path / "at-peft")
    code = (
        "import sys; from pem_composition.checkpoint import inspect_header, base_identity;"
        "inspect_header(sys.argv[1]); base_identity(sys.argv[2]);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "base")]
    subprocess.run(arguments, check=True, env={**os.environ})
