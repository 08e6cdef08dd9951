"""Heads of a combination: every policy, what it refuses, and taking one of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pem_composition.arithmetic.head_policies import side_by_side
from pem_composition.config import HeadInfo, LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM, analogy, combine, negate

WIDTH = 5


def module(
    name: str, labels=("no", "yes"), *, seed: int = 0, deep: bool = False, problem="classification"
) -> PEM:
    """One layer, a linear head; deep: with a layer before it, the same for every seed."""
    g = torch.Generator().manual_seed(seed)
    rows = max(len(labels), 1)
    tensors = {
        "b.0.q.lora_A": torch.randn(2, 4, generator=g),
        "b.0.q.lora_B": torch.randn(3, 2, generator=g),
        "classifier.out_proj.weight.head": torch.randn(rows, WIDTH, generator=g),
        "classifier.out_proj.bias.head": torch.randn(rows, generator=g),
    }
    if deep:
        tensors["classifier.dense.weight.head"] = torch.eye(WIDTH)
    info = HeadInfo(labels if problem == "classification" else (), problem)
    return PEM(tensors, LoraConfig(2, 2, ("q",)), name=name, head=info)


def bare(name: str) -> PEM:
    whole = module(name)
    return replace(whole, tensors=whole.adapter_tensors(), head=None)


RTE = module("rte", ("entailment", "not_entailment"), seed=1)
MNLI = module("mnli", ("entailment", "neutral", "contradiction"), seed=2)
SST2 = module("sst2", ("negative", "positive"), seed=3)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_per_task_keeps_every_head_under_the_modules_name(space):
    merged = combine([RTE, MNLI, bare("lm")], [0.3, 0.5, 0.2], space=space, head="per-task")
    assert list(merged.heads) == ["rte", "mnli"]
    assert (merged.head, merged.head_tensors()) == (None, {})
    for source in (RTE, MNLI):
        chosen = merged.with_head(source.name)
        assert equal(chosen.head_tensors(), source.head_tensors())
        assert chosen.head == source.head
        assert chosen.heads == {}
        assert equal(chosen.adapter_tensors(), merged.adapter_tensors())


def test_heads_beside_a_module_travel_through_per_task_first_last_and_negation():
    both = replace(combine([RTE, MNLI], [0.5, 0.5], head="per-task"), name="both")
    assert list(combine([both, SST2], [1, 1], head="per-task").heads) == ["rte", "mnli", "sst2"]
    assert list(combine([both, SST2], [1, 1], head="first").heads) == ["rte", "mnli"]
    assert combine([SST2, both], [1, 1], head="first").heads == {}
    assert list(negate(both).heads) == ["rte", "mnli"]
    assert list(analogy(both, bare("x"), bare("y"), head="first").heads) == ["rte", "mnli"]
    averaged = combine([both, SST2], [1, 1])
    assert averaged.heads == {}
    assert "heads kept beside both are left out: rte, mnli" in averaged.provenance.notes


def test_concat_is_one_head_over_all_labels_and_clashes_are_named():
    merged = combine([RTE, MNLI, SST2], [1, 1, 1], head="concat")
    assert merged.head.labels == (
        "rte/entailment", "not_entailment",
        "mnli/entailment", "neutral", "contradiction", "negative", "positive",
    )  # fmt: skip
    note = "labels of several heads are written NAME/LABEL: entailment (rte, mnli)"
    assert note in merged.provenance.notes
    weight = merged.head_tensors()["classifier.out_proj.weight"]
    parts = [m.head_tensors()["classifier.out_proj.weight"] for m in (RTE, MNLI, SST2)]
    assert torch.equal(weight, torch.cat(parts))
    for source in (RTE, MNLI, SST2):
        chosen = merged.with_head(source.name)
        assert equal(chosen.head_tensors(), source.head_tensors())
        assert chosen.head.labels == source.head.labels


def test_a_concatenated_head_gives_every_tasks_own_logits():
    merged = combine([RTE, MNLI], [1, 1], head="concat")
    h = torch.randn(3, WIDTH, dtype=torch.float64)

    def logits(m: PEM) -> torch.Tensor:
        head = {n: t.double() for n, t in m.head_tensors().items()}
        return h @ head["classifier.out_proj.weight"].T + head["classifier.out_proj.bias"]

    expected = torch.cat([logits(RTE), logits(MNLI)], dim=1)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-12)


def test_a_number_stands_beside_classes_as_in_a_jointly_trained_head():
    stsb = module("stsb", (), seed=4, problem="regression")
    merged = combine([RTE, stsb], [1, 1], head="concat")
    assert merged.head == side_by_side({"rte": RTE.head.labels, "stsb": ()})[0]
    chosen = merged.with_head("stsb")
    assert equal(chosen.head_tensors(), stsb.head_tensors()) and chosen.head == stsb.head
    again = combine([merged, SST2], [1, 1], head="concat")
    assert again.head.labels == (*RTE.head.labels, "stsb", *SST2.head.labels)
    alone = combine([merged], [0.5], head="concat")
    assert alone.head == merged.head and equal(alone.head_tensors(), merged.head_tensors())


def test_a_concatenated_head_counts_as_its_parts():
    merged = combine([RTE, MNLI], [1, 1], head="concat")
    assert list(combine([merged, SST2], [1, 1], head="per-task").heads) == ["rte", "mnli", "sst2"]
    again = combine([merged, SST2], [1, 1], head="concat")
    assert equal(again.with_head("mnli").head_tensors(), MNLI.head_tensors())


def test_layers_before_the_output_must_be_equal_to_concatenate():
    a, b = module("a", deep=True, seed=1), module("b", ("x", "y"), deep=True, seed=2)
    merged = combine([a, b], [1, 1], head="concat")
    assert torch.equal(merged.head_tensors()["classifier.dense.weight"], torch.eye(WIDTH))
    moved = dict(b.tensors) | {"classifier.dense.weight.head": 2 * torch.eye(WIDTH)}
    with pytest.raises(IncompatibleModules, match=r"classifier.dense.weight differs.*per-task"):
        combine([a, replace(b, tensors=moved)], [1, 1], head="concat")


@pytest.mark.parametrize(
    ("modules", "policy", "message"),
    [
        ((RTE, module("r", problem="causal_lm")), "concat", "found causal_lm"),
        ((RTE, module("r", problem="regression")), "concat", "0 labels, 2 rows"),
        ((RTE, replace(MNLI, name="rte")), "concat", "two heads of one name; found 'rte'"),
        ((RTE, replace(MNLI, name="rte")), "per-task", "two heads of one name"),
        ((RTE, replace(MNLI, name="../x")), "per-task", "no plain name; found '../x'"),
        ((RTE, replace(MNLI, name=".hidden")), "concat", "no plain name"),
        ((RTE, replace(MNLI, head=HeadInfo(("a",)))), "concat", "1 labels, 3 rows"),
        ((RTE, MNLI), "mean", "found 'mean', expected average, first, last, none, error, per-task"),
    ],
)
def test_what_a_policy_cannot_do_is_refused_by_name(modules, policy, message):
    with pytest.raises(PEMError, match=message):
        combine(modules, [1, 1], head=policy)


def test_labels_that_nobody_named_are_numbered():
    a, b = (replace(m, head=HeadInfo(problem="classification")) for m in (RTE, MNLI))
    assert combine([a, b], [1, 1], head="concat").head.labels == (
        "rte/LABEL_0", "rte/LABEL_1", "mnli/LABEL_0", "mnli/LABEL_1", "LABEL_2",
    )  # fmt: skip


def test_an_unknown_head_meets_those_that_there_are():
    for policy in ("per-task", "concat"):
        merged = combine([RTE, MNLI], [1, 1], head=policy)
        with pytest.raises(PEMError, match="head 'cola': no head of that name; found rte, mnli"):
            merged.with_head("cola")
    with pytest.raises(PEMError, match="found no named heads"):
        RTE.with_head("rte")


def test_first_and_last_pass_over_modules_without_a_head():
    lm = bare("lm")
    assert equal(combine([lm, RTE], [1, 1], head="first").head_tensors(), RTE.head_tensors())
    assert combine([lm, RTE], [1, 1], head="first").head == RTE.head
    assert combine([lm, lm], [1, 1], head="concat").head_tensors() == {}
