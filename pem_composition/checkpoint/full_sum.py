"""Combinations of full models, tensor by tensor, without holding a model in memory.

theta = theta_0 + sum_i c_i (theta_i - theta_0) = sum_i c_i theta_i + (1 - sum_i c_i) theta_0,
so the base is needed only if the coefficients do not sum to 1; a merging method f always needs it,
theta = theta_0 + f(c_1 (theta_1 - theta_0), ..., c_T (theta_T - theta_0)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pem_composition.arithmetic.compatible import check_coefficients_of
from pem_composition.arithmetic.heads import ONE_HEAD
from pem_composition.arithmetic.labels import method_text
from pem_composition.arithmetic.methods.registry import SIMPLE, Choice, resolve
from pem_composition.arithmetic.updates import certified
from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.files import (
    atomic_directory,
    check_apart,
    is_file,
    snapshot_of,
)
from pem_composition.checkpoint.full import Weights, base_folder_of, head_info, is_head
from pem_composition.checkpoint.full_plan import Plan
from pem_composition.checkpoint.layouts import is_foreign
from pem_composition.checkpoint.model_folder import (
    CONFIG,
    with_dtype,
    write_companions,
    write_model,
)
from pem_composition.checkpoint.provenance import base_identity, model_type_of
from pem_composition.checkpoint.stream import one_thread
from pem_composition.checkpoint.tensors import save_dtype
from pem_composition.checkpoint.vocabulary import tokenizers_note
from pem_composition.config import TOKEN_POLICIES, BaseIdentity, FullConfig
from pem_composition.errors import CheckpointError, IncompatibleModules, PEMError
from pem_composition.module import PEM
from pem_composition.record import OWN_RESULT, Certificate, Provenance, Recipe, Term


def combine_full(
    models: Sequence[str | PathLike[str]],
    coefficients: Sequence[float],
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    head: str = "average",
    dtype: str | None = None,
    method: str = SIMPLE,
    settings: Mapping[str, object] | None = None,
    tokens: str = "error",
    names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write sum_i c_i theta_i + (1 - sum_i c_i) theta_0 as a model folder, tensor by tensor; or
    theta_0 + another merging method on the differences c_i (theta_i - theta_0).

    Memory: see ``full_blocks`` and ``stream``; under 0.1 GB for a sum, 0.3 GB for a method on three
    models, beside torch itself. A method's result is that of ``module.combine`` on the differences,
    bit for bit.

    Args:
        models: folders of models of one architecture; config and tokenizer are the first's.
        base: theta_0; a sum needs it only if the coefficients do not sum to 1.
        head: average (weights |c_i| / sum |c_j|), first, last, none, or error if the heads differ.
        dtype: of the written tensors; default float32 (float64 kept).
        method, settings: as for ``module.combine``.
        tokens: embeddings with more rows in one model than in another: error, or the rows (and
            config and tokenizer) of the first model or of the largest. A row that some lack is
            averaged over the models that have it, weights |c_i| / sum |c_j|.
        names: of the models in the expression; default: the folders'.

    Raises:
        IncompatibleModules: tensors, shapes or integer buffers differ.
        PEMError: wrong coefficients, method or policy, or a base that is needed and not given.
    """
    folders = [_model_folder(m) for m in models]
    check_apart(out, [*models, *([] if base is None else [base])])
    weights = [float(c) for c in coefficients]
    choice = resolve(method, settings, "full")
    rest = _check_request(folders, weights, head, tokens, base, choice)
    with ExitStack() as stack:
        opened = [stack.enter_context(Weights(f)) for f in folders]
        original = stack.enter_context(Weights(base_folder_of(base, out))) if rest else None
        plan = Plan(opened, weights, original, rest, head, tokens, choice)
        target = save_dtype(dtype)
        bases = [original.folder] if original is not None else []
        checksums = stack.enter_context(Checksums([m.folder for m in opened], bases))
        with atomic_directory(out, overwrite, keep=is_foreign) as folder:
            with one_thread() if choice.method == SIMPLE else nullcontext():
                known = write_model(folder, plan.outputs(target))
            config = plan.config()
            place = plan.reference.folder
            notes = _notes(opened, names, plan.reference)
            notes += write_companions(place, folder, with_dtype(config, target))
            recorded = {
                "coefficients": weights, "base": None if base is None else fspath(base),
                "head": head, "method": choice.method, "settings": choice.as_dict(),
                "tokens": tokens,
            }  # fmt: skip
            module = _described(opened, checksums, weights, recorded, config, choice, names)
            module = replace(_certified(module, plan, notes), name=Path(fspath(out)).name)
            provenance.write(module, folder, {"format": "peft", "dtype": dtype}, known=known)


def _model_folder(path: str | PathLike[str]) -> Path:
    folder = snapshot_of(Path(fspath(path)))
    if not is_file(folder / CONFIG):
        raise CheckpointError.build(
            folder,
            "not a model folder",
            found="no config.json" if folder.is_dir() else "no such directory",
            expected="a Hugging Face model folder",
            do="check the path",
        )
    return folder


def _check_request(
    folders: Sequence[Path],
    weights: Sequence[float],
    head: str,
    tokens: str,
    base: str | PathLike[str] | None,
    choice: Choice,
) -> float:
    """The base's weight 1 - sum c, 0 if it is not needed; of a method 1."""
    if not folders or len(folders) != len(weights):
        raise IncompatibleModules.build(
            "coefficients",
            "one coefficient per model is needed",
            found=f"{len(weights)} coefficients for {len(folders)} models",
        )
    for c in weights:
        if not math.isfinite(c):
            raise PEMError.build("coefficients", "a coefficient must be a finite number", found=c)
    for what, policy, known in (("head", head, ONE_HEAD), ("tokens", tokens, TOKEN_POLICIES)):
        if policy not in known:
            raise PEMError.build(
                what, "unknown policy", found=repr(policy), expected=", ".join(known)
            )
    if choice.method != SIMPLE:
        return _check_method(weights, tokens, base, choice)
    rest = 1.0 - math.fsum(weights)
    if abs(rest) < 1e-9:
        return 0.0
    if base is None:
        raise PEMError.build(
            "coefficients",
            "they do not sum to 1, so the sum is around the base model",
            found=f"sum {math.fsum(weights):g}",
            expected="sum 1, or a base model",
            do="give the base model (--model BASE), or coefficients that sum to 1",
        )
    return rest


def _check_method(
    weights: Sequence[float], tokens: str, base: str | PathLike[str] | None, choice: Choice
) -> float:
    check_coefficients_of(choice, weights)
    if choice.entry.needs or choice.entry.space != "delta":
        raise PEMError.build(
            "method",
            f"{choice.method} is not defined on whole models here",
            found=choice.method,
            expected="a method that merges differences to the base",
            do="pem methods lists them",
        )
    if tokens != "error":
        raise PEMError.build(
            "tokens",
            f"{choice.method} needs tensors of one shape",
            found=f"--tokens {tokens}",
            do="leave it out, or use the plain sum",
        )
    if base is None:
        raise PEMError.build(
            "base",
            "a method merges the differences to the base",
            found="no base model",
            expected="--adapters DIR ... --model BASE",
        )
    return 1.0


def _described(
    models: Sequence[Weights],
    checksums: Checksums,
    weights: Sequence[float],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    choice: Choice,
    names: Sequence[str] | None,
) -> PEM:
    """A PEM without tensors that carries what pem.json records."""
    base, head = settings["base"], settings["head"]
    has_head = head != "none" and any(is_head(n) for m in models for n in m.infos)
    labels = _labels(models, names)
    sources = tuple(
        checksums.source(label, m.folder, m.sha256(checksums.of(m.folder)))
        for label, m in zip(labels, models, strict=True)
    )
    identity = BaseIdentity(model_type=model_type_of(config))
    return PEM(
        tensors={},
        config=FullConfig(),
        base=identity if base is None else base_identity(base),
        head=head_info(config) if has_head else None,
        provenance=Provenance(
            terms=tuple(Term(c, label) for c, label in zip(weights, labels, strict=True)),
            sources=sources,
            space=choice.entry.space if choice.method != SIMPLE else "parameter",
            method=method_text(choice, None),
            head_policy=head,
            recipe=Recipe("combine_full", settings, sources),
        ),
    )


def _certified(described: PEM, plan: Plan, notes: tuple[str, ...]) -> PEM:
    """With the notes and the error of what a method has written, against its own result before
    rounding."""
    errors = plan.errors()
    certificate = None if errors is None else Certificate(*certified(errors), OWN_RESULT)
    origin = replace(described.provenance, certificate=certificate, notes=notes)
    return replace(described, provenance=origin)


def _labels(models: Sequence[Weights], names: Sequence[str] | None) -> list[str]:
    return list(names or [m.folder.resolve().name for m in models])


def _notes(
    models: Sequence[Weights], names: Sequence[str] | None, reference: Weights
) -> tuple[str, ...]:
    folders = dict(zip(_labels(models, names), (m.folder for m in models), strict=True))
    differing = tokenizers_note(folders)
    return (f"{differing}; the one of {reference.folder} is written",) if differing else ()
