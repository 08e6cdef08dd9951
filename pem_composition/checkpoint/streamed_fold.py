"""An expression over modules folded into a checkpoint, tensor by tensor; no model is built.

    theta = theta_0 + sum over the terms of their updates

LoRA, (IA)^3 and whole models can stand in one expression: W_0 * l + s B A + sum_i c_i (theta_i -
theta_0), the updates of each kind composed first. Memory: the adapters, and see ``blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

from pem_composition.arithmetic import head_policies, trees
from pem_composition.arithmetic.compatible import check_same_base, no_logarithm
from pem_composition.arithmetic.expression import parse
from pem_composition.arithmetic.head_policies import ONE_HEAD
from pem_composition.arithmetic.labels import notes_of
from pem_composition.arithmetic.methods.registry import SUM
from pem_composition.arithmetic.patterns import compile_pattern
from pem_composition.checkpoint.checksums import Checksums
from pem_composition.checkpoint.content import FULL
from pem_composition.checkpoint.files import check_apart
from pem_composition.checkpoint.fold_plan import FoldPlan, Parts
from pem_composition.checkpoint.full import Weights, aligned, base_folder_of, is_head
from pem_composition.checkpoint.model_folder import class_end, with_head
from pem_composition.checkpoint.provenance import base_identity
from pem_composition.checkpoint.store import inspect_header, load, locate
from pem_composition.checkpoint.stored_names import resized, untied
from pem_composition.checkpoint.whole import hashed, opened, write_whole
from pem_composition.composition import check_patterns, compose
from pem_composition.config import IN_BASE, FullConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM, in_dtype
from pem_composition.record import Provenance, Recipe, Source, Term, leaf


def fold_checkpoint(
    expression: str | trees.Sum,
    modules: Mapping[str, str | PathLike[str]],
    base: str | PathLike[str],
    out: str | PathLike[str],
    *,
    space: str | None = None,
    head: str = "average",
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the base with an expression over modules folded in, as a model folder.

    The certificate is the relative error of the update that is in the file, against the same
    expression in float64: norm(written - theta) / norm(theta - theta_0), by tensor and in total.
    A part saved whole is as in a module's certificate: 0, or unknown where a policy chose it.

    Args:
        modules: name in the expression -> directory; whole models are differences to ``base``.
        space: of sums, as for ``compose``, where all modules are of one kind; expressions over
            several kinds are sums of updates (delta).
        head: average, first, last, none (the base's is left) or error; written in place of the
            base's own.
        dtype: of the written tensors; default: each as the base stores it.

    Raises:
        IncompatibleModules: another base, a layer that the checkpoint lacks, or another shape.
        PEMError: an expression, space or head policy that cannot be folded.
    """
    tree = parse(expression) if isinstance(expression, str) else expression
    folder = base_folder_of(base, out)
    check_apart(out, [folder, *modules.values()])
    with ExitStack() as stack:
        original = stack.enter_context(Weights(folder))
        parts = _parts(tree, modules, original, space, head, dtype, allow_base_mismatch, stack)
        plan = FoldPlan(original, original.config, parts)
        config = _config(original.config, plan, parts)
        # another class has another head in the place of the base's
        heads = not parts.head or config.get("architectures") == original.config.get(
            "architectures"
        )
        read = [m.folder for m in parts.models.values()]
        checksums = stack.enter_context(Checksums(read, [folder]))
        settings = {
            "expression": str(tree), "base": fspath(base), "space": space, "head": head,
            "allow_base_mismatch": allow_base_mismatch,
        }  # fmt: skip

        def describe(notes: tuple[str, ...]) -> PEM:
            return _described(tree, parts, plan, settings, checksums, notes)

        write_whole(
            out,
            lambda target: plan.outputs(target, heads=heads),
            config,
            folder,
            describe,
            checksums,
            dtype=dtype,
            overwrite=overwrite,
        )


def _parts(
    tree: trees.Sum,
    modules: Mapping[str, str | PathLike[str]],
    original: Weights,
    space: str | None,
    head: str,
    dtype: str | None,
    allow_base_mismatch: bool,
    stack: ExitStack,
) -> Parts:
    """Read the modules (whole models are only opened) and compose what is of one kind."""
    if head not in ONE_HEAD:
        raise PEMError.build(
            "head", "unknown policy", found=repr(head), expected=", ".join(ONE_HEAD)
        )
    own, models, sources = _read(tree, modules, original, allow_base_mismatch, stack)
    own = {name: in_dtype(module, dtype) for name, module in own.items()}
    kinds = {name: module.kind for name, module in own.items()}
    groups = _by_kind(tree, kinds)
    mixed = len(groups) > 1
    if mixed and space not in (None, "delta"):
        raise PEMError.build(
            "space", "modules of several kinds have sums of updates only", found=f"space {space}",
            expected="space delta", do="leave --space out",
        )  # fmt: skip
    space = "delta" if mixed else space or trees.default_space(tree)
    options: dict[str, Any] = {"space": space, "allow_base_mismatch": allow_base_mismatch}
    # of several kinds the heads and parts saved whole are chosen together, below
    bare = {n: replace(m, tensors=m.adapter_tensors(), heads={}) for n, m in own.items()}
    alone = tree.lone
    dora = isinstance(alone, trees.Leaf) and getattr(own[alone.name].config, "use_dora", False)
    if dora:  # it has no sum, not even of itself
        adapters: tuple[PEM, ...] = tuple(own.values())
    else:
        adapters = tuple(
            compose(part, bare if mixed else own, head=head, **options)
            for kind, part in groups.items()
            if kind != "full"
        )
    full = groups.get("full")
    if full is not None:
        spaces = [n.space for n in trees.nodes(full) if isinstance(n, trees.Within)]
        if "log" in (space, *spaces):
            raise no_logarithm(trees.names(full)[0], "full")
        _check_layers(full, models)
    if dora:
        chosen = head_policies.choose(list(own.values()), [1.0], head)
    elif full is None and not mixed:
        chosen = _chosen(adapters[0])
    else:
        chosen = _head(tree, own, kinds, options, head)
    notes = tuple(dict.fromkeys(n for m in adapters for n in notes_of(m)))
    return Parts(
        adapters, full, models, chosen.tensors, chosen.info, _class(own), sources, space,
        notes + chosen.notes,
        frozenset(n for m in own.values() for n in m.config.extra.get(IN_BASE) or ()), chosen.saved,
    )  # fmt: skip


def _chosen(composed: PEM) -> head_policies.ChosenHead:
    """The head that a composed module has, and which of its saved parts its certificate knows."""
    certificate = composed.provenance.certificate
    errors = certificate.layers if certificate else {}
    saved = {n: math.isfinite(e) for n, e in errors.items() if n not in composed.layers}
    return head_policies.ChosenHead(composed.head_tensors(), composed.head, saved=saved)


def _class(own: Mapping[str, PEM]) -> str | None:
    """What the class of the first module with a head is called after its model, ``For...``."""
    extras = [m.config.extra for m in own.values() if m.head_names]
    return next((c for c in map(class_end, extras) if c), None)


def _read(
    tree: trees.Sum,
    modules: Mapping[str, str | PathLike[str]],
    original: Weights,
    allow_base_mismatch: bool,
    stack: ExitStack,
) -> tuple[dict[str, PEM], dict[str, Weights], tuple[Source, ...]]:
    """Every module (of a whole model the head alone), the open models, and what is recorded."""
    base = original.folder
    reference = PEM({}, FullConfig(), base_identity(base), name=f"--model {base}")
    own: dict[str, PEM] = {}
    models: dict[str, Weights] = {}
    sources = []
    for name in trees.names(tree):
        if name not in modules:
            raise PEMError.build(
                "expression", f"no module named {name!r}", found=f"names {sorted(modules)}"
            )
        folder, layout = locate(modules[name])
        if layout == FULL:
            models[name] = stack.enter_context(Weights(folder))
            known = aligned(models[name], original)
            own[name] = opened(
                name,
                models[name],
                lambda n, known=known: is_head(n) or n not in known,  # type: ignore[misc]
                inspect_header(folder).base,
            )
            (source,) = own[name].provenance.sources
        else:
            own[name] = load(folder, name=name)
            source = leaf(own[name])
        if not allow_base_mismatch:
            check_same_base(reference, own[name])
        sources.append(source)
    return own, models, tuple(sources)


def _check_layers(full: trees.Sum, models: Mapping[str, Weights]) -> None:
    """Refuse a merging method, and a pattern that matches no parameter of the whole models."""
    trees.coefficients(full, "")
    for node in trees.nodes(full):
        if isinstance(node, trees.ByLayer):
            known = [n for name in trees.names(node.sum) for n in models[name].infos]
            check_patterns([compile_pattern(p) for p, _ in node.factors], known, str(node.sum))


def _by_kind(tree: trees.Sum, kinds: Mapping[str, str]) -> dict[str, trees.Sum]:
    """The tree's terms by the kind of their modules; (IA)^3 before LoRA, whole models last.

    Raises:
        IncompatibleModules: a function over modules of several kinds.
    """
    found: dict[str, list[tuple[float, trees.Node]]] = {"ia3": [], "lora": [], "full": []}
    for c, node in _terms(tree, kinds):
        inside = {kinds[name]: name for name in trees.names(trees.Sum(((c, node),)))}
        if len(inside) > 1:
            raise IncompatibleModules.build(
                f"expression, {node}",
                "a function of modules of several kinds",
                found=" and ".join(f"{name} ({kind})" for kind, name in inside.items()),
                expected="modules of one kind",
                do="write a sum of functions instead",
            )
        found[next(iter(inside))].append((c, node))
    return {kind: trees.Sum(tuple(terms)) for kind, terms in found.items() if terms}


def _terms(tree: trees.Sum, kinds: Mapping[str, str]) -> Iterator[tuple[float, trees.Node]]:
    """Terms; a negation of, or an explicit sum of updates over, several kinds is its own terms."""
    for c, node in tree.terms:
        several = len({kinds[n] for n in trees.names(trees.Sum(((c, node),)))}) > 1
        if several and isinstance(node, trees.Negation):
            yield from _terms(node.sum.scaled(-c * node.strength), kinds)
        elif several and isinstance(node, trees.Within) and node.space == "delta" and not node.rank:
            yield from _terms(node.sum.scaled(c), kinds)
        else:
            yield c, node


def _head(
    tree: trees.Sum,
    own: Mapping[str, PEM],
    kinds: Mapping[str, str],
    options: Mapping[str, Any],
    policy: str,
) -> head_policies.ChosenHead:
    terms = list(_head_terms(tree, own, kinds, options))
    return head_policies.choose([m for _, m in terms], [c for c, _ in terms], policy)


def _head_terms(
    tree: trees.Sum, own: Mapping[str, PEM], kinds: Mapping[str, str], options: Mapping[str, Any]
) -> Iterator[tuple[float, PEM]]:
    """The operands whose heads a policy chooses from, with their coefficients."""
    for c, node in _terms(tree, kinds):
        if isinstance(node, trees.Leaf):
            yield c, own[node.name]
        elif kinds[trees.names(trees.Sum(((c, node),)))[0]] == "full":
            yield from (
                (w, own[n]) for n, w in trees.coefficients(trees.Sum(((c, node),)), "").items()
            )
        else:
            yield c, compose(trees.Sum(((1.0, node),)), own, **options)


def _config(config: Mapping[str, Any], plan: FoldPlan, parts: Parts) -> dict[str, Any]:
    """The base's configuration, for the tensors that the checkpoint now has."""
    if plan.unties:
        config = untied(config)
    if plan.vocabulary:
        config = resized(config, *plan.vocabulary)
    head = {n: tuple(t.shape) for n, t in parts.head.items() if is_head(n)}
    return with_head(config, head, parts.head_info, parts.class_end, plan.stored)


def _described(
    tree: trees.Sum,
    parts: Parts,
    plan: FoldPlan,
    settings: Mapping[str, Any],
    checksums: Checksums,
    notes: tuple[str, ...],
) -> PEM:
    """A PEM without tensors that carries what pem.json records."""
    sources = tuple(
        hashed(s.name, parts.models[s.name], checksums) if s.name in parts.models else s
        for s in parts.sources
    )
    return PEM(
        {},
        FullConfig(),
        base_identity(settings["base"]),
        head=parts.head_info,
        provenance=Provenance(
            terms=tuple(Term(c, str(node)) for c, node in tree.terms),
            sources=sources,
            space=parts.space,
            method=SUM,
            certificate=plan.certificate(),
            head_policy=settings["head"],
            notes=parts.notes + notes,
            recipe=Recipe("fold", settings, sources),
        ),
    )
