"""Full models: Hugging Face folders as modules, delta = theta - theta_0, and back.

Arithmetic is in float32 (float64 where stored so); integer buffers must equal the base's. The task
head is kept apart, since it is no difference to anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.files import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    TensorInfo,
    is_file,
    read_json,
    sha256_file,
)
from pem_composition.checkpoint.header import ModuleHeader
from pem_composition.checkpoint.model_folder import (
    CONFIG,
    with_dtype,
    write_companions,
    write_model,
)
from pem_composition.checkpoint.pickles import TorchZipFile
from pem_composition.checkpoint.provenance import (
    HIDDEN_SIZE_KEYS,
    base_identity,
    checkpoint_files,
    find_base,
    model_type_of,
    weight_map,
)
from pem_composition.checkpoint.stream import whole
from pem_composition.checkpoint.tensors import (
    TORCH_NAMES,
    TensorFile,
    buffer_of,
    cast,
    check_finite,
    info_of,
    open_tensors,
    read_raw,
    save_dtype,
    widen,
)
from pem_composition.config import BaseIdentity, FullConfig
from pem_composition.config import is_head as is_head
from pem_composition.errors import CheckpointError, IncompatibleModules
from pem_composition.module import PEM, HeadInfo
from pem_composition.record import Provenance

if TYPE_CHECKING:
    from torch import Tensor

# Parts of a pretrained checkpoint that a classifier does not load.
PRETRAINING_COMPONENTS = frozenset(
    {"lm_head", "cls", "pooler", "lm_predictions", "mask_predictions"}
)
# Of tied copies, the one transformers stores.
TIED_COPIES = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "embed_tokens.weight",
    "predictions.decoder.weight",
)


class Weights:
    """All tensors of a model folder, single or sharded, read by name; tied copies appear once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, TensorFile] = {}
        self._stack = ExitStack()
        self._buffer: Any = b""  # of ``block``
        paths = checkpoint_files(folder)
        if not paths:
            raise CheckpointError.build(
                folder,
                "no model weights",
                found=", ".join(sorted(p.name for p in folder.iterdir())[:12]),
                expected="model.safetensors, its shards with an index, or pytorch_model.bin",
                do="check the path",
            )
        try:
            for path in paths:
                file = open_tensors(path, folder)
                self._stack.callback(file.close)
                self._add(file)
            self._check_index()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _add(self, file: TensorFile) -> None:
        copies = _tied_copies(file) if isinstance(file, TorchZipFile) else set()
        for name, info in file.infos.items():
            if name in self.infos:
                raise CheckpointError.build(
                    file.path,
                    f"tensor {name!r} is in two shards",
                    expected="one",
                    do="restore the files",
                )
            if name not in copies:
                self.infos[name], self._files[name] = info, file

    def _check_index(self) -> None:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{stem}.index.json"
            if is_file(index):
                table = weight_map(index, self.folder)
                differing = table.keys() ^ self.infos.keys()
                if differing and stem == "model.safetensors":  # pickles store tied copies twice
                    self._refuse_index(index, table, min(differing))
                return

    def _refuse_index(self, index: Path, table: Mapping[str, str], name: str) -> NoReturn:
        listed = name in table
        raise CheckpointError.build(
            self.folder / table[name] if listed else index,
            f"missing tensor {name!r}",
            found="a shard without it" if listed else "a shard with it",
            expected="what the index names" if listed else "every tensor in the index",
            do="restore the file from its source",
        )

    def raw(self, name: str) -> Tensor:
        """One tensor as stored."""
        return read_raw(self._files[name], name)

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start to stop of one tensor, row-major, as stored; valid until the next call."""
        import torch

        info = self.infos[name]
        width = DTYPE_BYTES[info.dtype]
        size = (stop - start) * width
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        part = self._buffer[:size]
        self._files[name].read_into(name, start * width, memoryview(buffer_of(part)).cast("B"))
        values: Tensor = part.view(getattr(torch, TORCH_NAMES[info.dtype]))
        return values

    def value(self, name: str) -> Tensor:
        """One floating tensor, finite, in float32 (float64 kept)."""
        tensor = widen(self.raw(name))
        check_finite(tensor, name, self._files[name].path)
        return tensor

    def sha256(self) -> str:
        """Checksum of the weights file, or of the index of a sharded checkpoint."""
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if is_file(self.folder / name):
                return sha256_file(self.folder / name, self.folder)
        return next(iter(self._files.values())).sha256()


def _tied_copies(file: TorchZipFile) -> set[str]:
    """Tied copies: names that share a storage and are not the one transformers would store."""
    copies: set[str] = set()
    for group in file.shared():
        kept = min(group, key=lambda n: (n.endswith(TIED_COPIES), n))
        copies |= set(group) - {kept}
    return copies


# --- as a module --------------------------------------------------------------------------------


def load_full(folder: Path, base: str | PathLike[str] | None, *, name: str) -> PEM:
    """Read a fine-tuned model as a module: delta = theta - theta_0 in float32, task head apart.

    Args:
        base: folder, or name in the Hub cache, of the model it was tuned from.

    Raises:
        CheckpointError: no base, or tensors that differ from the base's in name or shape.
    """
    record = provenance.read(folder)
    base_folder = base_folder_of(base or (record.base.name if record else None), folder)
    raw = read_json(folder / CONFIG, folder)
    with Weights(folder) as tuned, Weights(base_folder) as original:
        sha256 = tuned.sha256()
        for path in checkpoint_files(folder):
            if record and path.name in record.files:
                provenance.check_sha256(folder, path.name, sha256_file(path, folder), record)
        names = aligned(tuned, original)
        tensors = {}
        for key, info in tuned.infos.items():
            if info.dtype not in FLOAT_DTYPES:
                if names[key] in original.infos:
                    check_equal(tuned, original, key, names[key])
            elif is_head(key):
                tensors[f"{key}.head"] = tuned.value(key)
            else:
                tensors[f"{key}.delta"] = tuned.value(key) - original.value(names[key])
    return PEM(
        tensors=tensors,
        config=FullConfig(extra={"config": raw}),
        base=base_identity(base_folder if base is None else base),
        name=name,
        head=head_info(raw) if any(n.endswith(".head") for n in tensors) else None,
        provenance=provenance.loaded(record, name, folder, sha256, ()),
    )


def header(folder: Path, name: str, record: provenance.Record | None) -> ModuleHeader:
    """What a full model's files say, torch-free."""
    raw = read_json(folder / CONFIG, folder)
    with Weights(folder) as weights:
        infos = {f"{n}.{'head' if is_head(n) else 'delta'}": i for n, i in weights.infos.items()}
    paths = checkpoint_files(folder)
    sizes = [raw[k] for k in HIDDEN_SIZE_KEYS if type(raw.get(k)) is int]
    base = (
        record.base
        if record
        else BaseIdentity(model_type=model_type_of(raw), hidden_size=(sizes or [None])[0])
    )
    return ModuleHeader(
        path=folder,
        format="full",
        name=name,
        config=FullConfig(extra={"config": raw}),
        base=base,
        infos=infos,
        head=head_info(raw) if any(n.endswith(".head") for n in infos) else None,
        provenance=record.provenance if record else Provenance(),
        weights=paths[0],
        sha256=record.files.get(paths[0].name) if record else None,
    )


def head_info(config: Mapping[str, Any]) -> HeadInfo:
    """Labels and problem of a classifier from its config.json."""
    table = config.get("id2label")
    labels: tuple[str, ...] = ()
    if isinstance(table, dict) and table.keys() == {str(i) for i in range(len(table))}:
        labels = tuple(str(table[str(i)]) for i in range(len(table)))
    regression = config.get("problem_type") == "regression" or len(labels) == 1
    return HeadInfo(() if regression else labels, "regression" if regression else "classification")


def base_folder_of(base: str | PathLike[str] | None, where: object) -> Path:
    if base is None:
        raise CheckpointError.build(
            where,
            "a full model is a module only as a difference to its base",
            found="no base model",
            expected="the model it was tuned from",
            do="give it (base=..., or --model)",
        )
    found = find_base(fspath(base))
    if found is None:
        raise CheckpointError.build(
            base,
            "no base model here",
            found="no config.json, and no such model in the Hub cache",
            expected="a model folder",
            do="check the path",
        )
    return found


def aligned(tuned: Weights, original: Weights, *, rows: bool = False) -> dict[str, str]:
    """Name in the tuned model -> name in the base, which may lack (or have) the model's prefix.

    Args:
        rows: a tensor may have more rows in one of them (tokens that were added to a vocabulary).

    Refuses tensors that one of them lacks, heads and pretraining heads apart. Integer buffers
    (position_ids) may be absent: only old releases of transformers stored them.
    """
    body = [n for n, i in tuned.infos.items() if not is_head(n) and i.dtype in FLOAT_DTYPES]
    prefixes = sorted({n.split(".")[0] + "." for n in body})
    options: list[Callable[[str], str]] = [str]
    options += [lambda n, p=p: n.removeprefix(p) for p in prefixes]  # type: ignore[misc]
    roots = {n.split(".")[0] + "." for n in original.infos}
    options += [lambda n, p=p: p + n for p in sorted(roots)]  # type: ignore[misc]
    rename = max(options, key=lambda f: sum(f(n) in original.infos for n in body))
    names = {n: rename(n) for n in tuned.infos}
    for name in body:
        found = original.infos.get(names[name])
        if found is None or not fits(found, tuned.infos[name], rows=rows):
            raise IncompatibleModules.build(
                tuned.folder,
                f"tensor {name!r} does not fit the base {original.folder}",
                found=f"shape {tuned.infos[name].shape}",
                expected=f"shape {found.shape}" if found else "no such tensor",
                do="give the base model it was tuned from",
            )
    stored = {n for n, i in original.infos.items() if i.dtype in FLOAT_DTYPES}
    lost = stored - set(names.values())
    real = sorted(
        n for n in lost if not is_head(n) and PRETRAINING_COMPONENTS.isdisjoint(n.split("."))
    )
    if real:
        raise IncompatibleModules.build(
            tuned.folder,
            f"missing tensor {real[0]!r}",
            found=f"{len(tuned.infos)} tensors",
            expected=f"every tensor of the base {original.folder}",
            do="give the base model it was tuned from",
        )
    return names


def fits(a: TensorInfo, b: TensorInfo, *, rows: bool) -> bool:
    """True for equal shapes, or with ``rows`` for tensors that differ in the number of rows."""
    return a.shape == b.shape or (rows and bool(a.shape and b.shape) and a.shape[1:] == b.shape[1:])


def check_equal(a: Weights, b: Weights, name: str, other: str) -> None:
    if not a.raw(name).equal(b.raw(other)):
        raise IncompatibleModules.build(
            f"{name!r}",
            "an integer tensor differs and has no sum",
            found=f"other values in {b.folder}",
            expected=f"those in {a.folder}",
            do="use models of one architecture",
        )


def write(
    pem: PEM, folder: Path, *, base: str | PathLike[str] | None, dtype: str | None
) -> dict[str, str]:
    """Write theta_0 + delta as a Hugging Face model folder; returns the sha256 of weights files."""
    base_folder = base_folder_of(base or pem.base.name, pem.name)
    deltas = {n.removesuffix(".delta"): t for n, t in pem.tensors.items() if n.endswith(".delta")}
    heads = pem.head_tensors()
    target = save_dtype(dtype)
    config = dict(pem.config.extra.get("config") or read_json(base_folder / CONFIG, base_folder))
    if pem.head and pem.head.labels:
        config["id2label"] = {str(i): w for i, w in enumerate(pem.head.labels)}
        config["label2id"] = {w: i for i, w in enumerate(pem.head.labels)}
    with Weights(base_folder) as original:
        known = base_identity(base_folder).fingerprint
        if None not in (pem.base.fingerprint, known) and pem.base.fingerprint != known:
            raise IncompatibleModules.build(
                base_folder,
                "not the base this module belongs to",
                found=f"fingerprint {str(known)[:12]}",
                expected=str(pem.base.fingerprint)[:12],
                do="give the base model it was tuned from",
            )
        names = _delta_names(deltas, original)

        def theta(name: str) -> Tensor:
            value = heads[name] if name in heads else original.value(names[name]) + deltas[name]
            return cast(value, name, target, pem.name)

        outputs = {
            n: whole(partial(theta, n), _target_info(tuple(t.shape), t, target))
            for n, t in {**deltas, **heads}.items()
        }
        written = write_model(folder, outputs)
    write_companions(base_folder, folder, with_dtype(config, target))
    return written


def _delta_names(deltas: Mapping[str, Tensor], original: Weights) -> dict[str, str]:
    names = {}
    for name, delta in deltas.items():
        short = name.partition(".")[2]
        names[name] = name if name in original.infos else short
        found = original.infos.get(names[name])
        if found is None or found.shape != tuple(delta.shape):
            raise IncompatibleModules.build(
                original.folder,
                f"tensor {name!r}",
                found=f"shape {found.shape}" if found else "no such tensor",
                expected=f"shape {tuple(delta.shape)}",
                do="give the base model of this module",
            )
    return names


def _target_info(shape: tuple[int, ...], like: Tensor, dtype: Any) -> TensorInfo:
    return TensorInfo(info_of(like.new_empty(0, dtype=dtype or like.dtype)).dtype, shape)
