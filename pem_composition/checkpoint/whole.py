"""What every written checkpoint has in common: the inputs it names and the folder it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.updates import save_dtype
from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.blocks import Blocks, held, largest_dtype, torch_dtype, written_info
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.checkpoint.full import Weights, base_folder_of, head_info, renaming
from pem_composition.checkpoint.layouts import is_foreign
from pem_composition.checkpoint.model_folder import (
    with_dtype,
    write_companions,
    write_model,
)
from pem_composition.checkpoint.provenance import base_identity
from pem_composition.checkpoint.stream import Output, one_thread, whole
from pem_composition.checkpoint.tensors import cast, widen
from pem_composition.config import BaseIdentity, FullConfig
from pem_composition.errors import IncompatibleModules
from pem_composition.module import PEM
from pem_composition.record import Certificate, Provenance, Source
from pem_composition.safe_files import atomic_directory, read_json

if TYPE_CHECKING:
    from torch import Tensor


ROUNDING = 1e-6  # of a difference in float32, relative


def opened(name: str, model: Weights, apart: Callable[[str], bool], base: BaseIdentity) -> PEM:
    """A whole model as a module that holds alone what has no value in its base.

    Args:
        apart: whether a floating tensor is a head, or another part that the base lacks.
    """
    floating = (n for n, i in model.infos.items() if i.dtype in FLOAT_DTYPES)
    heads = {f"{n}.head": model.value(n) for n in floating if apart(n)}
    info = head_info(model.config) if heads else None
    origin = Provenance(sources=(Source(name, str(model.folder)),))
    return PEM(heads, FullConfig(extra={"config": model.config}), base, name, info, origin)


def hashed(name: str, model: Weights, checksums: Checksums) -> Source:
    """What is recorded of a whole model."""
    sha256 = model.sha256(checksums.of(model.folder))
    return checksums.source(name, model.folder, sha256)


def write_whole(
    out: str | PathLike[str],
    outputs: Callable[[Any], Mapping[str, Output]],
    config: Mapping[str, Any],
    companions: Path,
    describe: Callable[[tuple[str, ...]], PEM],
    checksums: Checksums,
    *,
    dtype: str | None,
    overwrite: bool,
    threads: bool = False,
) -> None:
    """Write a checkpoint as a whole directory, or nothing.

    Args:
        outputs: the tensors, given the torch dtype asked for.
        config: config.json, as it is where no dtype is asked for.
        companions: the folder whose tokenizer and processor are copied.
        describe: what pem.json records, given notes on what was not copied; called when all tensors
            are written and the inputs' checksums are known.
        threads: for the arithmetic of a method, which is more than a sum's.
    """
    target = save_dtype(dtype)
    tensors = outputs(target)
    with atomic_directory(out, overwrite, keep=is_foreign) as folder:
        with nullcontext() if threads else one_thread():
            known = write_model(folder, tensors)
        written = config if target is None else with_dtype(config, target)
        notes = write_companions(companions, folder, written)
        checksums.check()
        module = replace(describe(notes), name=Path(fspath(out)).name)
        provenance.write(module, folder, {"format": "peft", "dtype": dtype}, known=known)


def write_full(
    pem: PEM, folder: Path, *, base: str | PathLike[str] | None, dtype: str | None
) -> tuple[dict[str, str], tuple[str, ...], Certificate | None]:
    """Write theta_0 + delta as a Hugging Face model folder, each tensor as the base stores it or in
    the dtype asked for.

    Returns:
        The sha256 of weights files, notes on what was not copied from the base, and the certificate
        of what the files hold.
    """
    base_folder = base_folder_of(base or pem.base.name, pem.name)
    deltas = {n.removesuffix(".delta"): t for n, t in pem.tensors.items() if n.endswith(".delta")}
    heads = pem.head_tensors()
    target = save_dtype(dtype)
    config = dict(
        pem.config.extra.get("config") or read_json(base_folder / MODEL_CONFIG, base_folder)
    )
    if pem.head and pem.head.labels:
        config["id2label"] = {str(i): w for i, w in enumerate(pem.head.labels)}
        config["label2id"] = {w: i for i, w in enumerate(pem.head.labels)}
    with Weights(base_folder) as original, Checksums([], [base_folder]) as checksums:
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

        terms, blocks = _certified_terms(pem), Blocks()

        def theta(name: str, info: TensorInfo) -> Tensor:
            zero = original.value(names[name])
            wide = widen(zero, torch_dtype(info))
            out = cast(wide + deltas[name], name, torch_dtype(info), pem.name)
            if terms:
                exact = zero.double()
                for c, m in terms:
                    exact = exact.add(m.tensors[f"{name}.delta"], alpha=c)
                blocks.count_whole(name, out, exact, zero)
            return out

        infos = {n: written_info(original.infos[stored], target) for n, stored in names.items()}
        outputs = {n: whole(partial(theta, n, info), info) for n, info in infos.items()}
        apart = largest_dtype(original, target)
        written = write_model(folder, outputs | {n: held(t, n, apart) for n, t in heads.items()})
        checksums.check()
        described = config if target is None else with_dtype(config, target)
    certificate = pem.provenance.certificate
    if certificate:
        parts = {n: math.isfinite(e) for n, e in certificate.layers.items() if n not in deltas}
        counted = blocks.certificate(certificate.against) if terms else None
        lost = Certificate(math.inf, dict.fromkeys(deltas, math.inf), certificate.against)
        certificate = (counted or lost).covering(parts)
    return written, write_companions(base_folder, folder, described), certificate


def _certified_terms(pem: PEM) -> Sequence[tuple[float, PEM]]:
    """The sum that a difference stands for, of which it may be a sum of one; none where its own
    error, which is no rounding in float32, would hide what writing costs."""
    certificate = pem.provenance.certificate
    if certificate is None:
        return ()
    return pem.operands or (((1.0, pem),) if certificate.total < ROUNDING else ())


def _delta_names(deltas: Mapping[str, Tensor], original: Weights) -> dict[str, str]:
    names = {}
    rename = renaming(list(deltas), original)
    for name, delta in deltas.items():
        found = original.find(rename(name))
        if found is None or original.infos[found].shape != tuple(delta.shape):
            raise IncompatibleModules.build(
                original.folder,
                f"tensor {name!r}",
                found=f"shape {original.infos[found].shape}" if found else "no such tensor",
                expected=f"shape {tuple(delta.shape)}",
                do="give the base model of this module",
            )
        names[name] = found
    return names
