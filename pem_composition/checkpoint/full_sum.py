"""Combinations of full models, tensor by tensor, without holding a model in memory.

theta = theta_0 + sum_i c_i (theta_i - theta_0) = sum_i c_i theta_i + (1 - sum_i c_i) theta_0,
so the base is needed only if the coefficients do not sum to 1; a merging method f always needs it,
theta = theta_0 + f(c_1 (theta_1 - theta_0), ..., c_T (theta_T - theta_0)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pem_composition.arithmetic import head_policies
from pem_composition.arithmetic.algebra import as_numbers, check_request
from pem_composition.arithmetic.compatible import check_coefficients_of
from pem_composition.arithmetic.labels import method_text
from pem_composition.arithmetic.methods.registry import SIMPLE, Choice, resolve
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.files import check_apart, snapshot_of
from pem_composition.checkpoint.full import Weights, aligned, base_folder_of, head_info, is_head
from pem_composition.checkpoint.full_plan import SumPlan
from pem_composition.checkpoint.provenance import base_identity, model_type_of
from pem_composition.checkpoint.vocabulary import tokenizers_note
from pem_composition.checkpoint.whole import hashed, opened, write_whole
from pem_composition.config import TOKEN_POLICIES, BaseIdentity, FullConfig, HeadInfo
from pem_composition.errors import CheckpointError, PEMError
from pem_composition.module import PEM, in_dtype
from pem_composition.record import Provenance, Recipe, Source, Term
from pem_composition.safe_files import is_file


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

    Memory: see ``blocks`` and ``stream``; under 0.1 GB for a sum, 0.3 GB for a method on three
    models, beside torch itself. A method's result is that of ``module.combine`` on the differences,
    bit for bit.

    Args:
        models: folders of models of one architecture; config and tokenizer are the first's.
        base: theta_0; a sum needs it only if the coefficients do not sum to 1.
        head: average (weights |c_i| / sum |c_j|), first, last, none (the base's, where one is given
            that has one), or error if the heads differ.
        dtype: of the written tensors; default: each as the first model stores it.
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
    weights = as_numbers(coefficients)
    choice = resolve(method, settings, "full")
    rest = _check_request(folders, weights, head, tokens, base, choice)
    with ExitStack() as stack:
        inputs = [stack.enter_context(Weights(f)) for f in folders]
        read = rest or (base is not None and head == "none")
        original = stack.enter_context(Weights(base_folder_of(base, out))) if read else None
        plan = SumPlan(inputs, weights, original if rest else None, rest, tokens, choice)
        labels = list(names or [m.folder.resolve().name for m in inputs])
        chosen = _head(plan, inputs, labels, weights, head, dtype)
        # Without a head of the models a checkpoint keeps the one that its base has.
        holder = original if head == "none" else None
        if holder is not None and not rest and any(map(is_head, holder.infos)):
            aligned(inputs[0], holder, rows=tokens != "error")
        config = plan.config(_headed(inputs, head, holder))
        written = [*chosen.tensors, *(holder.infos if holder is not None else ())]
        info = head_info(config) if any(map(is_head, written)) else None
        bases = [original.folder] if original is not None else []
        checksums = stack.enter_context(Checksums([m.folder for m in inputs], bases))
        settings = {
            "coefficients": weights, "base": None if base is None else fspath(base),
            "head": head, "method": choice.method, "settings": choice.as_dict(),
            "tokens": tokens,
        }  # fmt: skip
        said = chosen.notes + _tokenizers(inputs, labels, plan.reference)

        def describe(notes: tuple[str, ...]) -> PEM:
            pairs = zip(labels, inputs, strict=True)
            sources = tuple(hashed(label, m, checksums) for label, m in pairs)
            return _described(plan, choice, settings, sources, info, said + notes)

        write_whole(
            out,
            lambda target: plan.outputs(chosen.tensors, target, own=holder),
            config,
            plan.reference.folder,
            describe,
            checksums,
            dtype=dtype,
            overwrite=overwrite,
            threads=choice.method != SIMPLE,
        )


def _head(
    plan: SumPlan,
    models: Sequence[Weights],
    labels: Sequence[str],
    weights: Sequence[float],
    head: str,
    dtype: str | None,
) -> head_policies.ChosenHead:
    """The head that the policy makes of the models'."""
    modules = [
        in_dtype(opened(label, m, partial(plan.is_apart, m), BaseIdentity()), dtype)
        for label, m in zip(labels, models, strict=True)
    ]
    return head_policies.choose(modules, weights, head)


def _headed(models: Sequence[Weights], head: str, base: Weights | None) -> Weights:
    """The model whose head is written, with its class and labels: one that has a head, if any."""
    holders = [m for m in ([base] if base else models) if any(map(is_head, m.infos))]
    place = -1 if head == "last" else 0
    return models[place] if models[place] in holders or not holders else holders[place]


def _model_folder(path: str | PathLike[str]) -> Path:
    folder = snapshot_of(Path(fspath(path)))
    if not is_file(folder / MODEL_CONFIG):
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
    check_request(folders, weights, what="models")
    for what, policy, known in (
        ("head", head, head_policies.ONE_HEAD),
        ("tokens", tokens, TOKEN_POLICIES),
    ):
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
    plan: SumPlan,
    choice: Choice,
    settings: Mapping[str, Any],
    sources: tuple[Source, ...],
    head: HeadInfo | None,
    notes: tuple[str, ...],
) -> PEM:
    """A PEM without tensors that carries what pem.json records."""
    base = settings["base"]
    own = BaseIdentity(model_type=model_type_of(plan.reference.config))
    terms = zip(settings["coefficients"], sources, strict=True)
    return PEM(
        {},
        FullConfig(),
        own if base is None else base_identity(base),
        head=head,
        provenance=Provenance(
            terms=tuple(Term(c, source.name) for c, source in terms),
            sources=sources,
            space=choice.entry.space if choice.method != SIMPLE else "parameter",
            method=method_text(choice, None),
            certificate=plan.certificate(),
            head_policy=settings["head"],
            notes=notes,
            recipe=Recipe("combine_full", settings, sources),
        ),
    )


def _tokenizers(
    models: Sequence[Weights], labels: Sequence[str], reference: Weights
) -> tuple[str, ...]:
    folders = dict(zip(labels, (m.folder for m in models), strict=True))
    differing = tokenizers_note(folders)
    return (f"{differing}; the one of {reference.folder} is written",) if differing else ()
