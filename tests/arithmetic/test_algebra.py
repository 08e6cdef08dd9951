"""Laws of parameter-space arithmetic, kept and broken, over random modules in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition.arithmetic.algebra import (
    average_heads,
    linear_combination,
    negate,
    role_of,
)
from pem_composition.errors import IncompatibleModules, UnknownRole

D_IN, D_OUT, R = 5, 6, 4  # distinct, so that a transpose cannot go unnoticed

seeds = st.integers(0, 2**32 - 1)
signed = st.floats(-3, 3).filter(lambda c: abs(c) > 1e-3)
positive = st.floats(1e-3, 3)


def module(seed: int, r: int = R) -> dict[str, np.ndarray]:
    """A module with every role that takes part in sums."""
    rng = np.random.default_rng(seed)
    return {
        "q.lora_A": rng.normal(size=(r, D_IN)),
        "q.lora_B": rng.normal(size=(D_OUT, r)),
        "k.ia3": 1 + 0.1 * rng.normal(size=D_OUT),
        "w.weight.delta": rng.normal(size=(D_OUT, D_IN)),
    }


def update(m: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the module does to the base: dW = B A, l - 1, delta."""
    return {
        "lora": m["q.lora_B"] @ m["q.lora_A"],
        "ia3": m["k.ia3"] - 1,
        "full": m["w.weight.delta"],
    }


def add(a, b):
    return linear_combination([a, b], [1.0, 1.0])


def scale(k, a):
    return linear_combination([a], [k])


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-12, err_msg=name)


def assert_same_update(a, b):
    for kind, value in update(a).items():
        np.testing.assert_allclose(value, update(b)[kind], rtol=1e-9, atol=1e-9, err_msg=kind)


@given(seeds, seeds)
def test_addition_commutes(s, t):
    assert_equal(add(module(s), module(t)), add(module(t), module(s)))


@given(seeds, seeds, seeds)
def test_addition_associates_and_equals_the_flat_sum(s, t, u):
    a, b, c = module(s), module(t), module(u)
    assert_equal(add(add(a, b), c), add(a, add(b, c)))
    assert_equal(add(add(a, b), c), linear_combination([a, b, c], [1, 1, 1]))


@given(seeds, seeds, signed, signed, signed)
def test_nested_sums_equal_the_flat_sum_for_any_signs(s, t, k, x, y):
    a, b = module(s), module(t)
    nested = scale(k, linear_combination([a, b], [x, y]))
    assert_equal(nested, linear_combination([a, b], [k * x, k * y]))


@given(seeds)
def test_negating_twice_is_the_identity(s):
    assert_equal(negate(negate(module(s))), module(s))
    assert_equal(scale(-1, scale(-1, module(s))), module(s))


@given(seeds)
def test_negation_reverses_the_effect_and_leaves_A_alone(s):
    a = module(s)
    b = negate(a)
    assert b["q.lora_A"] is a["q.lora_A"]
    for kind, value in update(a).items():
        np.testing.assert_allclose(update(b)[kind], -value, rtol=1e-12, atol=1e-15, err_msg=kind)


@given(seeds)
def test_minus_one_times_a_is_the_negation(s):
    assert_equal(scale(-1.0, module(s)), negate(module(s)))


@given(seeds, positive)
def test_strength_is_linear_in_the_effect(s, strength):
    a, b = update(module(s)), update(negate(module(s), strength))
    for kind, value in a.items():
        np.testing.assert_allclose(b[kind], -strength * value, rtol=1e-9, atol=1e-12, err_msg=kind)


@given(seeds, seeds, signed)
def test_scaling_distributes_over_modules(s, t, k):
    a, b = module(s), module(t)
    assert_equal(scale(k, add(a, b)), add(scale(k, a), scale(k, b)))


@given(seeds, positive, positive)
def test_scaling_distributes_over_coefficients_of_one_sign(s, j, k):
    a = module(s)
    assert_equal(scale(j + k, a), add(scale(j, a), scale(k, a)))
    assert_equal(scale(-j - k, a), add(scale(-j, a), scale(-k, a)))


@given(seeds)
def test_one_times_a_is_a_bit_for_bit(s):
    a, b = module(s), scale(1.0, module(s))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@given(seeds, seeds, st.floats(0, 1))
def test_a_convex_sum_of_ia3_is_the_plain_average(s, t, w):
    a, b = module(s), module(t)
    merged = linear_combination([a, b], [w, 1 - w])["k.ia3"]
    np.testing.assert_allclose(merged, w * a["k.ia3"] + (1 - w) * b["k.ia3"], rtol=1e-12)


@given(seeds, seeds, seeds, st.floats(0, 1))
def test_analogy_equals_the_reference_formulas(s, t, u, c0):
    """The literal formulas of the reference's analogy program (A of the source LM is added)."""
    cls, aim, aux = module(s), module(t), module(u)
    c1 = 1 - c0
    out = linear_combination([cls, aim, aux], [c0, c1, -c1])
    A = c0 * cls["q.lora_A"] + c1 * aim["q.lora_A"] + c1 * aux["q.lora_A"]
    B = c0 * cls["q.lora_B"] + c1 * aim["q.lora_B"] - c1 * aux["q.lora_B"]
    l_ = (1 - c0) + c0 * cls["k.ia3"] + c1 * aim["k.ia3"] - c1 * aux["k.ia3"]
    np.testing.assert_allclose(out["q.lora_A"], A, rtol=1e-12)
    np.testing.assert_allclose(out["q.lora_B"], B, rtol=1e-12)
    np.testing.assert_allclose(out["k.ia3"], l_, rtol=1e-12)


# What does not hold, because addition is elementwise on factors.


@given(seeds, positive)
def test_scaling_lora_scales_its_effect_quadratically_and_the_others_linearly(s, k):
    a, b = update(module(s)), update(scale(k, module(s)))
    np.testing.assert_allclose(b["lora"], k * k * a["lora"], rtol=1e-9)
    np.testing.assert_allclose(b["ia3"], k * a["ia3"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(b["full"], k * a["full"], rtol=1e-9)


@given(seeds)
def test_a_minus_a_has_no_effect_but_is_not_the_zero_module(s):
    a = module(s)
    zero = linear_combination([a, a], [1, -1])
    assert not np.any(update(zero)["lora"]) and not np.any(zero["q.lora_B"])
    np.testing.assert_allclose(zero["q.lora_A"], 2 * a["q.lora_A"])
    np.testing.assert_allclose(update(zero)["ia3"], 0, atol=1e-15)


@given(seeds)
def test_coefficients_of_opposite_sign_do_not_distribute(s):
    a = module(s)
    split = add(scale(2.0, a), scale(-1.0, a))
    np.testing.assert_allclose(split["q.lora_A"], 3 * a["q.lora_A"])  # not (2 - 1) A
    np.testing.assert_allclose(split["q.lora_B"], a["q.lora_B"])


@given(seeds, seeds)
def test_a_sum_of_lora_modules_has_cross_terms(s, t):
    a, b = module(s), module(t)
    cross = a["q.lora_B"] @ b["q.lora_A"] + b["q.lora_B"] @ a["q.lora_A"]
    total = update(a)["lora"] + update(b)["lora"] + cross
    np.testing.assert_allclose(update(add(a, b))["lora"], total, rtol=1e-9, atol=1e-9)


# Heads and refusals.


def test_heads_are_averaged_with_normalised_absolute_weights():
    heads = [{"out.weight": np.full((2, 3), v)} for v in (1.0, 5.0)]
    np.testing.assert_allclose(average_heads(heads, [0.5, -1.5])["out.weight"], 4.0)
    np.testing.assert_allclose(average_heads(heads, [0.0, 0.0])["out.weight"], 3.0)


def test_different_rank_is_an_error_that_names_the_tensor_and_both_shapes():
    with pytest.raises(
        IncompatibleModules,
        match=r"'q.lora_A'.*\(4, 5\) in module 0 and \(8, 5\) in module 1.*--space delta",
    ):
        linear_combination([module(0), module(1, r=8)], [0.5, 0.5])


def test_a_missing_tensor_is_an_error_that_names_it():
    short = module(1)
    del short["k.ia3"]
    with pytest.raises(IncompatibleModules, match=r"'k.ia3': present in module 0 only"):
        linear_combination([module(0), short], [0.5, 0.5])


@pytest.mark.parametrize("coefficients", [[1.0], [1.0, 1.0, 1.0], []])
def test_the_number_of_coefficients_must_match(coefficients):
    with pytest.raises(
        IncompatibleModules, match=f"found {len(coefficients)} coefficients for 2 modules"
    ):
        linear_combination([module(0), module(1)], coefficients)


def test_an_unknown_role_is_refused():
    with pytest.raises(
        UnknownRole, match=r"'q.lora_C'.*found 'lora_C', expected lora_A, lora_B, ia3"
    ):
        role_of("q.lora_C")
