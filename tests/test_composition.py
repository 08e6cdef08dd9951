"""Expressions on modules: what they compute, and that their text makes the same module again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_modules import LAYERS, full, ia3, lora, same_updates, updates

import pem_composition as pem
from pem_composition.arithmetic.methods.registry import METHODS, recorded
from pem_composition.errors import PEMError, UsageError

A, B, C = lora(0), lora(1, r=2, alpha=5), lora(2, r=4, alpha=2)
NAMED = {"m0": A, "m1": B, "m2": C}
EQUAL = {f"m{seed}": lora(seed, alpha=3) for seed in range(3)}  # scaling 1


def total(weights: dict[pem.PEM, float]) -> dict[str, np.ndarray]:
    return {x: sum(c * updates(m)[x] for m, c in weights.items()) for x in LAYERS}


def test_an_expression_of_sums_in_delta_space_is_exact():
    found = pem.compose("0.6*m0 + 0.4*(m1 - negate(m2, 0.5))", NAMED, space="delta")
    for layer, dw in total({A: 0.6, B: 0.4, C: 0.2}).items():
        np.testing.assert_allclose(updates(found)[layer], dw, atol=1e-12)
    assert len(found.provenance.terms) == 3  # one combination


def test_methods_inside_sums_are_updates_like_any_other():
    found = pem.compose("0.5*ties(m0, -0.5*m1, density=0.3) + 2*m2", NAMED)
    ties = pem.combine([A, B], [1.0, -0.5], method="ties", settings={"density": 0.3})
    for layer, dw in total({ties: 0.5, C: 2.0}).items():
        np.testing.assert_allclose(updates(found)[layer], dw, atol=1e-11)
    assert found.provenance.space == "delta"


def test_an_argument_that_is_a_sum_is_the_update_of_the_sum():
    found = pem.compose("tsv(m0, 0.5*(m1 - m2))", NAMED)
    difference = pem.combine([B, C], [0.5, -0.5], space="delta")
    same_updates(found, pem.combine([A, difference], [1, 1], method="tsv"))


def test_ranks_inside_and_outside():
    found = pem.compose("m0 + delta(m1 + m2, rank=1)", NAMED, space="delta", rank=3)
    inner = pem.combine([B, C], [1, 1], space="delta", rank=1)
    same_updates(found, pem.combine([A, inner], [1, 1], space="delta", rank=3), atol=1e-9)
    lone = pem.compose("ties(m0, m1)", NAMED, rank=2)
    assert lone.config.r == 2
    assert lone.provenance.method.endswith("rank 2")


def test_other_spaces_inside():
    x, y, z = EQUAL.values()
    found = pem.compose("delta(parameter(0.3*m0 + 0.7*m1) + m2)", EQUAL)
    same_updates(found, pem.combine([0.3 * x + 0.7 * y, z], [1, 1], space="delta"))
    found = pem.compose("m0 + delta(m1)", EQUAL)
    same_updates(found, x + y)


@pytest.mark.parametrize("make", [ia3, full])
def test_expressions_of_other_kinds(make):
    x, y = make(0), make(1)
    found = pem.compose("0.5*ties(x, y, density=0.5) - y", {"x": x, "y": y})
    ties = pem.combine([x, y], [1, 1], method="ties", settings={"density": 0.5})
    for layer, change in updates(found).items():
        expected = 0.5 * updates(ties)[layer] - updates(y)[layer]
        np.testing.assert_allclose(change, expected, atol=1e-12)


# --- coefficients by layer ---


def test_a_factor_per_layer_scales_the_update_there():
    rules = {"*.0.*": 0.3, "*": -2.0}
    found = pem.compose("m0 + m1", NAMED, space="delta", layers={"m1": rules})
    for layer, factor in ((LAYERS[0], 0.3), (LAYERS[1], -2.0)):
        expected = updates(A)[layer] + factor * updates(B)[layer]
        np.testing.assert_allclose(updates(found)[layer], expected, atol=1e-12)
    same = pem.compose('m0 + layers(m1, "*.0.*", 0.3, "*", -2)', NAMED, space="delta")
    assert str(same) == str(found) and 'layers(m1, "*.0.*", 0.3, "*", -2)' in str(found)
    same_updates(same, found)


def test_in_parameter_space_a_factor_is_that_of_the_papers_sum():
    x, y = list(EQUAL.values())[:2]
    found = pem.compose("m0 + m1", EQUAL, layers={"m1": {"*.0.*": -0.5}})
    whole, half = x + y, x - 0.5 * y
    for name, tensor in found.adapter_tensors().items():
        expected = half if ".0." in name else whole
        torch.testing.assert_close(tensor, expected.tensors[name])


def test_layers_without_a_match_keep_their_tensors_bit_for_bit():
    found = pem.compose('layers(m0, "*.1.*", 0.5)', NAMED, space="delta")
    for side in "AB":
        name = f"{LAYERS[0]}.lora_{side}"
        assert torch.equal(found.tensors[name], A.tensors[name])
    vectors = ia3(0)
    (scaled,) = [pem.compose('layers(m0, "*", 3)', {"m0": vectors}, space="delta")]
    for layer, change in updates(scaled).items():
        np.testing.assert_allclose(change, 3 * updates(vectors)[layer], atol=1e-14)


@pytest.mark.parametrize("space", ["parameter", "delta", "log"])
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_a_negation_inside_layers_is_that_of_the_space(space, strength):
    """1 / l in log space, 2 - l in the others, as outside."""
    x = ia3(0)
    found = pem.compose(f'layers(negate(x, {strength}), "*.0.*", 0.3)', {"x": x}, space=space)
    for layer, factor in ((LAYERS[0], 0.3), (LAYERS[1], 1.0)):
        vector, power = x.tensors[f"{layer}.ia3"].numpy(), -strength * factor
        expected = vector**power if space == "log" else 1 + power * (vector - 1)
        np.testing.assert_allclose(found.tensors[f"{layer}.ia3"], expected, atol=1e-14)


@pytest.mark.parametrize("factor", [0.3, -2.0, 1e-44])
@pytest.mark.parametrize("make", [lora, ia3, full])
@pytest.mark.parametrize("space", ["parameter", "delta", "log"])
def test_layers_are_certified_against_the_updates_times_the_factors(space, make, factor):
    """1e-44 is a denormal number of float32, where digits are lost."""
    if space == "log" and make is not ia3:
        return
    x = make(0)
    x = replace(x, tensors={n: t.float() for n, t in x.tensors.items()})
    first, *_ = x.layers
    found = pem.compose(f'layers(x, "{first}", {factor})', {"x": x}, space=space)
    errors, norms = {}, {}
    for layer, change in updates(x).items():
        weight = factor if layer == first else 1.0
        exact = np.expm1(weight * np.log1p(change)) if space == "log" else weight * change
        errors[layer] = np.linalg.norm(updates(found)[layer] - exact)
        norms[layer] = np.linalg.norm(exact)
    certificate = found.provenance.certificate
    assert certificate.layers.keys() == errors.keys()
    for layer, error in errors.items():
        expected = error / norms[layer]
        assert certificate.layers[layer] == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert certificate.layers[first] > 0 or factor == -2.0
    total = np.linalg.norm(list(errors.values())) / np.linalg.norm(list(norms.values()))
    assert certificate.total == pytest.approx(total, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("head", ["average", "first", "none", "per-task"])
def test_the_head_of_weighed_layers_follows_the_policy_in_every_dtype(head, dtype):
    found = pem.compose('layers(m0, "*", 0.5)', EQUAL, head=head, dtype=dtype)
    whole = pem.compose("0.5*m0", EQUAL, head=head, dtype=dtype)
    assert found.head_names == whole.head_names and found.heads.keys() == whole.heads.keys()


def test_a_pattern_without_a_layer_is_a_slip():
    with pytest.raises(PEMError, match=r"no layer of m0 matches; found '\*.layer.7.\*', expected"):
        pem.compose("m0", NAMED, layers={"m0": {"*.layer.7.*": 0.5}})


# --- the text of a result makes the result ---


def again(m: pem.PEM, named: dict[str, pem.PEM]) -> pem.PEM:
    """The module of a module's own text, in its own space and rank."""
    method = m.provenance.method
    rank = recorded(method)[1] if method != "negation" else None
    return pem.compose(str(m), named, space=m.provenance.space, rank=rank)


def identical(a: pem.PEM, b: pem.PEM) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        torch.testing.assert_close(a.tensors[name], b.tensors[name], rtol=1e-12, atol=1e-14)
    assert a.config == b.config


X, Y, Z = EQUAL.values()
MADE = {
    "sum": 0.1 * X + (Y - Z) / 3,
    "negation": pem.negate(0.5 * X, 0.7),
    "negation in a sum": 2 * pem.negate(X - Y, 0.3) + Z,
    "delta": pem.combine([X, Y], [1 / 3, -0.4], space="delta"),
    "delta, rank": pem.combine([X, Y], [1 / 3, -0.4], space="delta", rank=2),
    "delta in parameter": pem.combine([X, Y], [1, 1], space="delta", rank=3) - Z,
    "parameter in delta": pem.combine([0.5 * X, Z], [1, 1], space="delta"),
    "nested delta": pem.combine(
        [pem.combine([X, Y], [1, -1], space="delta"), Z], [0.3, 1], space="delta"
    ),
    "method of sums": pem.combine([0.5 * X + Y, Z], [1, 0.3], method="tsv"),
    "method of methods": pem.combine(
        [pem.combine([X, Y], [1, 1], method="iso_c", rank=2), Z], [1, -1], method="ties"
    ),
    "sum of methods": pem.combine(
        [pem.combine([X, Y], [1, 2], method="dare", settings={"seed": 5}), Z], [0.3, 1],
        space="delta",
    ),
    "analogy": pem.analogy(X, Y, Z, 0.9, head="average"),
    **{
        name: pem.combine([X, Y], [0.3, 0.7], method=name, rank=2 if name == "ctm" else None)
        for name, method in METHODS.items()
        if name != "simple" and not method.needs
    },
}  # fmt: skip


@pytest.mark.parametrize("how", MADE)
def test_the_text_of_a_module_makes_the_module(how):
    identical(again(MADE[how], EQUAL), MADE[how])


def test_operators_read_as_what_they_are():
    assert str(0.1 * X + (Y - Z) / 3) == "+0.1*m0 +0.3333333333333333*m1 -0.3333333333333333*m2"
    assert str(MADE["delta in parameter"]) == "+1*delta(+1*m0 +1*m1, rank=3) -1*m2"
    assert str(MADE["parameter in delta"]) == "+1*parameter(+0.5*m0) +1*m2"
    assert str(MADE["nested delta"]) == "+0.3*m0 -0.3*m1 +1*m2"
    assert str(MADE["method of sums"]) == "tsv(parameter(+0.5*m0 +1*m1), 0.3*m2)"


# --- heads, dtypes, notes, refusals ---


def test_heads_follow_the_policy_through_the_tree():
    heads = [m.tensors["classifier.weight.head"] for m in (X, Y, Z)]
    found = pem.compose("0.5*ties(m0, m1) + 0.5*m2", EQUAL, head="first")
    assert torch.equal(found.tensors["classifier.weight.head"], heads[0])
    averaged = pem.compose("0.5*ties(m0, m1) + 0.5*m2", EQUAL)
    expected = (heads[0] + heads[1]) / 4 + heads[2] / 2
    torch.testing.assert_close(averaged.tensors["classifier.weight.head"], expected)
    none = pem.compose("ties(m0, m1)", EQUAL, head="none")
    assert not none.head_tensors()


@pytest.mark.parametrize("text", ["m0 + m1", "ties(m0, m1)", "negate(m0)", 'layers(m0, "*", 2)'])
def test_the_last_operation_rounds_and_is_judged_rounded(text):
    found = pem.compose(text, EQUAL, dtype="bfloat16")
    assert {t.dtype for t in found.tensors.values()} == {torch.bfloat16}
    assert found.provenance.certificate.total > 1e-4


def test_what_a_sum_hides_of_its_operands_is_noted():
    whole = pem.compose("0.5*ties(m0, m1, rank=1) + m2", EQUAL)
    assert whole.provenance.certificate.total < 1e-12  # against the operands as they are
    (note,) = whole.provenance.notes
    assert note.startswith("ties(m0, m1, density=0.2, election=total, form=dense) is off the meth")


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(PEMError, match=r"no module named 'x'; found names \['m0', 'm1', 'm2'\]"):
        pem.compose("x + m0", NAMED)
    with pytest.raises(UsageError, match="column 6: ties takes modules"):
        pem.compose("ties(1)", NAMED)
    with pytest.raises(PEMError, match="--space delta"):
        pem.compose("m0 + m1", NAMED)  # unequal ranks in parameter space
    with pytest.raises(PEMError, match="unknown space; found 'weights'"):
        pem.compose("m0", NAMED, space="weights")
    with pytest.raises(PEMError, match="tsv: not defined for modules of kind ia3"):
        pem.compose("tsv(a, a)", {"a": ia3(0)})
