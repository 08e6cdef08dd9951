"""pem.json: what a module is made of, which base it belongs to, and the sha256 of its files.

Written with every save beside a short README.md; read and checked on every load. Also the
fingerprint of a base model's checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pem_composition import record as records
from pem_composition._version import __version__
from pem_composition.arithmetic.compatible import SPACES
from pem_composition.arithmetic.head_policies import POLICIES
from pem_composition.arithmetic.labels import kept_energy
from pem_composition.checkpoint import hub_name, named_heads
from pem_composition.checkpoint.card import card, license_of
from pem_composition.checkpoint.content import (
    CARD,
    LAYOUTS,
    MODEL_CONFIG,
    RECORD,
    content_digest,
)
from pem_composition.checkpoint.files import snapshot_of
from pem_composition.checkpoint.header import Record as Record
from pem_composition.checkpoint.header import check_sha256 as check_sha256
from pem_composition.checkpoint.tensors import TensorFile, open_tensors
from pem_composition.config import DTYPES, BaseIdentity
from pem_composition.errors import CheckpointError
from pem_composition.record import Certificate, Provenance, Source, Term
from pem_composition.safe_files import fsync, is_file, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from pem_composition.module import PEM

T = TypeVar("T")
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 has neither recipe nor heads beside the module
SAMPLE_BYTES = 64
SAMPLES = 16
SHARD = re.compile(r".*-([0-9]{1,9})-of-([0-9]{1,9})\.[a-z]+")
HIDDEN_SIZE_KEYS = ("hidden_size", "d_model", "n_embd", "dim")


def build(
    pem: PEM, files: Mapping[str, str], written: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The JSON object of a pem.json.

    Args:
        files: file name -> sha256.
        written: format and dtype that the module was saved in.
    """
    p = pem.provenance
    certificate = p.certificate and {
        "total": _or_null(p.certificate.total),
        "against": p.certificate.against,
        "layers": {name: _or_null(error) for name, error in p.certificate.layers.items()},
        **({} if (kept := kept_energy(p)) is None else {"kept_energy": kept}),
    }
    return {
        "format_version": FORMAT_VERSION,
        "kind": pem.kind,
        "expression": str(pem),
        "terms": [asdict(t) for t in p.terms],
        "sources": [asdict(s) for s in p.sources],
        "space": p.space,
        "method": p.method,
        "recipe": p.recipe and records.to_json(p.recipe, p.sources),
        "written": dict(written or {}),
        "certificate": certificate,
        "base": asdict(pem.base),
        "init": p.init,
        "head_policy": p.head_policy,
        "head": pem.head and named_heads.describe(pem.head),
        "heads": {name: named_heads.describe(head.info) for name, head in pem.heads.items()},
        "training": dict(p.training),
        "notes": list(p.notes),
        "origin": dict(pem.config.extra.get("origin", {})),
        "versions": _versions(),
        "files": dict(sorted(files.items())),
    }


def _or_null(error: float) -> float | None:
    """JSON has no infinity: an unknown error is null."""
    return error if math.isfinite(error) else None


@functools.cache
def _versions() -> Mapping[str, str | None]:
    """What is installed, read from the disk once: it takes as long as to write a small module."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "pem_composition": __version__,
        "torch": installed("torch"),
        "safetensors": installed("safetensors"),
        "python": platform.python_version(),
    }


def write(
    pem: PEM,
    folder: Path,
    written: Mapping[str, str | None] | None = None,
    title: str | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Write pem.json over every file in the folder, and README.md.

    Args:
        written: as for ``build``.
        title: of the card; default: the module's name.
        known: sha256 of files that were hashed while they were written.
    """
    known = known or {}
    found = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    with ThreadPoolExecutor() as pool:
        # the disk writes while the processor takes checksums
        flushed = pool.map(fsync, found.values())
        files = {name: known.get(name) or sha256_file(f) for name, f in found.items()}
        list(flushed)
    record = build(pem, files, written)
    try:
        write_json(folder / RECORD, record)
    except (TypeError, ValueError) as error:
        raise CheckpointError.build(
            RECORD,
            f"the module's provenance is not plain JSON ({error})",
            do="keep text and finite numbers in it",
        ) from None
    text = card(pem, title, layout=(written or {}).get("format"))
    (folder / CARD).write_text(text, encoding="utf-8", errors="replace")


def read(folder: Path) -> Record | None:
    """Read and type-check the folder's pem.json, None if it has none.

    Raises:
        CheckpointError: not what ``build`` writes.
    """
    path = folder / RECORD
    if not is_file(path):
        return None
    raw = read_json(path, folder)
    version = raw.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise CheckpointError.build(
            path,
            "format_version",
            found=version,
            expected=" or ".join(map(str, READABLE_VERSIONS)),
            do="read it with the version that wrote it",
        )
    try:
        return parse(raw)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError.build(
            path,
            f"malformed ({type(error).__name__}: {error})",
            do="delete it to load the module without provenance",
        ) from None


def parse(raw: Mapping[str, Any]) -> Record:
    """The record in a JSON object: values of the types that ``build`` writes; others are ignored.

    Raises:
        TypeError, ValueError, KeyError, AttributeError, OverflowError: a value of another type, a
            word that is none of those there are, or a number that cannot be such a one.
    """
    certificate, head = raw.get("certificate"), raw.get("head")
    known = {"name": str, "path": str, "sha256": str, "init": str, "content": str, "license": str}
    sources = tuple(Source(**_object(s, **known)) for s in raw.get("sources") or ())
    provenance = Provenance(
        terms=tuple(
            Term(**_object(t, coefficient=float, label=str)) for t in raw.get("terms") or ()
        ),
        sources=sources,
        space=_word(raw, "space", SPACES),
        method=_typed(raw, "method", str),
        certificate=_certificate(certificate) if certificate else None,
        init=_typed(raw, "init", str),
        head_policy=_word(raw, "head_policy", POLICIES),
        training=_typed(raw, "training", dict) or {},
        notes=_texts(raw, "notes"),
        recipe=records.from_json(raw["recipe"], sources) if raw.get("recipe") else None,
    )
    written = _object(raw.get("written") or {}, format=str, dtype=str)
    _word(written, "format", LAYOUTS)
    _word(written, "dtype", DTYPES)
    base = _object(
        raw.get("base") or {}, name=str, fingerprint=str, model_type=str, hidden_size=int
    )
    _number(base, "hidden_size", 1, math.inf)
    return Record(
        kind=_typed(raw, "kind", str),
        expression=_typed(raw, "expression", str),
        provenance=provenance,
        base=BaseIdentity(**base),
        head=named_heads.parse(head) if head else None,
        origin=_object(raw.get("origin") or {}, model_class=str, prefix=str, version=str),
        files=_digests(raw),
        heads=named_heads.parse_all(raw.get("heads") or {}),
        written=written,
        versions=_typed(raw, "versions", dict) or {},
    )


def _certificate(raw: Any) -> Certificate:
    known = _object(raw, total=float, layers=dict, against=str, kept_energy=float)
    _number(known, "kept_energy", 0, 1)
    layers = known["layers"] or {}
    errors = {n: _error(layers, n) for n in layers}
    against = {"against": a} if (a := known.get("against")) else {}
    return Certificate(_error(known, "total"), errors, **against)


def _error(raw: Mapping[str, Any], key: str) -> float:
    """A relative error; an unknown one is infinite."""
    value = _number(raw, key, 0, math.inf)
    return math.inf if value is None else value


def _typed(raw: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """The value under the key, or None.

    Raises:
        TypeError: it is of another type. A whole number is a float, too, as JSON has no two kinds.
    """
    value = raw.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if value is not None and type(value) is not kind:
        raise TypeError(f"{key} must be of type {kind.__name__}, found {value!r}")
    return value


def _word(raw: Mapping[str, Any], key: str, known: Collection[str]) -> str | None:
    """The same for one of these words."""
    value = _typed(raw, key, str)
    if value is not None and value not in known:
        raise ValueError(f"{key} must be {' or '.join(known)}, found {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, least: float, most: float) -> float | None:
    """The same for a number in a range."""
    value = _typed(raw, key, float)
    if value is not None and not least <= value <= most:
        raise ValueError(f"{key} must be from {least:g} to {most:g}, found {value!r}")
    return value


def _object(raw: Any, **kinds: type) -> dict[str, Any]:
    """An object with no other keys than these, each of its type or null."""
    if not isinstance(raw, dict) or raw.keys() - kinds.keys():
        raise TypeError(f"expected an object with {', '.join(kinds)}, found {raw!r}")
    return {key: _typed(raw, key, kinds[key]) for key in raw}


def _texts(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(raw, key, list) or []
    if not all(type(v) is str for v in values):
        raise TypeError(f"{key} must be text, found {values!r}")
    return tuple(values)


def _digests(raw: Mapping[str, Any]) -> dict[str, str]:
    files = _typed(raw, "files", dict) or {}
    if not all(type(v) is str for v in files.values()):
        raise TypeError("files must map names to sha256")
    return files


def loaded(
    record: Record | None, name: str, path: Path, sha256: str, notes: tuple[str, ...],
    known: Mapping[str, str],
) -> Provenance:  # fmt: skip
    """Provenance of a module read from disk: one source, and a note of its recorded expression.

    Args:
        sha256: of the weights file, or of the index of a sharded model.
        known: checksums at hand, by file name.
    """
    old = record.provenance if record else Provenance()
    content = content_digest(path, known)
    source = Source(name, hub_name.source_name(path), sha256, old.init, content, license_of(path))
    made = (
        (f"{name} was made as {record.expression} in {old.space} space",)
        if record and old.space
        else ()
    )
    return Provenance(
        sources=(source,),
        init=old.init,
        training=old.training,
        notes=tuple(dict.fromkeys((*records.named_purposes(old, name), *made, *notes))),
    )


# --- the base model -----------------------------------------------------------------------------


def base_identity(name_or_path: str | os.PathLike[str]) -> BaseIdentity:
    """Name, type, width and fingerprint of a base model: a local folder or one in the Hub cache.

    The fingerprint is a sha256 over sorted (tensor name, dtype, shape, sampled bytes) of its
    checkpoint; None if no checkpoint is found. Reads a few kB per tensor and needs no torch.
    """
    name = os.fspath(name_or_path)
    folder = find_base(name)
    if folder is None:
        return BaseIdentity(name=name)
    config = read_json(folder / MODEL_CONFIG, folder) if is_file(folder / MODEL_CONFIG) else {}
    sizes = [config[k] for k in HIDDEN_SIZE_KEYS if type(config.get(k)) is int]
    return BaseIdentity(
        name=name,
        fingerprint=_fingerprint(folder),
        model_type=model_type_of(config),
        hidden_size=sizes[0] if sizes else None,
    )


def model_type_of(config: Mapping[str, Any]) -> str | None:
    """The architecture that a model's config.json names, if it does."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def find_base(name: str) -> Path | None:
    """The local folder of a model: the path itself, or its main snapshot in the Hub cache."""
    folder = snapshot_of(Path(name))
    if is_file(folder / MODEL_CONFIG):
        return folder
    parts = name.split("/")
    if not 1 <= len(parts) <= 2 or not all(p and p.strip(".") and "\\" not in p for p in parts):
        return None
    try:
        found = snapshot_of(hub_name.cached(name))
    except CheckpointError:  # it was not fetched, or not the whole of it
        return None
    return found if is_file(found / MODEL_CONFIG) else None


def checkpoint_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face model folder, single or sharded; empty if there are none.

    Raises:
        CheckpointError: an index names a file outside the folder.
    """
    place = weights_or_index(folder)
    if place is None:
        return []
    if place.suffix != ".json":
        return [place]
    return [folder / f for f in sorted(set(weight_map(place, folder).values()))]


def weights_or_index(folder: Path) -> Path | None:
    """Of several forms of one model in a folder, the one that transformers loads."""
    names = ("model.safetensors", "pytorch_model.bin")
    forms = [folder / form for name in names for form in (name, f"{name}.index.json")]
    return next((form for form in forms if is_file(form)), None)


def weight_map(index: Path, folder: Path) -> dict[str, str]:
    """Tensor name -> shard file of an index, every file a plain name inside the folder."""
    table = read_json(index, folder).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError.build(index, "no weight_map", do="restore the file from its source")
    for tensor, shard in table.items():
        if (
            not isinstance(shard, str)
            or not shard.isprintable()
            or shard != Path(shard).name
            or shard in ("", ".", "..")
            or "\\" in shard
        ):
            raise CheckpointError.build(
                index,
                f"tensor {tensor!r} lies outside the model's folder",
                found=repr(shard),
                expected="the name of a file in the same folder",
                do="restore the file from its source",
            )
    _check_numbers(index, set(table.values()))
    return dict(table)


def _check_numbers(index: Path, shards: set[str]) -> None:
    """Shards named model-00002-of-00003 must all be there: an index can lose the last of one."""
    numbered = [m for shard in shards if (m := SHARD.fullmatch(shard))]
    found = {int(m[1]) for m in numbered}
    total = max((int(m[2]) for m in numbered), default=0)
    if len(found) < total:
        raise CheckpointError.build(
            index,
            "names no tensor of a shard",
            found=f"{len(found)} shards, {', '.join(sorted(shards))}",
            expected=f"{total}, as their names say",
            do="restore the file from its source",
        )


def _fingerprint(folder: Path) -> str | None:
    entries: dict[str, str] = {}
    for path in checkpoint_files(folder):
        with open_tensors(path, folder) as file:
            for name in file.infos:
                entries[name] = _sample(file, name)
    if not entries:
        return None
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(json.dumps([name, entries[name]]).encode())
    return digest.hexdigest()


def _sample(file: TensorFile, name: str) -> str:
    """Hash of one tensor's dtype, shape and evenly spaced bytes, first and last included."""
    info = file.infos[name]
    digest = hashlib.sha256(json.dumps([info.dtype, info.shape]).encode())
    if info.nbytes <= SAMPLES * SAMPLE_BYTES:
        digest.update(file.read_part(name, 0, info.nbytes))
        return digest.hexdigest()
    for i in range(SAMPLES):
        start = i * (info.nbytes - SAMPLE_BYTES) // (SAMPLES - 1)
        digest.update(file.read_part(name, start, SAMPLE_BYTES))
    return digest.hexdigest()
