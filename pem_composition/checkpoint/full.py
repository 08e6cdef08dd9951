"""Full models: Hugging Face folders as modules, delta = theta - theta_0, and back.

Arithmetic is in float32 (float64 where stored so); integer buffers must equal the base's. The task
head is kept apart, since it is no difference to anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint import provenance, quantised, stored_names
from pem_composition.checkpoint.changes import Spelling, spelling_of
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.content import FULL, MODEL_CONFIG
from pem_composition.checkpoint.files import DTYPE_BYTES, FLOAT_DTYPES, TensorInfo
from pem_composition.checkpoint.header import ModuleHeader
from pem_composition.checkpoint.pickles import TorchZipFile
from pem_composition.checkpoint.provenance import (
    HIDDEN_SIZE_KEYS,
    base_identity,
    checkpoint_files,
    find_base,
    model_type_of,
    weight_map,
    weights_or_index,
)
from pem_composition.checkpoint.stored_names import PRETRAINING_COMPONENTS as PRETRAINING_COMPONENTS
from pem_composition.checkpoint.stored_names import current, is_added, is_ignored
from pem_composition.checkpoint.tensors import (
    TORCH_NAMES,
    TensorFile,
    buffer_of,
    check_finite,
    open_tensors,
    read_raw,
    widen,
)
from pem_composition.config import BaseIdentity, FullConfig
from pem_composition.config import is_head as is_head
from pem_composition.errors import CheckpointError, IncompatibleModules
from pem_composition.module import PEM, HeadInfo
from pem_composition.record import Provenance
from pem_composition.safe_files import is_file, listing, read_json, sha256_file

if TYPE_CHECKING:
    from torch import Tensor

COMPARED = 2**20  # bytes of a block of two tied copies

# Classes that have the encoder alone of a model of two halves.
ENCODER_CLASSES = ("EncoderModel", "ForTokenClassification", "ForAudioClassification")


class Weights(AbstractContextManager["Weights"]):
    """All tensors of a model folder, single or sharded, read by name, as transformers reads them.

    Names are today's, buffers that no model loads are left out, and a tied copy appears once
    (``stored_names``). One file of the folder is open at a time.

    Args:
        exact: compare tied copies by all their values; else by samples, which needs no torch.
        codes: a quantised model can be opened, to look at it; its codes have no sum.

    Raises:
        CheckpointError: no weights, an index that does not fit them, or a quantised model.
    """

    def __init__(self, folder: Path, *, exact: bool = True, codes: bool = False) -> None:
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self.config = (
            read_json(folder / MODEL_CONFIG, folder) if is_file(folder / MODEL_CONFIG) else {}
        )
        self._keys: dict[str, tuple[TensorFile, str]] = {}  # name -> file, name there
        self._open: TensorFile | None = None
        self._buffer: Any = b""  # of ``block``
        paths = self._paths()
        index = weights_or_index(folder)
        sharded = index is not None and index.suffix == ".json"
        self._table = weight_map(index, folder) if index is not None and sharded else None
        try:
            for path in paths:
                self._add(open_tensors(path, folder))
            self._drop_copies(exact)
        except BaseException:
            self.__exit__()
            raise
        if not codes:
            quantised.refuse(folder, self.config, self.infos)

    def __exit__(self, *exc: object) -> None:
        if self._open is not None:
            self._open.close()

    def _paths(self) -> list[Path]:
        paths = checkpoint_files(self.folder)
        if not paths:
            raise CheckpointError.build(
                self.folder,
                "no model weights",
                found=listing(self.folder),
                expected="model.safetensors, its shards with an index, or pytorch_model.bin",
                do="check the path",
            )
        named = self.config.get("transformers_weights")
        if named is not None and self.folder / str(named) != weights_or_index(self.folder):
            raise CheckpointError.build(
                self.folder / MODEL_CONFIG,
                "transformers_weights names another file than the usual one",
                found=named,
                expected="model.safetensors, or its index",
                do=f"rename {named}, and take the entry out of config.json",
            )
        return paths

    def _add(self, file: TensorFile) -> None:
        self._use(file)
        copies = _tied_copies(file, self.config) if isinstance(file, TorchZipFile) else set()
        kept = {n: i for n, i in file.infos.items() if not is_ignored(n, i, self.config)}
        self._check_index(file, kept.keys() - copies)
        for key, info in kept.items():
            name = current(key)
            if name in self.infos:
                raise CheckpointError.build(
                    file.path,
                    f"tensor {name!r} is there twice",
                    found=f"once more in {self._keys[name][0].path.name}",
                    expected="one",
                    do="restore the files",
                )
            if key not in copies:
                self.infos[name], self._keys[name] = info, (file, key)

    def _check_index(self, file: TensorFile, kept: Set[str]) -> None:
        """Refuse a shard that lacks a tensor which the index names there, or holds another one."""
        if self._table is None:
            return
        named = {n for n, shard in self._table.items() if shard == file.path.name}
        missing, unnamed = named - file.infos.keys(), kept - self._table.keys()
        for name in sorted(missing | unnamed)[:1]:
            raise CheckpointError.build(
                file.path if name in missing else weights_or_index(self.folder),
                f"missing tensor {name!r}",
                found="a shard without it" if name in missing else "a shard with it",
                expected="what the index names" if name in missing else "every tensor in the index",
                do="restore the file from its source",
            )

    def _drop_copies(self, exact: bool) -> None:
        """Leave out what transformers ties on loading; copies that differ are not tied."""
        for copy, source in stored_names.tied_names(self.config, self.infos).items():
            if {copy, source} <= self.infos.keys() and self._equal(copy, source, exact):
                del self.infos[copy]

    def _equal(self, name: str, other: str, exact: bool) -> bool:
        a, b = self.infos[name], self.infos[other]
        size = a.nbytes
        if a != b:
            return False
        starts = range(0, size, COMPARED) if exact else (0, max(0, size - COMPARED))
        return all(
            self._part(name, s, min(COMPARED, size - s))
            == self._part(other, s, min(COMPARED, size - s))
            for s in starts
        )

    def _part(self, name: str, start: int, size: int) -> bytes | bytearray | memoryview:
        file, key = self._keys[name]
        return self._use(file).read_part(key, start, size)

    def _use(self, file: TensorFile) -> TensorFile:
        """The file, the only one of the folder that is open: there can be hundreds of shards."""
        if self._open is not file:
            if self._open is not None:
                self._open.close()
            self._open = file
        return file

    def find(self, name: str) -> str | None:
        """The tensor that the model has under a name: its own, or the one it is tied to."""
        if name in self.infos or not stored_names.is_vocabulary(name):
            return name if name in self.infos else None
        ties = stored_names.tied_names(self.config, {*self.infos, name})
        source = ties.get(name, name)
        others = (source, *(copy for copy, of in ties.items() if of == source))
        return next((n for n in others if n in self.infos), None)

    def has_tokens(self, name: str) -> bool:
        """True for a tensor with a row for every token of the vocabulary."""
        inner = self.config.get("text_config")
        size = self.config.get("vocab_size", isinstance(inner, dict) and inner.get("vocab_size"))
        shape = self.infos[name].shape[stored_names.token_axis(name) :]
        fitting = bool(shape) and (type(size) is not int or shape[0] == size)
        return fitting and stored_names.is_vocabulary(name)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._keys[name][0].path

    def raw(self, name: str) -> Tensor:
        """One tensor as stored."""
        file, key = self._keys[name]
        return read_raw(self._use(file), key)

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start to stop of one tensor, row-major, as stored; valid until the next call."""
        import torch

        info = self.infos[name]
        width = DTYPE_BYTES[info.dtype]
        size = (stop - start) * width
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        part = self._buffer[:size]
        file, key = self._keys[name]
        view = memoryview(buffer_of(part)).cast("B")
        self._use(file).read_into(key, start * width, view)
        values: Tensor = part.view(getattr(torch, TORCH_NAMES[info.dtype]))
        return values

    def value(self, name: str) -> Tensor:
        """One floating tensor, finite, in float32 (float64 kept)."""
        tensor = widen(self.raw(name))
        check_finite(tensor, name, self.path_of(name))
        return tensor

    def sha256(self, known: Mapping[str, str] | None = None) -> str:
        """Checksum of the weights file, or of the index of a sharded checkpoint.

        Args:
            known: checksums at hand, by file name.
        """
        place = weights_or_index(self.folder)
        assert place is not None
        return (known or {}).get(place.name) or sha256_file(place, self.folder)


def _tied_copies(file: TorchZipFile, config: Mapping[str, Any]) -> set[str]:
    """Names that share a storage with another one and are not the one transformers would store."""
    copies: set[str] = set()
    tied = {**config, "tie_word_embeddings": True}
    ties = stored_names.tied_names(tied, map(current, file.infos))
    for group in file.shared():
        copies |= set(group) - {min(group, key=lambda key: (current(key) in ties, key))}
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
    raw = read_json(folder / MODEL_CONFIG, folder)
    with (
        Weights(folder) as tuned,
        Weights(base_folder) as original,
        Checksums([folder], [base_folder]) as checksums,
    ):
        names = aligned(tuned, original)
        tensors = {}
        for key, info in tuned.infos.items():
            if info.dtype not in FLOAT_DTYPES:
                continue
            if is_head(key) or key not in names:
                tensors[f"{key}.head"] = tuned.value(key)
            else:
                tensors[f"{key}.delta"] = tuned.value(key) - original.value(names[key])
        files = checksums.of(folder)
        sha256 = tuned.sha256(files)
    return PEM(
        tensors=tensors,
        config=FullConfig(extra={"config": raw}),
        base=base_identity(base_folder if base is None else base),
        name=name,
        head=head_info(raw) if any(n.endswith(".head") for n in tensors) else None,
        provenance=provenance.loaded(record, name, folder, sha256, (), files),
    )


def header(folder: Path, name: str, record: provenance.Record | None) -> ModuleHeader:
    """What a full model's files say, torch-free."""
    raw = read_json(folder / MODEL_CONFIG, folder)
    with Weights(folder, exact=False) as weights:
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
        format=FULL,
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
    """Labels and problem of a classifier from its config.json.

    Where id2label names no class, label2id may: transformers would call them LABEL_0, ...
    """
    labels = _named_by_number(config.get("id2label"))
    if HeadInfo(labels).numbered:
        labels = _numbered_by_name(config.get("label2id")) or labels
    regression = config.get("problem_type") == "regression" or len(labels) == 1
    return HeadInfo(() if regression else labels, "regression" if regression else "classification")


def _named_by_number(table: Any) -> tuple[str, ...]:
    """The classes of id2label; none where it does not name 0 ... n - 1."""
    if not isinstance(table, dict) or table.keys() != {str(i) for i in range(len(table))}:
        return ()
    return tuple(str(table[str(i)]) for i in range(len(table)))


def _numbered_by_name(table: Any) -> tuple[str, ...]:
    """The classes of label2id; none where it does not number them 0 ... n - 1."""
    if not isinstance(table, dict) or any(type(i) is not int for i in table.values()):
        return ()
    numbers = sorted(table.values())
    return tuple(sorted(table, key=table.__getitem__)) if numbers == [*range(len(table))] else ()


def base_folder_of(base: str | PathLike[str] | None, where: object) -> Path:
    if base is None:
        raise CheckpointError.build(
            where,
            "a full model is a module only as a difference to its base",
            found="no base model",
            expected="the model it was tuned from",
            do="give it (base=..., or --model; for an expression pem fold EXPRESSION --model BASE)",
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

    A head, or another part that the base lacks and the model may add (a pooler), has none. What is
    tied in the base is found under the name it is stored under.

    Args:
        rows: embeddings may have more rows in one of them (tokens that were added).

    Raises:
        IncompatibleModules: a tensor that one of them lacks, has in another shape, or, an integer
            one, with other values; heads of tasks and of pretraining apart.
    """
    rename = renaming([n for n in tuned.infos if not is_head(n)], original)
    names: dict[str, str] = {}
    for name, info in tuned.infos.items():
        found = original.find(rename(name))
        floating = info.dtype in FLOAT_DTYPES
        if found is not None and (is_head(name) or fits(tuned, name, original, found, rows=rows)):
            names[name] = found
            if not floating:
                check_equal(tuned, original, name, found)
        elif found is not None or (floating and not is_added(name, _classes(tuned))):
            other = None if found is None else original.infos[found]
            tokens = found is not None and fits(tuned, name, original, found, rows=True)
            raise IncompatibleModules.build(
                tuned.folder,
                f"tensor {name!r} does not fit the base {original.folder}",
                found=f"{info.dtype} {info.shape}",
                expected=f"{other.dtype} {other.shape}" if other else "no such tensor",
                do="add tokens to the base as well, or use merge.py --tokens first|largest, which "
                "takes other numbers of tokens"
                if tokens
                else "give the base model it was tuned from",
            )
    _check_lost(tuned, original, set(names.values()))
    return names


def by_base_name(tuned: Weights, original: Weights) -> dict[str, str]:
    """Name in the base -> name in the tuned model, heads apart: the inverse of ``aligned``.

    Raises:
        IncompatibleModules: also for a model with two tensors where the base has a tied one.
    """
    out: dict[str, str] = {}
    for name, found in aligned(tuned, original).items():
        if is_head(name):
            continue
        if found in out:
            raise IncompatibleModules.build(
                tuned.folder,
                f"{out[found]!r} and {name!r} are two tensors, and one in the base",
                found="weights that are no longer tied",
                expected=f"weights tied as in {original.folder}",
                do="use merge --full_merge --model BASE, which writes both",
            )
        out[found] = name
    return out


def renaming(names: Sequence[str], original: Weights) -> Spelling:
    """What has to be done to names so that most of them are the base's: a prefix more or less."""
    roots = sorted({n.split(".")[0] + "." for n in (*names, *original.infos)})
    return spelling_of(names, original.infos, roots)[0]


def _classes(model: Weights) -> str:
    return " ".join(map(str, model.config.get("architectures") or ()))


def _check_lost(tuned: Weights, original: Weights, used: Set[str]) -> None:
    """Refuse a model that lacks a tensor of its base which its class has."""
    classes = _classes(tuned)
    encoder = any(word in classes for word in ENCODER_CLASSES)
    for name, info in original.infos.items():
        if name in used or is_head(name) or info.dtype not in FLOAT_DTYPES:
            continue
        if encoder and "decoder" in name.split(".")[:2]:  # of a T5, of Whisper
            continue
        output = name.endswith(".weight") and stored_names.is_vocabulary(name)
        output = output and stored_names.is_language_model(tuned.config)
        if stored_names.is_pretraining(name) and not output:
            continue
        if (source := tuned.find(name)) is not None:
            raise IncompatibleModules.build(
                tuned.folder,
                f"{name!r} is tied to {source!r}, in the base it is not",
                found="one tensor for two of the base",
                expected=f"weights untied as in {original.folder}",
                do="write it untied: merge --full_merge -a BASE TUNED --coefficients 0 1 -p OUT",
            )
        raise IncompatibleModules.build(
            tuned.folder,
            f"missing tensor {name!r}",
            found=f"{len(tuned.infos)} tensors",
            expected=f"every tensor of the base {original.folder}",
            do="give the base model it was tuned from",
        )


def fits(a: Weights, name: str, b: Weights, other: str, *, rows: bool) -> bool:
    """True for two tensors of numbers (or of integers) of one shape.

    Args:
        rows: two embeddings may differ in the number of tokens.
    """
    x, y = a.infos[name], b.infos[other]
    if (x.dtype in FLOAT_DTYPES) != (y.dtype in FLOAT_DTYPES):
        return False
    of_tokens = rows and a.has_tokens(name) and b.has_tokens(other)
    axis = stored_names.token_axis(name)
    rest = [(*t.shape[:axis], *t.shape[axis + 1 :]) for t in (x, y)]
    return x.shape == y.shape or (of_tokens and rest[0] == rest[1])


def check_equal(a: Weights, b: Weights, name: str, other: str) -> None:
    if not a.raw(name).equal(b.raw(other)):
        raise IncompatibleModules.build(
            f"{name!r}",
            "an integer tensor differs and has no sum",
            found=f"other values in {b.folder}",
            expected=f"those in {a.folder}",
            do="use models of one architecture",
        )
