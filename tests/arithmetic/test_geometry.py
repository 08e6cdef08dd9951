"""Norms, ranks, angles and signs from factors against dense float64 NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from support.examples import examples

from pem_composition.arithmetic import geometry
from pem_composition.arithmetic.terms import Factor

seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
ranks = st.integers(1, 5)


def update(seed: int, shape: tuple[int, int], r: int, dtype=torch.float32) -> list[Factor]:
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(s, generator=g, dtype=dtype) for s in ((r, shape[1]), (shape[0], r)))
    return [Factor(0.7, A, B)]


def dense(terms: list[Factor]) -> np.ndarray:
    return sum(t.weight * t.B_OR.double().numpy() @ t.A_RI.double().numpy() for t in terms)


@given(seeds, shapes, ranks)
def test_the_spectrum_is_that_of_the_dense_matrix(seed, shape, r):
    terms = update(seed, shape, r)
    s = np.linalg.svd(dense(terms), compute_uv=False)
    s = s[: np.linalg.matrix_rank(dense(terms))]
    found = geometry.spectrum(terms)
    assert found.rank == len(s)
    np.testing.assert_allclose(found.s_K.numpy(), s, rtol=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(dense(terms)))
    assert found.spectral_norm == pytest.approx(np.linalg.norm(dense(terms), 2))
    assert found.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2)
    p = s / s.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert 1 - 1e-12 <= found.stable_rank <= found.effective_rank + 1e-9 <= found.rank + 1e-8
    np.testing.assert_allclose(
        (found.U_OK * found.s_K @ found.V_IK.mT).numpy(), dense(terms), atol=1e-12
    )


def test_an_update_of_zero_has_rank_zero():
    (term,) = update(0, (6, 5), 3)
    found = geometry.spectrum([Factor(1.0, term.A_RI, torch.zeros(6, 3))])
    assert (found.rank, found.norm, found.stable_rank, found.effective_rank) == (0, 0, 0, 0)
    assert geometry.overlap(geometry.principal_angles(found.U_OK, found.U_OK)) == 0


def test_equal_singular_values_give_the_whole_rank():
    identity = [Factor(2.0, torch.eye(4, 7), torch.eye(6, 4))]
    found = geometry.spectrum(identity)
    assert found.stable_rank == pytest.approx(4) == found.effective_rank


@given(seeds, seeds, shapes, ranks, ranks)
def test_the_inner_product_is_the_dense_one(a, b, shape, r, q):
    x, y = update(a, shape, r) + update(b, shape, q), update(b, shape, q)
    expected = (dense(x) * dense(y)).sum()
    assert geometry.inner(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert geometry.inner(x, y) == pytest.approx(geometry.inner(y, x), rel=1e-9, abs=1e-9)


@given(seeds, seeds, st.tuples(st.integers(6, 9), st.integers(6, 9)), ranks, ranks)
def test_principal_angles_are_those_of_scipy(a, b, shape, r, q):
    x, y = (geometry.spectrum(update(s, shape, k)) for s, k in ((a, r), (b, q)))
    for U, W, span in (
        (x.U_OK, y.U_OK, lambda m: m),
        (x.V_IK, y.V_IK, lambda m: m.T),
    ):
        found = geometry.principal_angles(U, W).numpy()
        dx, dy = (span(dense(update(s, shape, k))) for s, k in ((a, r), (b, q)))
        bases = [np.linalg.svd(m)[0][:, :k] for m, k in ((dx, x.rank), (dy, y.rank))]
        np.testing.assert_allclose(found, np.sort(subspace_angles(*bases)), atol=1e-7)
        assert geometry.overlap(geometry.principal_angles(U, W)) == pytest.approx(
            np.linalg.norm(bases[0].T @ bases[1]) ** 2 / min(x.rank, y.rank)
        )


def test_a_tiny_angle_keeps_its_digits():
    """arccos of a cosine loses everything below 1e-8."""
    turn = 1e-11
    U = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    W = torch.tensor([[np.cos(turn)], [np.sin(turn)], [0.0]], dtype=torch.float64)
    assert float(geometry.principal_angles(U, W)) == pytest.approx(turn, rel=1e-4)


@examples(50)
@given(seeds, seeds, shapes, ranks, ranks, st.integers(1, 20))
def test_signs_by_blocks_of_rows_are_those_of_the_dense_matrices(a, b, shape, r, q, block):
    x, y = update(a, shape, r), update(b, shape, q)
    before, geometry.BLOCK_ENTRIES = geometry.BLOCK_ENTRIES, block
    try:
        found = geometry.signs(x, y)
    finally:
        geometry.BLOCK_ENTRIES = before
    dx, dy = dense(x), dense(y)
    opposite = np.sign(dx) * np.sign(dy) < 0
    assert (found.entries, found.opposite) == (dx.size, opposite.sum())
    assert found.conflict == pytest.approx(opposite.mean())
    weight = np.abs(dx * dy)
    assert found.weighted_conflict == pytest.approx(weight[opposite].sum() / weight.sum())


def test_signs_of_an_update_with_itself_and_its_negative():
    x = update(0, (6, 5), 3)
    minus = [t._replace(weight=-t.weight) for t in x]
    assert geometry.signs(x, x).conflict == 0 == geometry.signs(x, x).weighted_conflict
    assert geometry.signs(x, minus).conflict == 1 == geometry.signs(x, minus).weighted_conflict


def test_signs_never_see_a_whole_matrix():
    x, y = update(0, (30_000, 300), 2), update(1, (30_000, 300), 2)
    blocks = [tuple(b.shape) for b in geometry.row_blocks(x)]
    assert max(rows * columns for rows, columns in blocks) <= geometry.BLOCK_ENTRIES < 30_000 * 300
    assert sum(rows for rows, _ in blocks) == 30_000
    assert 0.4 < geometry.signs(x, y).conflict < 0.6


def test_the_spectrum_of_a_layer_that_fits_nowhere():
    """A 200,000 x 200,000 layer would need 320 GB dense."""
    found = geometry.spectrum(update(0, (200_000, 200_000), 2))
    assert found.rank == 2
    assert 1 <= found.stable_rank <= found.effective_rank <= 2
