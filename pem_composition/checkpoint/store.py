"""Load and save a module; see what one says of itself, without its values and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pem_composition.arithmetic.operand import check_module
from pem_composition.checkpoint import (
    full,
    hub,
    hub_name,
    named_heads,
    provenance,
)
from pem_composition.checkpoint.content import (
    CONFIG,
    FULL,
    HEAD_CONFIG,
    LAYOUTS,
    MODEL_CONFIG,
    PEFT,
    RECORD,
)
from pem_composition.checkpoint.files import (
    SafetensorsFile,
    check_apart,
    meant,
    modules_inside,
    snapshot_of,
)
from pem_composition.checkpoint.header import ModuleHeader
from pem_composition.checkpoint.layouts import CODECS, is_foreign, layout_of
from pem_composition.checkpoint.whole import write_full
from pem_composition.errors import CheckpointError, PEMError
from pem_composition.module import PEM, rounded
from pem_composition.safe_files import (
    SmallFiles,
    as_path,
    atomic_directory,
    is_file,
    leads_nowhere,
    listing,
)

if TYPE_CHECKING:
    from torch import Tensor


def load(
    module: str | PathLike[str] | ModuleHeader,
    *,
    base: str | PathLike[str] | None = None,
    name: str | None = None,
    on_demand: bool = False,
) -> PEM:
    """Read a module: PEFT, adapter-transformers, mlx-lm, or a Hugging Face model with its base.

    Tensors are float32 (float64 kept), finite, and complete; recorded sha256 are checked.

    Args:
        module: its folder, or its hub name (``org/name[@revision][/subfolder]``), which is
            fetched, or what ``open_module`` gave.
        base: for a full model, the folder (or cached Hub name) of the model it was tuned from.
        name: label in expressions; default: the folder's name.
        on_demand: leave the tensors of a PEFT module in their file, which stays open: each is read
            when it is used, and refused there if it is not finite or the file has changed.

    Raises:
        CheckpointError: naming the file, what was found, what was expected and what to do.
        UnsupportedModule: a module that cannot be represented exactly.

    Examples:
        >>> import tempfile, torch
        >>> from pem_composition.config import IA3Config
        >>> m = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, IA3Config(("fc",)), name="m")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(m, f"{folder}/m")
        ...     print(load(f"{folder}/m", name="again"))
        again
    """
    if not isinstance(module, ModuleHeader):
        small, layout = _find(module)
        if layout == FULL:
            folder = small.folder
            read = full.load_full(folder, base, name=name or hub_name.label(folder))
            return replace(read, heads=named_heads.read(folder, provenance.read(folder)))
        module = _header(small, layout, name)
    folder, record, stored = module.path, module.record, module.tensors
    label = name or module.name
    if stored is None:
        return replace(
            full.load_full(folder, base, name=label), heads=named_heads.read(folder, record)
        )
    on_demand = on_demand and module.weights.suffix == ".safetensors"
    digests = dict(module.digests)
    for file in stored.files:
        if on_demand and isinstance(file, SafetensorsFile):
            file.check_size()  # its values are kept nowhere, but a sum of the same size is
        else:
            file.hold()
        digests[file.path.name] = file.sha256()
        provenance.check_sha256(folder, file.path.name, digests[file.path.name], record)
    tensors: Mapping[str, Tensor] = stored
    if not on_demand:
        tensors = dict(stored)
        stored.close()
    return PEM(
        tensors=MappingProxyType(tensors),
        config=module.config,
        base=module.base,
        name=label,
        head=module.head,
        provenance=provenance.loaded(
            record, label, folder, digests[module.weights.name], module.notes, digests
        ),
        heads=named_heads.read(folder, record),
    )


def inspect_header(path: str | PathLike[str]) -> ModuleHeader:
    """Config, base, shapes and provenance of a module, without its values and without torch.

    Raises:
        CheckpointError, UnsupportedModule: as ``load``, for everything a header can show.

    Examples:
        >>> import tempfile, torch
        >>> from pem_composition.config import IA3Config
        >>> m = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, IA3Config(("fc",)), name="m")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(m, f"{folder}/m")
        ...     header = inspect_header(f"{folder}/m")
        >>> header.kind, header.shapes
        ('ia3', {'fc.ia3': (2,)})
    """
    header = open_module(path)
    if header.tensors is not None:
        header.tensors.close()
    return header


def open_module(path: str | PathLike[str]) -> ModuleHeader:
    """As ``inspect_header``, with the weights left open: ``load`` of the header reads from them,
    so that header and values are of one file.
    """
    return _header(*_find(path))


def _header(small: SmallFiles, layout: str, name: str | None = None) -> ModuleHeader:
    folder = small.folder
    label = name or hub_name.label(folder)
    record = provenance.read(folder)
    if layout == FULL:
        header = full.header(folder, label, record)
        return replace(header, record=record, heads=dict(record.heads) if record else {})
    raw = small.json(CONFIG)
    for file in (CONFIG, HEAD_CONFIG):
        if record and file in record.files and is_file(folder / file):
            small.json(file)
            provenance.check_sha256(folder, file, small.digests[file], record)
    header = CODECS[layout].read(small, raw, label, record)
    if record and record.kind not in (None, header.kind):
        raise CheckpointError.build(
            folder / RECORD,
            "belongs to another module",
            found=f"kind {record.kind}",
            expected=f"kind {header.kind}",
            do="restore the file, or delete it",
        )
    if record is None:
        return replace(header, digests=small.digests)
    base = header.base
    if None in (base.name, record.base.name) or base.name == record.base.name:
        base = base.completed(record.base)
    return replace(
        header,
        base=base,
        head=record.head if record.head and header.head else header.head,
        sha256=record.files.get(header.weights.name),
        record=record,
        heads=dict(record.heads),
        digests=small.digests,
    )


def locate(path: str | PathLike[str]) -> tuple[Path, str]:
    """The folder that holds the module and its layout: a name in ``content.LAYOUTS``, or FULL.

    A folder without a module but with exactly one subfolder that holds one stands for it. A hub
    name stands for its folder in the hub's cache.

    Raises:
        CheckpointError: no such folder or module on the hub, or none in it; says what is there.
    """
    small, layout = _find(path)
    return small.folder, layout


def _find(path: str | PathLike[str]) -> tuple[SmallFiles, str]:
    """``locate``, with the files that it has read."""
    folder = hub.folder_of(path)
    if not folder.is_dir():
        raise CheckpointError.build(
            folder,
            "a symbolic link to nothing"
            if leads_nowhere(folder)
            else "no such directory"
            if not folder.exists()
            else "not a directory",
            expected="a directory with a module",
            do=meant(folder) or "check the path",
        )
    folder = snapshot_of(folder)
    small = SmallFiles(folder)
    layout = _layout(small)
    if layout is not None:
        return small, layout
    inner = modules_inside(folder)
    if len(inner) == 1:
        small = SmallFiles(inner[0])
        return small, _layout(small) or PEFT.name
    raise CheckpointError.build(
        folder,
        "several modules in subfolders" if inner else "no module here",
        found=", ".join(d.name for d in inner)
        if inner
        else listing(folder) or "an empty directory",
        expected="one of them"
        if inner
        else "adapter_config.json with its weights, or config.json with a full model",
        do=f"name the subfolder, e.g. {inner[-1]}" if inner else "check the path",
    )


def _layout(small: SmallFiles) -> str | None:
    if is_file(small.folder / CONFIG):
        return layout_of(small, small.json(CONFIG))
    return FULL if is_file(small.folder / MODEL_CONFIG) else None


def save(
    pem: PEM,
    path: str | PathLike[str],
    *,
    format: str = "peft",
    dtype: str | None = None,
    overwrite: bool = False,
    base: str | PathLike[str] | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a module as a whole directory, or nothing: its layout, README.md and pem.json.

    Args:
        format: a name in ``content.LAYOUTS``. A full module is written as a Hugging Face model,
            theta_0 + delta, and needs its base model.
        dtype: float32 | float16 | bfloat16 | float64; default: as held (float32 or float64), of a
            full module as the base stores it.
        overwrite: replace the module in an existing directory; other files there are kept.
        base: folder or cached Hub name of a full module's base; default: the one it names.
        beside: further files by name, which appear with the module and are no part of it.

    Raises:
        PEMError: the output exists, a value is not finite or overflows the dtype, or the layout
            cannot represent the module. Nothing is written then.

    Examples:
        >>> import tempfile, torch
        >>> from pem_composition.config import IA3Config
        >>> m = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, IA3Config(("fc",)), name="m")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(m, f"{folder}/m")
        ...     sorted(p.name for p in Path(folder, "m").iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'pem.json']
    """
    if format not in CODECS:
        raise PEMError.build(
            "format", "unknown layout", found=repr(format), expected=" | ".join(LAYOUTS)
        )
    known: dict[str, str] = {}
    check_module("module", pem)
    title = as_path(path).name
    named = base or pem.base.name
    if pem.kind == "full" and named and (original := provenance.find_base(fspath(named))):
        check_apart(path, [original])
    with atomic_directory(path, overwrite, keep=is_foreign) as folder:
        if pem.kind == "full":
            if format != PEFT.name:
                raise PEMError.build(
                    pem.name, "a full module is written as a model folder", do="leave --format out"
                )
            known, notes, certificate = write_full(pem, folder, base=base, dtype=dtype)
            notes = tuple(dict.fromkeys((*pem.provenance.notes, *notes)))
            origin = replace(pem.provenance, notes=notes, certificate=certificate)
            pem = replace(pem, provenance=origin)
        else:
            pem = rounded(pem, dtype)
            CODECS[format].write(pem, folder, title, dtype)
        named_heads.write(pem, folder, dtype=dtype)
        written = {"format": format, "dtype": dtype}
        provenance.write(pem, folder, written, title=title, known=known)
        for name, data in beside.items():
            (folder / name).write_bytes(data)
