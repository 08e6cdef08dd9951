"""A LoRA module out of two checkpoints: the best rank-R update of each linear layer.

    B A ~ W_tuned - W_base,   U S V^T = SVD(W_tuned - W_base),   B = U sqrt(S),  A = sqrt(S) V^T

with the R largest singular values, alpha = r. Layer by layer, nothing but the difference of one
layer in memory; ``randomized`` holds R + 10 columns of it instead (``methods.dense``).

Source of the best approximation: Eckart and Young 1936; randomised: arXiv:0909.4061.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.labels import method_text
from pem_composition.arithmetic.methods.registry import SIMPLE, resolve
from pem_composition.arithmetic.ranks import Rank, checked
from pem_composition.arithmetic.updates import cast, certified
from pem_composition.checkpoint.blocks import Differences
from pem_composition.checkpoint.changes import stores_transposed
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.files import FLOAT_DTYPES, snapshot_of
from pem_composition.checkpoint.full import (
    Weights,
    aligned,
    base_folder_of,
    head_info,
    is_head,
)
from pem_composition.checkpoint.model_folder import task_type_of
from pem_composition.checkpoint.provenance import base_identity
from pem_composition.checkpoint.stored_names import (
    class_of,
    is_of_experts,
    is_uncalled,
    is_vocabulary,
    renames_layers,
)
from pem_composition.config import LoraConfig, matches, pattern_keys
from pem_composition.errors import IncompatibleModules, PEMError, listing
from pem_composition.module import PEM
from pem_composition.record import Provenance, Recipe, Term
from pem_composition.safe_files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.terms import LayerError

ALGORITHMS = ("exact", "randomized")
# Components of names whose matrices are tables of vectors (beside those of ``stored_names``).
TABLES = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})


def extract_lora(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    *,
    rank: Rank,
    method: str = "exact",
    target_modules: Sequence[str] = (),
    strict: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    name: str | None = None,
) -> PEM:
    """The LoRA module of rank R nearest to the difference of two checkpoints, layer by layer.

    The certificate is the true relative error, of the factors as written: norm(B A - (W_tuned -
    W_base)) / norm(W_tuned - W_base) by layer, and over all adapted layers. Other tensors that
    differ (biases, norms, embeddings) are no part of it; a note says how many and how much. A head
    that differs becomes the module's.

    Args:
        rank: R; smaller where a matrix or the rank of its difference is. Or a share of each layer's
            energy, such as 0.95.
        method: exact (a dense SVD in float64) or randomized (subspace iteration, seeded).
        target_modules: layers by name or suffix; default: every linear layer that differs.
        strict: refuse where something differs that the module cannot hold.
        dtype: of the factors, rounded once from float64; default: float32.

    Raises:
        PEMError: a rank, method or target that cannot be, or (strict) a difference left out.
        IncompatibleModules: checkpoints of two architectures, equal ones, or of a class that
            renames the layers of its files.
    """
    _check_request(rank, method)
    folder = snapshot_of(Path(fspath(tuned)))
    with (
        Weights(base_folder_of(base, tuned)) as original,
        Weights(folder) as model,
        Checksums([folder], [original.folder]) as checksums,
    ):
        _check_names(folder, original.config)
        work = _Work(original, model, rank, method == "exact", seed, dtype)
        norms = work.norms()
        layers = work.moved(target_modules, norms)
        notes = _left_out(norms, layers, folder, strict=strict)
        tensors, errors = work.factors(layers)
        head = cast(work.head(), dtype)
        label = name or folder.resolve().name
        source = checksums.source(label, folder, model.sha256(checksums.of(folder)))
        config = _config(tensors, layers, work)
        raw = read_json(folder / MODEL_CONFIG, folder) if head else {}
        if head:
            config = replace(config, extra={"task_type": task_type_of(class_of(raw))})
    settings = {
        "base": fspath(base), "rank": rank, "method": method, "strict": strict, "seed": seed,
        "target_modules": list(target_modules), "dtype": dtype,
    }  # fmt: skip
    origin = Provenance(
        terms=(Term(1.0, label),),
        sources=(source,),
        space="delta",
        method=method_text(resolve(SIMPLE), rank),
        certificate=certified(errors),
        notes=notes,
        recipe=Recipe("extract_lora", settings, (source,)),
    )
    info = head_info(raw) if head else None
    return PEM(tensors | head, config, base_identity(base), label, info, origin)


def _check_request(rank: Rank, method: str) -> None:
    checked(rank)
    if method not in ALGORITHMS:
        raise PEMError.build(
            "method", "unknown", found=repr(method), expected=" or ".join(ALGORITHMS)
        )


def _check_names(where: Path, config: Mapping[str, Any]) -> None:
    if renames_layers(config):
        raise IncompatibleModules.build(
            where, "its class renames what the file holds, so no live model has a module's layers",
            found=f"model type {config.get('model_type')}",
            expected="a class whose files name its layers",
            do="keep the whole model: pem fold and pem merge --full_merge take it as it is",
        )  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """Two open checkpoints and what is wanted of them."""

    base: Weights
    tuned: Weights
    rank: Rank
    exact: bool
    seed: int
    dtype: str | None

    @cached_property
    def names(self) -> dict[str, str]:
        """Name in the tuned model -> name in the base."""
        return aligned(self.tuned, self.base)

    def layers(self, targets: Sequence[str]) -> list[str]:
        """Linear layers that an adapter acts on: those that the targets name, else all.

        Raises:
            PEMError: a target that names none.
        """
        found = [
            name.removesuffix(".weight")
            for name, info in sorted(self.tuned.infos.items())
            if name.endswith(".weight")
            and len(info.shape) == 2
            and info.dtype in FLOAT_DTYPES
            and not self.is_apart(name)
            and not is_uncalled(name.removesuffix(".weight"), self.tuned.infos)
            and not is_of_experts(name.removesuffix(".weight"), self.tuned.infos)
        ]
        for target in targets:
            if not any(matches(layer, target) for layer in found):
                known = sorted({layer.rpartition(".")[2] for layer in found})
                raise PEMError.build(
                    "target_modules",
                    f"{target!r} names no matrix of {self.tuned.folder}",
                    found=", ".join(known[:12]),
                    do="name some of these",
                )
        if targets:
            return [layer for layer in found if any(matches(layer, t) for t in targets)]
        return [layer for layer in found if not _is_table(layer)]

    def is_apart(self, name: str) -> bool:
        """True for a head, and for another part that the base has no value of (a new pooler)."""
        return is_head(name) or name not in self.names

    def moved(self, targets: Sequence[str], norms: Mapping[str, float]) -> list[str]:
        """The wanted layers that differ.

        Raises:
            IncompatibleModules: none does.
        """
        found = [layer for layer in self.layers(targets) if norms[f"{layer}.weight"]]
        if not found:
            others = sorted((n for n, norm in norms.items() if norm), key=lambda n: -norms[n])
            raise IncompatibleModules.build(
                self.tuned.folder,
                "no linear layer to extract",
                found="the wanted layers are equal to the base's"
                + (f"; others differ: {listing(others, 4)}" if others else ""),
                expected="other values in these layers",
                do="keep the whole model, or name linear layers that differ"
                if others
                else "give the base and a model that was tuned from it",
            )
        return found

    def factors(self, layers: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, LayerError]]:
        """lora_A and lora_B of every layer that differs, and the errors of what is written."""
        from pem_composition.arithmetic.methods import dense
        from pem_composition.arithmetic.methods.draws import Draws

        tensors: dict[str, Tensor] = {}
        errors: dict[str, LayerError] = {}
        names = self.names
        for layer in layers:
            weight = f"{layer}.weight"
            entries = self._difference(weight, names[weight])
            draws = Draws(self.seed, layer)
            found = dense.compressed(entries, _only, self.rank, draws, exact=self.exact)
            A, B = f"{layer}.lora_A", f"{layer}.lora_B"
            conv = stores_transposed(layer, self.tuned.infos)  # stores W^T = A^T B^T
            pair = (found.B_OR.mT, found.A_RI.mT) if conv else (found.A_RI, found.B_OR)
            own = {name: t.contiguous() for name, t in zip((A, B), pair, strict=True)}
            own = cast(own, self.dtype or "float32")
            written = (own[B].mT, own[A].mT) if conv else (own[A], own[B])
            errors[layer] = dense.error(
                entries, _only, found._replace(A_RI=written[0], B_OR=written[1])
            )
            tensors |= own
        return tensors, errors

    def _difference(self, name: str, in_base: str) -> Differences:
        """W_tuned - W_base, which float64 holds exactly where float32 stores both."""
        return Differences([(1.0, self.tuned, name)], self.base, in_base, exact=True)

    def norms(self) -> dict[str, float]:
        """Norm of the difference of every floating tensor outside the head."""
        return {
            name: _norm(self._difference(name, other))
            for name, other in self.names.items()
            if not is_head(name) and self.tuned.infos[name].dtype in FLOAT_DTYPES
        }

    def head(self) -> dict[str, Tensor]:
        """The tuned model's head and what else the base lacks, empty where it has the same."""
        names, infos = self.names, self.tuned.infos
        floating = (n for n in sorted(infos) if infos[n].dtype in FLOAT_DTYPES)
        heads = {n: self.tuned.value(n) for n in floating if self.is_apart(n)}
        same = all(
            n in names
            and self.base.infos[names[n]].shape == tuple(t.shape)
            and self.base.value(names[n]).equal(t)
            for n, t in heads.items()
        )
        return {} if same else {f"{n}.head": t for n, t in heads.items()}


def _is_table(layer: str) -> bool:
    """True for tables of vectors and output layers over the vocabulary."""
    known = is_vocabulary(f"{layer}.weight")
    return known or any(part in TABLES or "embed" in part for part in layer.split("."))


def _only(start: int, X_TNI: Tensor) -> Tensor:
    """The one update there is, as a rule."""
    return X_TNI[0]


def _norm(entries: Differences) -> float:
    from pem_composition.arithmetic.methods.entries import blocks

    return math.hypot(*(float(X.norm()) for _, X in blocks(entries)))


def _left_out(
    norms: Mapping[str, float], layers: Sequence[str], where: Path, *, strict: bool
) -> tuple[str, ...]:
    """What has to be said of differences that the module does not hold.

    Raises:
        PEMError: there are some, and none were to be left out.
    """
    held = {f"{layer}.weight" for layer in layers}
    rest = {name: norm for name, norm in norms.items() if norm and name not in held}
    if not rest:
        return ()
    share = math.hypot(*rest.values()) / math.hypot(*norms.values())
    names = sorted(rest, key=lambda n: -rest[n])
    found = f"{listing(names, 6)}; {share:.2g} of the difference's norm"
    if strict:
        raise PEMError.build(
            where,
            f"{len(rest)} tensors differ that the module cannot hold",
            found=found,
            expected="differences in the adapted layers only",
            do="leave --strict out to leave them out, or keep the whole model",
        )
    return (
        f"{len(rest)} tensors that differ are left out, {share:.2g} of the difference's norm: "
        f"{listing(names, 6)}",
    )


def _config(tensors: Mapping[str, Tensor], layers: Sequence[str], work: _Work) -> LoraConfig:
    """alpha = r in every layer: what is written is B A itself."""
    ranks = {layer: int(tensors[f"{layer}.lora_A"].shape[0]) for layer in layers}
    r, key_of = max(ranks.values()), pattern_keys(layers)
    own = {key_of[layer]: k for layer, k in ranks.items() if k != r}
    return LoraConfig(
        r=r,
        alpha=float(r),
        target_modules=_targets(layers, {n.rpartition(".")[0] for n in work.tuned.infos}),
        rank_pattern=own,
        alpha_pattern={key: float(k) for key, k in own.items()},
        fan_in_fan_out=all(stores_transposed(layer, work.tuned.infos) for layer in layers),
    )


def _targets(layers: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Last components of the names where these mean the adapted layers alone, else whole names."""
    suffixes = {layer.rpartition(".")[2] for layer in layers}
    meant = [layer for layer in known if layer.rpartition(".")[2] in suffixes]
    short = len(meant) == len(layers) and not any(s.isdigit() for s in suffixes)
    return tuple(sorted(suffixes)) if short else tuple(layers)
