"""A module in another layout or dtype; nothing is computed, so values stay bit for bit.

Adapters go between the layouts of ``content.LAYOUTS``; full models between one file and shards, and
from ``.bin`` (through the restricted reader) to safetensors, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.updates import save_dtype
from pem_composition.checkpoint import full, named_heads, provenance
from pem_composition.checkpoint.blocks import copied, written_info
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.content import FULL, MODEL_CONFIG, PEFT
from pem_composition.checkpoint.files import TensorInfo, check_apart
from pem_composition.checkpoint.layouts import is_foreign
from pem_composition.checkpoint.model_folder import (
    with_dtype,
    write_companions,
    write_model,
)
from pem_composition.checkpoint.serving import VLLM, for_vllm
from pem_composition.checkpoint.store import load, locate, open_module, save
from pem_composition.checkpoint.tensors import (
    TORCH_NAMES,
    open_tensors,
)
from pem_composition.config import (
    IN_BASE,
    BaseIdentity,
    FullConfig,
    Head,
    IA3Config,
    LoraConfig,
    is_head,
    pattern_keys,
    whole_layers,
)
from pem_composition.errors import PEMError
from pem_composition.module import PEM
from pem_composition.record import Provenance, Recipe
from pem_composition.safe_files import as_path, atomic_directory, read_json

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str = "peft",
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    prefix: str | None = None,
    drop_saved: bool = False,
    overwrite: bool = False,
) -> PEM:
    """Write the module of one directory into another; returns it (a full model without tensors).

    Args:
        format: a name in ``content.LAYOUTS``, or vllm (PEFT's layout as vLLM serves it, see
            ``for_vllm``); a full model stays a Hugging Face folder.
        dtype: of the written tensors; default: each as it is stored.
        max_shard_bytes: full models: most bytes per file; default 5 GB.
        prefix: of adapters: written before every layer's name, see ``prefixed``.
        drop_saved: for vllm: leave out heads and parts saved whole.

    Raises:
        UnsupportedModule: the layout cannot represent the module exactly; the reason is named.
        PEMError: the output exists, a value is not finite or overflows the dtype.

    Examples:
        >>> import tempfile, torch
        >>> from pem_composition.config import IA3Config
        >>> m = PEM({"fc.ia3": torch.tensor([1.0, 2.0])}, IA3Config(("fc",)), name="m")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(m, f"{folder}/m")
        ...     half = convert(f"{folder}/m", f"{folder}/half", dtype="float16")
        ...     load(f"{folder}/half").provenance.notes
        ('converted from the peft layout (adapter_model.safetensors)',)
    """
    folder, layout = locate(path)
    check_apart(as_path(out), [path])
    settings = {"format": format, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    settings |= {} if prefix is None else {"prefix": prefix}
    settings |= {"drop_saved": True} if drop_saved else {}
    if layout == FULL:
        if prefix is not None:
            raise PEMError.build(
                path, "the layers of adapters alone are renamed", found="a full model",
                do="leave --prefix out",
            )  # fmt: skip
        return _convert_full(folder, Path(fspath(out)), settings, overwrite=overwrite)
    if max_shard_bytes is not None:
        raise PEMError.build(
            path, "only full models are written in shards", found=f"a module in {layout} layout",
            do="leave --max_shard_size out",
        )  # fmt: skip
    return _convert_module(folder, Path(fspath(out)), settings, overwrite=overwrite)


def _convert_module(
    folder: Path, out: Path, settings: Mapping[str, Any], *, overwrite: bool
) -> PEM:
    header = open_module(folder)
    module = load(header)
    if settings["dtype"] is None:
        module = replace(
            module,
            tensors={n: _stored(t, header.infos[n]) for n, t in module.tensors.items()},
            heads={n: _stored_head(folder, n, h) for n, h in module.heads.items()},
        )
    if "prefix" in settings:
        module = prefixed(module, settings["prefix"])
    note = f"converted from the {header.format} layout ({header.weights.name})"
    layout = settings["format"]
    if layout == VLLM:
        module = for_vllm(module, drop_saved=settings.get("drop_saved", False))
        layout = PEFT.name
    module = replace(module, provenance=_noted(module.provenance, settings, note), name=out.name)
    save(module, out, format=layout, dtype=settings["dtype"], overwrite=overwrite)
    return module


def prefixed(module: PEM, prefix: str) -> PEM:
    """The module for a model that holds the one it was trained on as ``prefix``: a RoBERTa's
    ``encoder...`` is a classifier's ``roberta.encoder...``. A task's head stands beside it.

    Raises:
        PEMError: no name of a module.
    """
    if not re.fullmatch(r"[A-Za-z_]\w{0,99}(\.\w{1,100}){0,9}", prefix, re.ASCII):
        raise PEMError.build(
            "--prefix", "no name of a module", found=repr(prefix), expected="such as roberta"
        )
    config = module.config
    layers = {layer: f"{prefix}.{layer}" for layer in module.layers}
    targets, key_of = whole_layers(layers.values()), pattern_keys(layers.values())

    def named(parameter: str) -> str:
        return parameter if is_head(parameter) else f"{prefix}.{parameter}"

    extra = dict(config.extra)
    if extra.get(IN_BASE):
        extra[IN_BASE] = tuple(map(named, extra[IN_BASE]))
    if isinstance(config, LoraConfig):
        ranks = {key_of[new]: config.rank(old) for old, new in layers.items()}
        alphas = {key_of[new]: config.alpha_of(old) for old, new in layers.items()}
        config = replace(
            config, target_modules=targets, extra=extra,
            rank_pattern={k: r for k, r in ranks.items() if r != config.r},
            alpha_pattern={k: a for k, a in alphas.items() if a != config.alpha},
        )  # fmt: skip
    elif isinstance(config, IA3Config):
        inputs = tuple(new for old, new in layers.items() if config.scales_input(old))
        config = replace(config, target_modules=targets, feedforward_modules=inputs, extra=extra)
    tensors = {}
    for name, tensor in module.tensors.items():
        parameter, _, role = name.rpartition(".")
        tensors[f"{named(parameter)}.{role}"] = tensor
    return replace(module, config=config, tensors=tensors, operands=())


def _stored(tensor: Tensor, info: TensorInfo) -> Tensor:
    """Back to the dtype of the file; exact, since reading only widened it."""
    import torch

    return tensor.to(getattr(torch, TORCH_NAMES[info.dtype]))


def _stored_head(folder: Path, name: str, head: Head) -> Head:
    with open_tensors(folder / named_heads.file_of(name), folder) as file:
        return Head({n: _stored(t, file.infos[n]) for n, t in head.tensors.items()}, head.info)


def _noted(origin: Provenance, settings: Mapping[str, Any], *notes: str) -> Provenance:
    recipe = Recipe("convert", dict(settings), origin.sources)
    return replace(origin, recipe=recipe, notes=(*origin.notes, *notes))


def _convert_full(folder: Path, out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> PEM:
    if settings["format"] != PEFT.name:
        raise PEMError.build(
            folder, "a full model has one layout", found=settings["format"], do="leave --format out"
        )
    target, limit = save_dtype(settings["dtype"]), settings["max_shard_bytes"]
    raw, record = read_json(folder / MODEL_CONFIG, folder), provenance.read(folder)
    with full.Weights(folder) as weights, Checksums([folder]) as checksums:
        files = [p.name for p in provenance.checkpoint_files(folder)]
        note = f"converted from {files[0]}" + (f" and {len(files) - 1} more" if files[1:] else "")
        model = PEM(
            {},
            FullConfig(),
            record.base if record else BaseIdentity(model_type=raw.get("model_type")),
            out.name,
            full.head_info(raw) if any(full.is_head(n) for n in weights.infos) else None,
            heads=named_heads.read(folder, record),
        )
        with atomic_directory(out, overwrite, keep=is_foreign) as written:
            infos = {n: written_info(i, target) for n, i in weights.infos.items()}
            outputs = {n: copied(weights, n, info) for n, info in infos.items()}
            known = write_model(written, outputs, limit)
            config = with_dtype(raw, target) if target else raw
            notes = write_companions(folder, written, config)
            named_heads.write(model, written, dtype=settings["dtype"])
            read = checksums.of(folder)
            sha256, label = weights.sha256(read), folder.resolve().name
            origin = provenance.loaded(record, label, folder, sha256, (), read)
            model = replace(model, provenance=_noted(origin, settings, note, *notes))
            form = {"format": settings["format"], "dtype": settings["dtype"]}
            provenance.write(model, written, form, known=known)
    return model
