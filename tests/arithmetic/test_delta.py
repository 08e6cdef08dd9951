"""Exact low-rank arithmetic against dense float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.examples import examples

from pem_composition.arithmetic import delta
from pem_composition.arithmetic.terms import Factor

seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
weights = st.lists(st.floats(-3, 3), min_size=1, max_size=4)
# A subnormal weight leaves an update of a few bits, whose energy nothing keeps to nine digits.
normal_weights = st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=4)


def factors(
    seed: int, shape: tuple[int, int], coefficients: list[float], dtype=torch.float64
) -> list[Factor]:
    """Random terms of different rank over one layer of ``shape`` (outputs, inputs)."""
    g = torch.Generator().manual_seed(seed)
    out, inputs = shape
    ranks = [1 + (seed + i) % 4 for i in range(len(coefficients))]
    return [
        Factor(
            c,
            torch.randn(r, inputs, generator=g, dtype=dtype),
            torch.randn(out, r, generator=g, dtype=dtype),
        )
        for c, r in zip(coefficients, ranks, strict=True)
    ]


def dense(terms: list[Factor]) -> np.ndarray:
    return sum(t.weight * t.B_OR.double().numpy() @ t.A_RI.double().numpy() for t in terms)


@given(seeds, shapes, weights, st.floats(0.1, 4))
def test_concatenation_is_exact(seed, shape, coefficients, scaling):
    terms = factors(seed, shape, coefficients)
    A, B = delta.concatenate(terms, scaling)
    assert A.shape[0] == B.shape[1] == sum(t.A_RI.shape[0] for t in terms)
    np.testing.assert_allclose(scaling * B.numpy() @ A.numpy(), dense(terms), atol=1e-12)


@given(seeds, shapes, weights)
def test_norm_equals_the_dense_frobenius_norm(seed, shape, coefficients):
    terms = factors(seed, shape, coefficients)
    np.testing.assert_allclose(delta.norm(terms), np.linalg.norm(dense(terms)), atol=1e-11)


@given(seeds, st.integers(-140, 120))
def test_the_norm_keeps_its_digits_where_terms_nearly_cancel_or_squares_leave_the_range(
    seed, power
):
    (a,) = factors(seed, (9, 8), [1.0])
    b = a._replace(weight=-1.0, B_OR=a.B_OR * (1 + 1e-9))
    small = [t._replace(weight=t.weight * 10.0**power, A_RI=t.A_RI * 10.0**power) for t in (a, b)]
    expected = np.linalg.norm(dense([a])) * 1e-9
    np.testing.assert_allclose(delta.norm([a, b]), expected, rtol=1e-5)
    np.testing.assert_allclose(delta.norm(small) / 10.0**power / 10.0**power, expected, rtol=1e-5)


@given(seeds, shapes, weights, st.floats(0.1, 4))
def test_the_error_of_a_rounded_concatenation_is_the_dense_one(seed, shape, coefficients, scaling):
    """Written and expression share A; what is left is the rounding of B, far below both."""
    terms = factors(seed, shape, coefficients, torch.float32)
    A, B = delta.concatenate(terms, scaling)
    report = delta.factor_error(Factor(scaling, A, B), terms)
    exact = dense(terms)
    rounding = scaling * B.double().numpy() @ A.double().numpy() - exact
    np.testing.assert_allclose(report.error, np.linalg.norm(rounding), rtol=1e-4, atol=1e-14)
    np.testing.assert_allclose(report.norm, np.linalg.norm(exact), rtol=1e-7, atol=1e-12)
    parts = sum(np.linalg.norm(dense([t])) for t in terms)
    np.testing.assert_allclose(report.terms, parts, rtol=1e-7, atol=1e-100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_function_changes_the_factors_it_is_given(dtype):
    terms = factors(3, (6, 5), [2.0, -0.7], dtype)
    written = Factor(0.5, *delta.concatenate(terms, 0.5))
    before = [x.clone() for t in (*terms, written) for x in (t.A_RI, t.B_OR)]
    delta.truncate(terms, 2)
    delta.concatenate(terms, 0.3)
    delta.norm(terms)
    delta.factor_error(written, terms)
    delta.factor_error(Factor(1.0, *delta.truncate(terms, 2)), terms)
    after = [x for t in (*terms, written) for x in (t.A_RI, t.B_OR)]
    assert all(map(torch.equal, before, after))


def test_a_layer_wider_than_a_block_is_summed_whole():
    terms = factors(4, (2 * delta.BLOCK + 3, delta.BLOCK + 1), [1.0, -0.3])
    A, B = delta.truncate(terms, 2)
    report = delta.factor_error(Factor(1.0, A, B), terms)
    exact = dense(terms)
    np.testing.assert_allclose(report.norm, np.linalg.norm(exact), rtol=1e-12)
    np.testing.assert_allclose(
        report.error, np.linalg.norm(B.numpy() @ A.numpy() - exact), rtol=1e-9
    )
    A, B = delta.concatenate(terms, 0.7)
    np.testing.assert_allclose(0.7 * B.numpy() @ A.numpy(), exact, atol=1e-12)


@given(seeds, shapes, weights, st.integers(1, 6))
def test_truncation_is_the_best_approximation_of_its_rank(seed, shape, coefficients, rank):
    """Eckart-Young: the error is the norm of the singular values that were cut."""
    terms = factors(seed, shape, coefficients)
    A, B = delta.truncate(terms, rank)
    singular = np.linalg.svd(dense(terms), compute_uv=False)
    error = np.linalg.norm(B.numpy() @ A.numpy() - dense(terms))
    np.testing.assert_allclose(error, np.linalg.norm(singular[rank:]), atol=1e-9)


@given(seeds, shapes, normal_weights, st.floats(0.01, 0.999))
@example(0, (1, 2), [2.2250738585072014e-308], 0.5)
@example(3, (4, 5), [2.2250738585072014e-308, -2.2250738585072014e-308], 0.9)
def test_a_share_of_the_energy_gives_the_smallest_rank_that_keeps_it(seed, shape, coefficients, x):
    terms = factors(seed, shape, coefficients)
    A, B = delta.truncate(terms, x)
    singular = np.linalg.svd(dense(terms), compute_uv=False)
    largest = singular[0] or 1.0  # squares of what is left stay in the range of a double
    energies = np.square(singular / largest)
    kept = np.square(np.linalg.norm(B.numpy() @ A.numpy() / largest))
    k, rounding = len(A), 1e-9 * energies.sum()
    np.testing.assert_allclose(kept, energies[:k].sum(), atol=rounding)
    assert kept >= x * energies.sum() - rounding
    assert k == 1 or energies[: k - 1].sum() < x * energies.sum() + rounding


@examples(30)
@given(seeds, shapes, weights, st.integers(1, 6))
def test_the_certificate_equals_the_dense_relative_error(seed, shape, coefficients, rank):
    terms = factors(seed, shape, coefficients, torch.float32)
    A, B = delta.truncate(terms, rank)
    report = delta.factor_error(Factor(1.0, A, B), terms)
    exact = dense(terms)
    error = np.linalg.norm(B.double().numpy() @ A.double().numpy() - exact)
    np.testing.assert_allclose(report.error, error, atol=1e-10)
    np.testing.assert_allclose(report.norm, np.linalg.norm(exact), atol=1e-10)


def test_where_the_expression_cancels_the_error_is_judged_by_its_terms():
    (a,) = factors(0, (6, 5), [1.0])
    minus = a._replace(weight=-1.0)
    report = delta.factor_error(Factor(0.5, a.A_RI, a.B_OR), [a, minus])
    assert report.norm < 1e-12
    assert report.relative == pytest.approx(0.25)  # |0.5 a| / (|a| + |-a|)
    assert delta.factor_error(Factor(0.0, a.A_RI, a.B_OR), [a, minus]).relative < 1e-12


def test_a_term_with_the_common_scaling_is_copied_bit_for_bit():
    (a,) = factors(1, (6, 5), [1.7], torch.float32)
    A, B = delta.concatenate([a], 1.7)
    assert torch.equal(A, a.A_RI) and torch.equal(B, a.B_OR)


def test_no_dense_matrix_is_formed():
    """A 200,000 x 200,000 layer would need 160 GB dense; its factors need 6 MB."""
    g = torch.Generator().manual_seed(0)
    terms = [
        Factor(w, torch.randn(2, 200_000, generator=g), torch.randn(200_000, 2, generator=g))
        for w in (1.0, -0.4)
    ]
    A, B = delta.truncate(terms, 4)
    assert delta.factor_error(Factor(1.0, A, B), terms).relative < 1e-6
