"""Sums of full models, tensor by tensor, without holding a model in memory.

theta = theta_0 + sum_i c_i (theta_i - theta_0) = sum_i c_i theta_i + (1 - sum_i c_i) theta_0,
so the base is needed only if the coefficients do not sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.card import license_of
from pem_composition.checkpoint.files import (
    FLOAT_DTYPES,
    TensorInfo,
    atomic_directory,
    is_file,
    read_json,
)
from pem_composition.checkpoint.full import (
    CONFIG,
    Weights,
    aligned,
    base_folder_of,
    check_equal,
    head_info,
    is_head,
    is_model_file,
    write_companions,
    write_model,
)
from pem_composition.checkpoint.provenance import base_identity, model_type_of
from pem_composition.checkpoint.tensors import cast, info_of, save_dtype
from pem_composition.config import BaseIdentity, FullConfig
from pem_composition.errors import CheckpointError, IncompatibleModules, PEMError
from pem_composition.module import PEM, Provenance, Term
from pem_composition.recipe import Recipe, Source

if TYPE_CHECKING:
    from torch import Tensor

HEAD_POLICIES = ("average", "first", "last", "none", "error")


def combine_full(
    models: Sequence[str | PathLike[str]],
    coefficients: Sequence[float],
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    head: str = "average",
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write sum_i c_i theta_i + (1 - sum_i c_i) theta_0 as a model folder, tensor by tensor.

    Args:
        models: folders of models of one architecture; config and tokenizer are the first's.
        base: theta_0; needed only if the coefficients do not sum to 1.
        head: average (weights |c_i| / sum |c_j|), first, last, none, or error if the heads differ.
        dtype: of the written tensors; default float32 (float64 kept).

    Raises:
        IncompatibleModules: tensors, shapes or integer buffers differ.
        PEMError: wrong coefficients or policy, or a base that is needed and not given.
    """
    folders = [_model_folder(m) for m in models]
    weights = [float(c) for c in coefficients]
    rest = _check_request(folders, weights, head, base)
    with ExitStack() as stack:
        opened = [stack.enter_context(Weights(f)) for f in folders]
        original = stack.enter_context(Weights(base_folder_of(base, out))) if rest else None
        plan = _Plan(opened, weights, original, rest, head)
        target = save_dtype(dtype)
        keep = lambda entry: not is_model_file(entry)  # noqa: E731
        with atomic_directory(out, overwrite, keep=keep) as folder:
            write_model(folder, plan.infos(target), lambda n: plan.value(n, target))
            config = read_json(folders[0] / CONFIG, folders[0])
            write_companions(folders[0], folder, config, target)
            provenance.write(
                _described(opened, weights, base, head, config, Path(fspath(out)).name),
                folder,
                {"format": "peft", "dtype": dtype},
            )


def _model_folder(path: str | PathLike[str]) -> Path:
    folder = Path(fspath(path))
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
    folders: Sequence[Path], weights: Sequence[float], head: str, base: str | PathLike[str] | None
) -> float:
    """The base's weight 1 - sum c, 0 if the coefficients sum to 1."""
    if not folders or len(folders) != len(weights):
        raise IncompatibleModules.build(
            "coefficients",
            "one coefficient per model is needed",
            found=f"{len(weights)} coefficients for {len(folders)} models",
        )
    for c in weights:
        if not math.isfinite(c):
            raise PEMError.build("coefficients", "a coefficient must be a finite number", found=c)
    if head not in HEAD_POLICIES:
        raise PEMError.build(
            "head", "unknown policy", found=repr(head), expected=", ".join(HEAD_POLICIES)
        )
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


class _Plan:
    """Which tensors are written and how each is computed."""

    def __init__(
        self,
        models: Sequence[Weights],
        weights: Sequence[float],
        base: Weights | None,
        rest: float,
        head: str,
    ) -> None:
        self._models, self._weights, self._base, self._rest, self._head = (
            models,
            weights,
            base,
            rest,
            head,
        )
        first = models[0]
        shared = [n for n in first.infos if not is_head(n)]
        heads = {n for m in models for n in m.infos if is_head(n)}
        chosen = models[-1 if head == "last" else 0]
        self._names = shared + (
            [] if head == "none" else sorted(n for n in heads if n in chosen.infos)
        )
        compared = set(first.infos) if head in ("average", "error") else set(shared)
        for other in models[1:]:
            names = {n for n in other.infos if head in ("average", "error") or not is_head(n)}
            _check_same(first, other, compared, names)
        self._base_names = aligned(first, base) if base is not None else {}
        self._chosen = chosen

    def infos(self, dtype: Any) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor to write."""
        import torch

        out = {}
        for name in self._names:
            info = self._source(name).infos[name]
            if info.dtype in FLOAT_DTYPES:
                wide = (
                    torch.float64
                    if any(m.infos[name].dtype == "F64" for m in self._readers(name))
                    else torch.float32
                )
                info = TensorInfo(info_of(torch.empty(0, dtype=dtype or wide)).dtype, info.shape)
            out[name] = info
        return out

    def _source(self, name: str) -> Weights:
        return self._chosen if is_head(name) else self._models[0]

    def _readers(self, name: str) -> Sequence[Weights]:
        single = is_head(name) and self._head in ("first", "last")
        return [self._chosen] if single else self._models

    def value(self, name: str, dtype: Any) -> Tensor:
        """The combined tensor in the dtype to write."""
        if self._source(name).infos[name].dtype not in FLOAT_DTYPES:
            for other in self._models[1:]:
                check_equal(self._models[0], other, name, name)
            return self._models[0].raw(name).contiguous()
        if is_head(name):
            return cast(self._head_value(name), name, dtype, self._source(name).folder)
        total = self._models[0].value(name) * self._weights[0]
        for model, weight in zip(self._models[1:], self._weights[1:], strict=True):
            total = total + model.value(name) * weight
        if self._base is not None:
            total = total + self._base.value(self._base_names[name]) * self._rest
        return cast(total, name, dtype, self._models[0].folder)

    def _head_value(self, name: str) -> Tensor:
        values = [m.value(name) for m in self._readers(name)]
        if self._head == "error" and not all(v.equal(values[0]) for v in values):
            raise IncompatibleModules.build(
                "head",
                "the heads differ",
                found=f"different values of {name}",
                expected="equal heads",
                do="choose --head average, first, last or none",
            )
        if self._head != "average":
            return values[0]
        size = math.fsum(abs(w) for w in self._weights)
        shares = [abs(w) / size for w in self._weights] if size else [1 / len(values)] * len(values)
        total = values[0] * shares[0]
        for value, share in zip(values[1:], shares[1:], strict=True):
            total = total + value * share
        return total


def _check_same(first: Weights, other: Weights, names: set[str], others: set[str]) -> None:
    only = sorted(names ^ others)
    if only:
        raise IncompatibleModules.build(
            other.folder,
            f"tensor {only[0]!r} is in one model only",
            found=f"{len(others)} tensors",
            expected=f"the {len(names)} of {first.folder}",
            do="keep one head (--head first|last)"
            if is_head(only[0])
            else "use models of one architecture",
        )
    for name in sorted(names):
        a, b = first.infos[name], other.infos[name]
        if a.shape != b.shape or (a.dtype in FLOAT_DTYPES) != (b.dtype in FLOAT_DTYPES):
            raise IncompatibleModules.build(
                other.folder,
                f"tensor {name!r} differs",
                found=f"{b.dtype} {b.shape}",
                expected=f"{a.dtype} {a.shape} as in {first.folder}",
                do="keep one head (--head first|last)"
                if is_head(name)
                else "use models of one architecture",
            )


def _described(
    models: Sequence[Weights],
    weights: Sequence[float],
    base: str | PathLike[str] | None,
    head: str,
    config: Mapping[str, Any],
    name: str,
) -> PEM:
    """A PEM without tensors that carries what pem.json records."""
    has_head = head != "none" and any(is_head(n) for n in models[0].infos)
    labels = [m.folder.resolve().name for m in models]
    sources = tuple(
        Source(label, str(m.folder), m.sha256(), license=license_of(m.folder))
        for label, m in zip(labels, models, strict=True)
    )
    settings = {
        "coefficients": list(weights),
        "base": None if base is None else fspath(base),
        "head": head,
    }
    return PEM(
        tensors={},
        config=FullConfig(),
        base=base_identity(base)
        if base is not None
        else BaseIdentity(model_type=model_type_of(config)),
        name=name,
        head=head_info(config) if has_head else None,
        provenance=Provenance(
            terms=tuple(Term(c, label) for c, label in zip(weights, labels, strict=True)),
            sources=sources,
            space="parameter",
            method="sum",
            head_policy=head,
            recipe=Recipe("combine_full", settings, sources),
        ),
    )
