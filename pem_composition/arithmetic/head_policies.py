"""Heads of a combination: by an explicit policy, outside the sum. Needs no torch until it computes.

A head is what a task adds to the base: parameters that have no neutral value, so no sum of their
own. One of them is the module's head; others can be kept beside it under a name.

Parameters of the base that a module saves whole (embeddings, norms, lm_head) follow the same
policy, each for itself: their sum would be theta_0 + sum_i c_i (theta_i - theta_0), which the
modules tell only where theta_0 falls out of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pem_composition.arithmetic.algebra import HEAD_REMEDY, average_heads
from pem_composition.arithmetic.updates import save_dtype
from pem_composition.config import CLASSIFIERS, IN_BASE, Head, HeadInfo, is_head, tied_bias
from pem_composition.errors import IncompatibleModules, PEMError, listing

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.operand import Operand

ONE_HEAD = ("average", "first", "last", "none", "error")  # all that a whole checkpoint can have
POLICIES = (*ONE_HEAD, "per-task", "concat")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)  # it becomes the name of a file
OUTPUT_MODULES = ("classifier", "out_proj", "score", "logits_proj")
TASKS = "tasks"  # in HeadInfo.extra of a concatenated head: name -> start, stop, labels
APART = "keep them apart (--head per-task)"


class ChosenHead(NamedTuple):
    """The head of a combination, heads beside it, and what has to be said about them."""

    tensors: Mapping[str, Tensor] = {}
    info: HeadInfo | None = None
    beside: Mapping[str, Head] = {}
    notes: tuple[str, ...] = ()
    saved: Mapping[str, bool] = {}  # parameter of the base -> is it what the sum says?


def own_head(module: Operand) -> dict[str, Tensor]:
    """Parameters of the task's head by their name in the model."""
    return {n: t for n, t in module.head_tensors().items() if is_head(n)}


def saved_parts(module: Operand) -> dict[str, Tensor]:
    """Parameters of the base that the module saves whole."""
    return {n: t for n, t in module.head_tensors().items() if not is_head(n)}


def choose(
    modules: Sequence[Operand],
    coefficients: Sequence[float],
    policy: str,
    dtype: str | None = None,
) -> ChosenHead:
    """The head that a policy gives to sum_i c_i m_i.

    average: sum_i |c_i| h_i / sum_i |c_i|; first, last: one of them; error: all must be equal;
    none; per-task: every head is kept under its module's name; concat: one head over all labels.

    Args:
        dtype: that the result will be rounded to; a saved part that it changes is not the sum.

    Raises:
        PEMError: an unknown policy, or heads that it cannot be applied to, by name.
    """
    if policy not in POLICIES:
        raise PEMError.build(
            "head", "unknown policy", found=repr(policy), expected=", ".join(POLICIES)
        )
    chosen = _head(modules, coefficients, policy)
    parts = _parts(modules, coefficients, policy)
    if not parts:
        return chosen
    tensors = {n: t for n, (t, _) in parts.items() if t is not None}
    saved = {n: right and holds(t, dtype) for n, (t, right) in parts.items()}
    info = chosen.info or next((m.head for m in modules if m.head and tensors), None)
    return ChosenHead(
        {**chosen.tensors, **tensors}, info, chosen.beside,
        (*chosen.notes, _said(saved, policy)), saved,
    )  # fmt: skip


def _head(modules: Sequence[Operand], coefficients: Sequence[float], policy: str) -> ChosenHead:
    if policy == "per-task":
        return ChosenHead(beside=_named(modules))
    if policy == "concat":
        return _concatenated(modules)
    if policy in ("first", "last"):
        return _one(modules, -1 if policy == "last" else 0)
    held = [(m, h, c) for m, c in zip(modules, coefficients, strict=True) if (h := own_head(m))]
    notes = tuple(
        f"heads kept beside {m.name} are left out: {', '.join(m.heads)}" for m in modules if m.heads
    )
    if not held or policy == "none":
        return ChosenHead(notes=notes)
    check_answers([m for m, _, _ in held])
    infos = [m.head for m, _, _ in held if m.head is not None]
    info = next((i for i in infos if not i.numbered), infos[0] if infos else None)
    heads = [h for _, h, _ in held]
    if policy == "average":
        return ChosenHead(average_heads(heads, [c for _, _, c in held]), info, {}, notes)
    return ChosenHead(_equal(heads), info, {}, notes)


class Answering(Protocol):
    """A module, or its header, as far as its head goes."""

    @property
    def name(self) -> str: ...
    @property
    def head(self) -> HeadInfo | None: ...


def check_answers(modules: Sequence[Answering]) -> None:
    """Refuse to make one head of heads that answer something else: other classes, another order of
    them, or a number instead of a class. Labels that nobody named say nothing.

    Raises:
        IncompatibleModules: naming both modules and what they answer.
    """
    known = [(m.name, m.head) for m in modules if m.head is not None]
    for i, (name, head) in enumerate(known):
        for other, its in known[:i]:
            same = head.fits(its.labels) or its.fits(head.labels)
            if not same or (
                None not in (head.problem, its.problem) and head.problem != its.problem
            ):
                raise IncompatibleModules.build(
                    f"heads of {other} and {name}",
                    "they answer different classes" if not same else "they answer another question",
                    found=f"{_answers(its)} in {other} and {_answers(head)} in {name}",
                    expected="the same labels in the same order",
                    do=HEAD_REMEDY,
                )


def _answers(info: HeadInfo) -> str:
    return " ".join(info.labels) or str(info.problem)


def holds(tensor: Tensor | None, dtype: str | None) -> bool:
    """True if rounding to the dtype leaves every value as it is."""
    target = save_dtype(dtype)
    return tensor is None or target is None or tensor.equal(tensor.to(target).to(tensor.dtype))


# --- parameters of the base that are saved whole ------------------------------------------------

SAID = {
    "first": "the first module's", "last": "the last module's", "none": "left out",
    "error": "equal in all modules",
}  # fmt: skip


def _parts(
    modules: Sequence[Operand], coefficients: Sequence[float], policy: str
) -> dict[str, tuple[Tensor | None, bool]]:
    """Parameter -> its value, None for the base's own, and whether that is what the sum says."""
    held = [saved_parts(m) for m in modules]
    out: dict[str, tuple[Tensor | None, bool]] = {}
    for name in sorted({n for h in held for n in h}):
        own = {i: h[name] for i, h in enumerate(held) if name in h}
        _check_way(name, [modules[i] for i in own])
        shares = _shares(policy, coefficients, own)
        value = None
        if shares:
            terms = [{name: own[i]} for i in shares]
            value = average_heads(terms, list(shares.values()))[name]
        out[name] = value, _is_sum(own, shares, coefficients)
    # Some modules save the decoder alone, others the layer around it: its bias is one tensor.
    for copy in [n for n, (value, _) in out.items() if value is not None]:
        other = tied_bias(copy)
        if other in out and out[other][0] is not None:
            out[other] = out[copy]
    return out


def _check_way(name: str, holders: Sequence[Operand]) -> None:
    """Refuse two meanings of one parameter, which differ where it is tied to another one."""
    inside = [name in (m.config.extra.get(IN_BASE) or ()) for m in holders]
    if len(set(inside)) > 1:
        other = holders[inside.index(not inside[0])]
        raise IncompatibleModules.build(
            f"{holders[0].name} and {other.name}, {name}",
            "one saves it in the base, the other as a copy (modules_to_save)",
            expected="one way",
            do="save both alike, or leave it out (--head none)",
        )


def _shares(
    policy: str, coefficients: Sequence[float], own: Mapping[int, Tensor]
) -> dict[int, float]:
    """Module -> its share in the result; empty where the base's own value is kept."""
    if policy == "none":
        return {}
    if policy in ("first", "last"):
        chosen = 0 if policy == "first" else len(coefficients) - 1
        return {chosen: 1.0} if chosen in own else {}
    if policy == "error":
        first = next(iter(own.values()))
        if len(own) < len(coefficients) or not all(first.equal(t) for t in own.values()):
            _equal([{str(i): t} for i, t in own.items()])
        return {0: 1.0}
    total = sum(abs(coefficients[i]) for i in own)
    return {i: abs(coefficients[i]) / total for i in own} if total else {}


def _is_sum(
    own: Mapping[int, Tensor], shares: Mapping[int, float], coefficients: Sequence[float]
) -> bool:
    """True if sum_i share_i (t_i - t_0) = sum_i c_i (t_i - t_0) for any t_0: of each value, the
    shares are the coefficients."""
    values: list[tuple[Tensor, float]] = []
    for i, tensor in own.items():
        excess = shares.get(i, 0.0) - coefficients[i]
        at = next((k for k, (t, _) in enumerate(values) if t.equal(tensor)), None)
        if at is None:
            values.append((tensor, excess))
        else:
            values[at] = values[at][0], values[at][1] + excess
    return all(abs(excess) <= 1e-9 for _, excess in values)


def _said(saved: Mapping[str, bool], policy: str) -> str:
    """What has to be said about parameters that are saved whole."""
    names = list(saved)
    listed = listing(names, 4)
    how = SAID.get(policy, "the mean of those who save them, weights |c| / sum |c|")
    wrong = sum(not right for right in saved.values())
    verdict = (
        f"that is not the sum of updates, which needs the base, so its error is unknown ({wrong} "
        "of them)"
        if wrong
        else "that is the sum of updates, whatever the base"
    )
    return f"saved whole: {listed}: {how} (head policy {policy}); {verdict}"


# --- one of several -----------------------------------------------------------------------------


def _one(modules: Sequence[Operand], place: int) -> ChosenHead:
    """The first or last module's head and what lies beside it; another's if it has none."""
    chosen, holders = modules[place], [m for m in modules if own_head(m) or m.heads]
    notes: tuple[str, ...] = ()
    if chosen not in holders and holders:
        notes = (f"{chosen.name} has no head: that of {holders[place].name} is kept",)
        chosen = holders[place]
    tensors = own_head(chosen)
    return ChosenHead(tensors, chosen.head if tensors else None, dict(chosen.heads), notes)


def _equal(heads: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    first = heads[0]
    if any(h.keys() != first.keys() or any(not h[n].equal(first[n]) for n in h) for h in heads):
        raise IncompatibleModules.build(
            "head",
            "the heads differ",
            found=f"{len(heads)} heads",
            expected="equal heads",
            do=f"average them (--head average), or {HEAD_REMEDY}",
        )
    return first


def check_name(name: str) -> None:
    """Refuse a head's name that is no plain file name.

    Raises:
        PEMError: naming it.
    """
    if not NAME.fullmatch(name):
        raise PEMError.build(
            "head",
            "a head is kept under the name of its module, and this is no plain name",
            found=repr(name),
            expected="letters, digits, '_', '.', '-'",
            do="name the modules (--adatasks)",
        )


def _named(modules: Sequence[Operand]) -> dict[str, Head]:
    """Every module's head under the module's name, and the heads beside it under their own."""
    out: dict[str, Head] = {}
    for m in modules:
        for name, head in _heads_of(m).items():
            check_name(name)
            if name in out and not _same(out[name], head):
                raise IncompatibleModules.build(
                    "head",
                    "two heads of one name",
                    found=repr(name),
                    expected="one name per head",
                    do="name the modules (--adatasks)"
                    if name == m.name
                    else "keep those of one module (--head first or last)",
                )
            out[name] = head
    return out


def _same(a: Head, b: Head) -> bool:
    """True for one head, as that of a module that stands in a sum twice."""
    return (
        a.info == b.info
        and a.tensors.keys() == b.tensors.keys()
        and all(t.equal(b.tensors[n]) for n, t in a.tensors.items())
    )


def _heads_of(module: Operand) -> dict[str, Head]:
    """A concatenated head counts as the heads that it was made of."""
    own = own_head(module)
    parts = {name: select(module, name) for name in tasks_of(module.head)}
    whole = {module.name: Head(own, module.head or HeadInfo())} if own and not parts else {}
    return {**whole, **parts, **module.heads}


def tasks_of(info: HeadInfo | None) -> dict[str, Any]:
    """Name -> start, stop and labels of the parts of a concatenated head; empty for another."""
    tasks = info.extra.get(TASKS) if info else None
    if not isinstance(tasks, Mapping):
        return {}
    return {
        name: part
        for name, part in tasks.items()
        if isinstance(part, Mapping)
        and type(part.get("start")) is type(part.get("stop")) is int
        and isinstance(part.get("labels"), list)
    }


# --- one head over the labels of several --------------------------------------------------------


def _concatenated(modules: Sequence[Operand]) -> ChosenHead:
    """One classifier over the labels of all: the rows of their output layers, one below the other.

    Exact, so everything before the output layer has to be equal in all of them. A label that
    stands in two heads is written NAME/LABEL in both; a number is called by its head's name.
    """
    import torch

    heads = _named(modules)
    if not heads:
        return ChosenHead()
    layers = {name: output_layer(name, head) for name, head in heads.items()}
    _check_stackable(heads, layers)
    words = {name: _labels(name, head, layers[name]) for name, head in heads.items()}
    info, notes = side_by_side(words)
    first = next(iter(heads.values()))
    out = next(iter(layers.values()))
    tensors = {
        n: torch.cat([h.tensors[n] for h in heads.values()]) if _in(n, out) else t
        for n, t in first.tensors.items()
    }
    return ChosenHead(tensors, info, {}, notes)


def side_by_side(words: Mapping[str, Sequence[str]]) -> tuple[HeadInfo, tuple[str, ...]]:
    """One head over the outputs of several, and what has to be said of its labels.

    Args:
        words: name of a head -> its labels; none of one that gives a number, whose output is called
            by the head's name.
    """
    outputs = {name: tuple(own) or (name,) for name, own in words.items()}
    taken, notes = _clashes(outputs)
    tasks: dict[str, Any] = {}
    labels: list[str] = []
    for name, own in outputs.items():
        stop = len(labels) + len(own)
        tasks[name] = {"start": len(labels), "stop": stop, "labels": list(words[name])}
        labels += [f"{name}/{word}" if word in taken else word for word in own]
    return HeadInfo(tuple(labels), "classification", {TASKS: tasks}), notes


def output_layer(name: str, head: Head) -> str:
    """The linear layer of a head of classes or numbers that gives its outputs.

    Raises:
        IncompatibleModules: no such head, or no such layer in it.
    """
    problem = head.info.problem
    found = [
        layer
        for n in head.tensors
        if (layer := n.removesuffix(".weight")) != n and layer.split(".")[-1] in OUTPUT_MODULES
    ]
    known = problem in (None, *CLASSIFIERS)
    if not known or len(found) != 1:
        raise IncompatibleModules.build(
            f"head of {name}",
            "no head of classes or numbers to concatenate",
            found=", ".join(head.tensors) if known else problem,
            expected=f"one output layer ({' | '.join(OUTPUT_MODULES)})",
            do=APART,
        )
    return found[0]


def _in(name: str, layer: str) -> bool:
    return name.rpartition(".")[0] == layer


def _check_stackable(heads: Mapping[str, Head], layers: Mapping[str, str]) -> None:
    """Same parameters everywhere, equal ones before the output layer, equal widths in it."""
    (first_name, first), *others = heads.items()
    out = layers[first_name]
    for name, head in others:
        only = sorted(set(first.tensors) ^ set(head.tensors))
        differing = only or [
            n
            for n, t in first.tensors.items()
            if (t.shape[1:] != head.tensors[n].shape[1:] if _in(n, out)
                else not t.equal(head.tensors[n]))
        ]  # fmt: skip
        if differing:
            raise IncompatibleModules.build(
                f"heads of {first_name} and {name}",
                "cannot be one head",
                found=f"{differing[0]} {'in one only' if only else 'differs'}",
                expected=f"equal layers before {out}",
                do=APART,
            )


def _labels(name: str, head: Head, layer: str) -> tuple[str, ...]:
    rows = int(head.tensors[f"{layer}.weight"].shape[0])
    numbered = () if head.info.problem == "regression" else (f"LABEL_{i}" for i in range(rows))
    words = head.info.labels or tuple(numbered)
    if (len(words) or 1) != rows:
        raise IncompatibleModules.build(
            f"head of {name}",
            "its labels do not fit its output layer",
            found=f"{len(words)} labels, {rows} rows",
            expected="a label per row",
        )
    return words


def _clashes(words: Mapping[str, Sequence[str]]) -> tuple[set[str], tuple[str, ...]]:
    """Labels of more than one head, and a note that names them."""
    holders: dict[str, list[str]] = {}
    for name, own in words.items():
        for word in own:
            holders.setdefault(word, []).append(name)
    taken = {word: names for word, names in holders.items() if len(names) > 1}
    if not taken:
        return set(), ()
    listed = ", ".join(f"{word} ({', '.join(names)})" for word, names in taken.items())
    return set(taken), (f"labels of several heads are written NAME/LABEL: {listed}",)


# --- taking one of several ----------------------------------------------------------------------


def select(module: Operand, name: str) -> Head:
    """The head kept under a name, or the rows of a concatenated head that belong to it.

    Raises:
        PEMError: no such head; says which there are.
    """
    if name in module.heads:
        return module.heads[name]
    tasks = tasks_of(module.head)
    if name not in tasks:
        known = [*module.heads, *tasks]
        raise PEMError.build(
            f"{module.name}, head {name!r}",
            "no head of that name",
            found=", ".join(known) or "no named heads",
            do="give one of these" if known else "make the module with --head per-task or concat",
        )
    assert module.head is not None
    whole = Head(own_head(module), module.head)
    layer, own = output_layer(module.name, whole), tasks[name]
    tensors = {
        n: t[own["start"] : own["stop"]].clone() if _in(n, layer) else t
        for n, t in whole.tensors.items()
    }
    extra = {k: v for k, v in module.head.extra.items() if k != TASKS}
    labels = tuple(own["labels"])
    problem = module.head.problem if labels else "regression"
    return Head(tensors, HeadInfo(labels, problem, extra))
