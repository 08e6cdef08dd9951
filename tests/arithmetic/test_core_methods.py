"""The shared core, and methods computed in it, against the same methods on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.examples import examples

from pem_composition.arithmetic.geometry import inner_products
from pem_composition.arithmetic.methods import factors as on_factors
from pem_composition.arithmetic.methods.core import core_of, orthogonalised
from pem_composition.arithmetic.methods.ctm import bases, ctm
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Rule, Stacked, merged
from pem_composition.arithmetic.methods.iso import iso_c, iso_cts
from pem_composition.arithmetic.methods.knots import knots
from pem_composition.arithmetic.methods.magnitude import magnitude
from pem_composition.arithmetic.methods.sphere import karcher, slerp
from pem_composition.arithmetic.methods.svc import svc
from pem_composition.arithmetic.methods.ties import ties
from pem_composition.arithmetic.methods.tsv import on_factors as tsv_on_factors
from pem_composition.arithmetic.methods.tsv import tsv
from pem_composition.arithmetic.methods.wudi import actmat, wudi
from pem_composition.arithmetic.terms import Factor
from pem_composition.errors import IncompatibleModules, PEMError

OUT, IN = 20, 17
seeds = st.integers(0, 2**31 - 1)
NO_DRAWS = Draws(0, "layer")


def terms_of(seed: int, ranks=(3, 2, 4), weights=(0.5, -1.5, 2.0)) -> list[Factor]:
    g = torch.Generator().manual_seed(seed)
    return [
        Factor(
            w,
            torch.randn(r, IN, generator=g, dtype=torch.float64),
            torch.randn(OUT, r, generator=g, dtype=torch.float64),
        )
        for r, w in zip(ranks, weights, strict=True)
    ]


def dense(terms: list[Factor]) -> np.ndarray:
    return np.stack([t.weight * t.B_OR.numpy() @ t.A_RI.numpy() for t in terms])


def product(factor: Factor) -> np.ndarray:
    return factor.weight * factor.B_OR.numpy() @ factor.A_RI.numpy()


def polar(X: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def in_core(terms: list[Factor], merge) -> np.ndarray:
    core = core_of(terms)
    return product(core.factor(merge(core.M_TPQ)))


# --- the core ---


@examples(25)
@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
def test_the_core_loses_nothing_and_is_no_larger_than_the_ranks(seed, ranks):
    terms = terms_of(seed, tuple(ranks), (1.0, -2.0, 0.5, 3.0)[: len(ranks)])
    core = core_of(terms)
    back = core.U_OP @ core.M_TPQ @ core.V_IQ.mT
    np.testing.assert_allclose(back, dense(terms), atol=1e-12)
    for basis in (core.U_OP, core.V_IQ):
        np.testing.assert_allclose(basis.mT @ basis, np.eye(basis.shape[1]), atol=1e-12)
        assert basis.shape[1] <= min(sum(ranks), *basis.shape)


def test_the_core_does_not_depend_on_how_an_update_is_split_in_factors():
    """The axes are those of the updates (up to signs), whatever G in B G, G^-1 A."""
    terms = terms_of(1)
    g = torch.Generator().manual_seed(2)
    turned = []
    for t in terms:
        G = torch.randn(len(t.A_RI), len(t.A_RI), generator=g, dtype=torch.float64)
        turned.append(t._replace(A_RI=torch.linalg.solve(G, t.A_RI), B_OR=t.B_OR @ G))
    one, two = core_of(terms), core_of(turned)
    np.testing.assert_allclose(one.M_TPQ.abs(), two.M_TPQ.abs(), atol=1e-10)


def test_directions_that_are_not_there_are_left_out():
    (a, b, _) = terms_of(3)
    assert core_of([a, a]).M_TPQ.shape == (2, 3, 3)
    assert core_of([a, a._replace(weight=0.0)]).M_TPQ.shape == (2, 3, 3)
    shared = b._replace(A_RI=a.A_RI[:2])
    assert core_of([a, shared]).M_TPQ.shape == (2, 5, 3)
    nothing = core_of([a._replace(weight=0.0)])
    assert not product(nothing.factor(nothing.M_TPQ.sum(0))).any()


def test_a_core_wider_than_the_layer_is_cut_to_it():
    terms = terms_of(4, (9, 9, 9), (1.0, 1.0, 1.0))
    core = core_of(terms)
    assert core.M_TPQ.shape == (3, OUT, IN)
    np.testing.assert_allclose(core.U_OP @ core.M_TPQ @ core.V_IQ.mT, dense(terms), atol=1e-11)


# --- TSV-M ---


def dense_tsv(X: np.ndarray, ranks=(3, 2, 4)) -> np.ndarray:
    parts = [np.linalg.svd(x, full_matrices=False) for x in X]
    U = np.concatenate([u[:, :r] for (u, _, _), r in zip(parts, ranks, strict=True)], axis=1)
    S = np.concatenate([s[:r] for (_, s, _), r in zip(parts, ranks, strict=True)])
    V = np.concatenate([v[:r].T for (_, _, v), r in zip(parts, ranks, strict=True)], axis=1)
    return polar(U) @ np.diag(S) @ polar(V).T


def both_ways(terms: list[Factor]) -> tuple[np.ndarray, np.ndarray]:
    return in_core(terms, tsv), product(*tsv_on_factors(terms))


@examples(25)
@given(seeds)
def test_tsv_in_the_core_is_the_dense_one(seed):
    terms = terms_of(seed)
    for result in both_ways(terms):
        np.testing.assert_allclose(result, dense_tsv(dense(terms)), atol=1e-12)
    (found,) = tsv_on_factors(terms)
    A, B = found.A_RI.numpy(), found.B_OR.numpy()
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0), rtol=1e-9)


def test_tsv_leaves_one_module_and_orthogonal_modules_alone():
    terms = terms_of(5)
    for found in both_ways(terms[:1]):
        np.testing.assert_allclose(found, dense(terms[:1])[0], atol=1e-12)
    Q = torch.linalg.qr(torch.randn(OUT, 5, dtype=torch.float64)).Q
    P = torch.linalg.qr(torch.randn(IN, 5, dtype=torch.float64)).Q
    apart = [Factor(2.0, P[:, :3].mT, Q[:, :3]), Factor(-1.0, P[:, 3:].mT, Q[:, 3:])]
    for found in both_ways(apart):
        np.testing.assert_allclose(found, dense(apart).sum(0), atol=1e-12)


def test_dependent_directions_have_one_answer():
    """The same module twice: P Q^T over the null space would be rounding noise."""
    (a, *_) = terms_of(6)
    for found in both_ways([a, a]):
        np.testing.assert_allclose(found, dense([a])[0], atol=1e-12)
    assert tsv_on_factors([a, a])[0].A_RI.shape == a.A_RI.shape
    nothing = a._replace(weight=0.0)
    for found in (*both_ways([nothing]), *both_ways([nothing, nothing])):
        assert not found.any()
    columns = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(orthogonalised(columns), columns / 2**0.5, atol=1e-15)


# --- Iso ---


def dense_iso_c(X: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(X.sum(0), full_matrices=False)
    return S[:rank].mean() * U[:, :rank] @ Vh[:rank]


@examples(25)
@given(seeds)
def test_iso_c_in_the_core_is_the_dense_one_over_the_rank_of_the_sum(seed):
    terms = terms_of(seed)
    found = in_core(terms, iso_c)
    np.testing.assert_allclose(found, dense_iso_c(dense(terms), 9), atol=1e-11)
    S = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_allclose(S[:9], S[0], rtol=1e-10)
    total = np.linalg.svd(dense(terms).sum(0), compute_uv=False).sum()
    assert S.sum() == pytest.approx(total)  # the nuclear norm of the sum


def test_iso_is_well_posed_where_the_dense_one_is_not():
    """Noise of 1e-12: the published mean over min(O, I) directions turns with it, this does not."""
    terms = terms_of(7)
    X = dense(terms).sum(0)
    noise = 1e-12 * np.random.default_rng(0).normal(size=X.shape)

    def published(x: np.ndarray) -> np.ndarray:
        U, S, Vh = np.linalg.svd(x, full_matrices=False)
        return S.mean() * U @ Vh

    moved = np.linalg.norm(published(X) - published(X + noise)) / np.linalg.norm(published(X))
    assert moved > 0.5
    shaken = [t._replace(A_RI=t.A_RI + 1e-12 * torch.randn_like(t.A_RI)) for t in terms]
    np.testing.assert_allclose(in_core(terms, iso_c), in_core(shaken, iso_c), atol=1e-8)


def dense_iso_cts(X: np.ndarray, directions: int, common: float) -> np.ndarray:
    """The published rule with the dimensions of the updates' span for those of the matrix."""
    tasks = len(X)
    each = round((directions - int(directions * common)) / tasks)
    shared = directions - each * tasks
    U, S, Vh = np.linalg.svd(X.sum(0), full_matrices=False)
    left, sizes, right = [U[:, :shared]], [S[:shared]], [Vh[:shared].T]
    for x in X:
        u, s, v = np.linalg.svd(x - U[:, :shared] @ U[:, :shared].T @ x, full_matrices=False)
        there = min(each, int((s > 1e-9).sum()))  # beyond it the published rule takes noise
        left.append(u[:, :there])
        sizes.append(s[:there])
        right.append(v[:there].T)
    mean = np.concatenate(sizes).mean()
    stacks = [np.concatenate(side, 1) for side in (left, right)]
    for stack in stacks:  # nearly dependent directions turn with rounding, here as there
        values = np.linalg.svd(stack, compute_uv=False)
        assume(values[-1] > 1e-4 * values[0])
    return mean * polar(stacks[0]) @ polar(stacks[1]).T


@examples(25)
@given(seeds, st.sampled_from([0.2, 0.5, 0.8]))
def test_iso_cts_in_the_core_is_the_dense_one(seed, common):
    terms = terms_of(seed)
    found = in_core(terms, lambda M: iso_cts(M, common=common))
    np.testing.assert_allclose(found, dense_iso_cts(dense(terms), 9, common), atol=1e-10)


def test_iso_cts_with_everything_common_or_one_module_is_iso_c():
    terms = terms_of(8)
    np.testing.assert_allclose(
        in_core(terms, lambda M: iso_cts(M, common=1.0)), in_core(terms, iso_c), atol=1e-11
    )
    one = terms[:1]
    np.testing.assert_allclose(
        in_core(one, lambda M: iso_cts(M, common=0.5)), in_core(one, iso_c), atol=1e-11
    )


def test_a_sum_that_cancels_has_no_directions():
    (a, *_) = terms_of(9)
    minus = a._replace(weight=-a.weight)
    for method in (iso_c, lambda M: iso_cts(M, common=1.0)):
        np.testing.assert_allclose(in_core([a, minus], method), 0, atol=1e-12)


# --- WUDI and ACTMat ---

RANKS = [
    (3, 2, 4),
    (9, 9, 9),
    (25, 1, 2),
]  # rows of A: independent, more than inputs, in one module


def dense_least_interference(X: np.ndarray, weighted: bool, ridge: float) -> np.ndarray:
    """By I x I matrices."""
    w = [1 / np.linalg.norm(x) ** 2 if weighted else 1.0 for x in X]
    G = sum(a * x.T @ x for a, x in zip(w, X, strict=True))
    values = np.linalg.eigvalsh(G)
    e = ridge * values[values > 1e-10 * values[-1]].mean()
    above = sum(a * x @ x.T @ x for a, x in zip(w, X, strict=True)) + e * X.sum(0)
    if not ridge:
        return above @ np.linalg.pinv(G, rcond=1e-10, hermitian=True)
    return above @ np.linalg.inv(G + e * np.eye(len(G)))


@examples(25)
@given(seeds, st.sampled_from(RANKS), st.sampled_from([0.0, 0.01, 1.0]))
def test_wudi_and_actmat_in_the_core_are_the_dense_ones(seed, ranks, ridge):
    terms = terms_of(seed, ranks)
    for method, weighted in ((wudi, True), (actmat, False)):
        found = in_core(terms, lambda M, method=method: method(M, ridge=ridge))
        expected = dense_least_interference(dense(terms), weighted, ridge)
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())


@given(seeds)
def test_with_independent_rows_every_module_acts_as_before_whatever_its_weight(seed):
    terms = terms_of(seed)
    found = in_core(terms, lambda M: wudi(M, ridge=0.0))
    np.testing.assert_allclose(found, in_core(terms, lambda M: actmat(M, ridge=0.0)), atol=1e-9)
    for x, t in zip(dense(terms), terms, strict=True):
        np.testing.assert_allclose(found @ t.A_RI.numpy().T, x @ t.A_RI.numpy().T, atol=1e-8)


def test_a_ridge_keeps_nearly_equal_factors_from_exploding():
    """Modules from one initial A that have hardly drifted; a large ridge is the sum."""
    (a, _, b) = terms_of(10, (4, 2, 4))
    near = [a, b._replace(A_RI=a.A_RI + 1e-3 * b.A_RI)]
    total = np.linalg.norm(dense(near).sum(0))
    sizes = {
        ridge: np.linalg.norm(in_core(near, lambda M, r=ridge: wudi(M, ridge=r))) / total
        for ridge in (0.0, 0.1)
    }
    assert sizes[0.0] > 100 and sizes[0.1] < 1.5
    large = in_core(near, lambda M: wudi(M, ridge=1e9))
    np.testing.assert_allclose(large, dense(near).sum(0), rtol=1e-6, atol=1e-6)


# --- SVC ---


def dense_svc(X: np.ndarray, whole: np.ndarray, alpha: float) -> np.ndarray:
    U, S, Vh = np.linalg.svd(whole, full_matrices=False)
    out = np.zeros_like(whole)
    for u, s, v in zip(U.T, S, Vh, strict=True):
        p = []
        for x in X:
            a = u @ x
            if np.linalg.norm(a) > 1e-9 * np.linalg.norm(X):
                p.append(max(alpha, (s * v) @ a / (a @ a)))
        out += s * len(p) / (sum(p) or 1.0) * np.outer(u, v)
    return out


@examples(25)
@given(seeds, st.sampled_from(RANKS), st.sampled_from([0.0, 0.1, 1.0]))
def test_svc_in_the_core_is_the_dense_one_around_a_sum_and_around_tsv(seed, ranks, alpha):
    terms = terms_of(seed, ranks)
    X = dense(terms)
    for inner, whole in ((lambda M: M.sum(0), X.sum(0)), (tsv, in_core(terms, tsv))):
        found = in_core(terms, lambda M, f=inner: svc(M, f, alpha=alpha))
        np.testing.assert_allclose(found, dense_svc(X, whole, alpha), atol=1e-7 * np.abs(X).max())


def test_svc_counts_once_what_two_modules_share_and_leaves_the_rest():
    (a, *_) = terms_of(11)
    same = in_core([a, a, a], lambda M: svc(M, lambda M: M.sum(0), alpha=0.1))
    np.testing.assert_allclose(same, dense([a])[0], atol=1e-11)
    Q, P = (torch.linalg.qr(torch.randn(n, 5, dtype=torch.float64)).Q for n in (OUT, IN))
    apart = [Factor(2.0, P[:, :3].mT, Q[:, :3]), Factor(-1.0, P[:, 3:].mT, Q[:, 3:])]
    found = in_core(apart, lambda M: svc(M, lambda M: M.sum(0), alpha=0.1))
    np.testing.assert_allclose(found, dense(apart).sum(0), atol=1e-11)
    gone = in_core([a, a._replace(weight=-a.weight)], lambda M: svc(M, lambda M: M.sum(0), alpha=0))
    np.testing.assert_allclose(gone, 0, atol=1e-12)


# --- KnOTS ---


def dense_knots(X: np.ndarray, inner) -> np.ndarray:
    U, S, Vh = np.linalg.svd(np.concatenate(list(X), axis=1), full_matrices=False)
    keep = S > 1e-5
    SV = S[keep, None] * Vh[keep]
    parts = np.stack(np.split(SV, len(X), axis=1))
    return U[:, keep] @ inner(parts)


def elementwise(method, **given):
    def rule(entries) -> Rule:
        return method(entries, NO_DRAWS, **given)

    return rule


def numpy_of(rule):
    def run(X: np.ndarray) -> np.ndarray:
        source = Stacked(torch.tensor(X))
        return merged(source, rule(source)).numpy()

    return run


@examples(25)
@given(seeds, st.sampled_from([0.1, 0.5, 1.0]))
def test_knots_in_factors_is_the_dense_one(seed, density):
    terms = terms_of(seed)
    for rule in (
        elementwise(ties, density=density, election="total"),
        elementwise(magnitude, density=density),
    ):
        found = product(knots(core_of(terms), rule))
        np.testing.assert_allclose(found, dense_knots(dense(terms), numpy_of(rule)), atol=1e-10)


@given(seeds)
def test_knots_with_a_sum_is_task_arithmetic(seed):
    terms = terms_of(seed)
    rule = elementwise(magnitude, density=1.0)
    np.testing.assert_allclose(
        product(knots(core_of(terms), rule)), dense(terms).sum(0), atol=1e-10
    )


def test_knots_holds_no_dense_matrix():
    """100,000 x 100,000: 80 GB dense; rows of the common space need 6 MB each."""
    g = torch.Generator().manual_seed(0)
    terms = [
        Factor(1.0, torch.randn(2, 100_000, generator=g), torch.randn(100_000, 2, generator=g))
        for _ in range(2)
    ]
    found = knots(core_of(terms), elementwise(ties, density=0.3, election="total"))
    assert found.A_RI.shape == (4, 100_000) and found.B_OR.shape == (100_000, 4)


# --- compress-then-merge ---


@examples(25)
@given(seeds, st.integers(1, 8), st.sampled_from([0.0, 0.5, 1.0]))
def test_ctm_projects_on_bases_that_no_neighbour_improves(seed, rank, beta):
    """The result is U g(U^T dW V) V^T; U and V are stationary for the energy they keep."""
    terms = terms_of(seed)
    X = dense(terms)
    total = lambda M: M.sum(0)  # noqa: E731
    found = product(ctm(core_of(terms), rank, beta, total))
    assert np.linalg.matrix_rank(found, tol=1e-9) <= rank
    norms = np.linalg.norm(X, axis=(1, 2))
    scaled = X * ((beta * norms + (1 - beta) * norms.mean()) / norms)[:, None, None]
    core = core_of([t._replace(weight=w) for t, w in zip(terms, (1, 1, 1), strict=True)])
    M = np.einsum("oi,top,pj->tij", core.U_OP.numpy(), scaled, core.V_IQ.numpy())
    U, V = (b.numpy() for b in bases(torch.tensor(M), rank))
    U, V = core.U_OP.numpy() @ U, core.V_IQ.numpy() @ V
    np.testing.assert_allclose(found, U @ U.T @ X.sum(0) @ V @ V.T, atol=1e-4)
    kept = ((U.T @ scaled @ V) ** 2).sum()
    rng = np.random.default_rng(seed)
    for _ in range(5):
        turned = np.linalg.qr(U + 1e-3 * rng.normal(size=U.shape))[0]
        assert ((turned.T @ scaled @ V) ** 2).sum() <= kept * (1 + 1e-5)


def test_ctm_with_room_for_everything_is_the_inner_method_in_the_core():
    terms = terms_of(10)
    for rank in (9, 50):
        found = product(ctm(core_of(terms), rank, 0.0, lambda M: M.sum(0)))
        np.testing.assert_allclose(found, dense(terms).sum(0), atol=1e-10)
        found = product(ctm(core_of(terms), rank, 0.0, tsv))
        np.testing.assert_allclose(found, in_core(terms, tsv), atol=1e-10)


def test_ctm_of_one_module_at_its_rank_is_the_module():
    terms = terms_of(11)[:1]
    found = product(ctm(core_of(terms), 3, 0.0, lambda M: M.sum(0)))
    np.testing.assert_allclose(found, dense(terms)[0], atol=1e-11)


# --- means on the sphere ---


def on_sphere(mean, terms: list[Factor], shares: list[float]) -> np.ndarray:
    weights = mean(inner_products(terms), shares, "layer")
    return np.tensordot(weights, dense(terms), 1)


def numpy_slerp(a: np.ndarray, b: np.ndarray, w: float) -> np.ndarray:
    n, m = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos((a * b).sum() / n / m)
    u = (np.sin((1 - w) * angle) * a / n + np.sin(w * angle) * b / m) / np.sin(angle)
    return ((1 - w) * n + w * m) * u


@given(seeds, st.floats(0, 1))
def test_slerp_and_the_karcher_mean_of_two_are_the_great_circle(seed, w):
    terms = terms_of(seed)[:2]
    expected = numpy_slerp(*dense(terms), w)
    for mean in (slerp, karcher):
        np.testing.assert_allclose(on_sphere(mean, terms, [1 - w, w]), expected, atol=1e-9)


@examples(25)
@given(seeds)
def test_at_the_karcher_mean_the_logarithms_cancel(seed):
    terms, w = terms_of(seed), [0.2, 0.5, 0.3]
    mean = on_sphere(karcher, terms, w)
    lengths = np.linalg.norm(dense(terms), axis=(1, 2))
    assert np.linalg.norm(mean) == pytest.approx(np.dot(w, lengths))
    u = mean / np.linalg.norm(mean)
    total = 0.0
    for x, share in zip(dense(terms), w, strict=True):
        x = x / np.linalg.norm(x)
        angle = np.arccos(np.clip((x * u).sum(), -1, 1))
        total = total + share * angle / np.sin(angle) * (x - np.cos(angle) * u)
    assert np.linalg.norm(total) < 1e-10


def test_equal_and_missing_updates_on_the_sphere():
    (a, b, _) = terms_of(12)
    for mean in (slerp, karcher):
        np.testing.assert_allclose(on_sphere(mean, [a, a], [0.3, 0.7]), dense([a])[0], atol=1e-7)
        half = on_sphere(mean, [a, b._replace(weight=0.0)], [0.5, 0.5])
        np.testing.assert_allclose(half, dense([a])[0] / 2, atol=1e-12)
        with pytest.raises(PEMError, match="layer: the updates point in opposite directions"):
            on_sphere(mean, [a, a._replace(weight=-a.weight)], [0.5, 0.5])


@examples(40)
@given(seeds, st.integers(2, 7), st.integers(2, 6), st.sampled_from([1.0, 1e-3, 1e-9]))
def test_a_karcher_mean_is_one_or_there_is_none(seed, count, size, spread):
    """Directions over the whole sphere, near each other, and some of them twice."""
    draw = np.random.default_rng(seed)
    V = draw.normal(size=size) * (spread < 1) + spread * draw.normal(size=(count, size))
    if count > 2:
        V[1] = 2 * V[0]
    w = draw.dirichlet(np.ones(count))
    try:
        mean = np.array(karcher(torch.tensor(V @ V.T), w.tolist(), "layer")) @ V
    except PEMError as error:
        assert "layer: the" in str(error) and spread == 1
        return
    u = mean / np.linalg.norm(mean)
    x = V / np.linalg.norm(V, axis=1)[:, None]
    off = x - (x @ u)[:, None] * u
    sines = np.linalg.norm(off, axis=1)
    assert np.linalg.norm((w * np.arctan2(sines, x @ u) / np.maximum(sines, 1e-300)) @ off) < 1e-8


# --- on the factors ---


def test_robustmerge_is_the_published_rule():
    terms = terms_of(13, (3, 3), (0.5, -2.0))
    density = 0.4

    def top(x: np.ndarray) -> np.ndarray:
        order = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
        mask = np.zeros(x.size, bool)
        mask[order] = True
        return x * mask.reshape(x.shape)

    A, B = [t.A_RI.numpy() for t in terms], [t.B_OR.numpy() for t in terms]
    S = np.stack([np.abs(a).sum(1) / np.abs(top(a)).sum(1) for a in A])
    S = S / S.sum(0)
    expected = sum(
        t.weight * top(b) @ np.diag(s) @ top(a) for t, a, b, s in zip(terms, A, B, S, strict=True)
    )
    found = on_factors.robustmerge(terms, "layer", density=density)
    np.testing.assert_allclose(sum(map(product, found)), expected, atol=1e-13)


def test_robustmerge_of_one_module_unpruned_is_the_module_and_ranks_must_agree():
    terms = terms_of(14)
    (found,) = on_factors.robustmerge(terms[:1], "layer", density=1.0)
    np.testing.assert_allclose(product(found), dense(terms[:1])[0], atol=1e-13)
    with pytest.raises(IncompatibleModules, match=r"found ranks \[2, 3, 4\], expected equal ranks"):
        on_factors.robustmerge(terms, "layer", density=0.5)


def test_lego_groups_what_is_alike():
    """Two modules made of the same three units, slightly moved: the centroids are their means."""
    g = torch.Generator().manual_seed(3)
    A, B = torch.randn(3, IN, generator=g).double(), torch.randn(OUT, 3, generator=g).double()
    order = [2, 0, 1]
    nudged = Factor(1.0, A[order] + 0.01, B[:, order] - 0.01)
    (found,) = on_factors.lego([Factor(1.0, A, B), nudged], NO_DRAWS, 3, seed=0)
    expected = np.zeros((OUT, IN))
    for k in range(3):
        pair = np.stack([np.r_[A[k], B[:, k]], np.r_[A[k] + 0.01, B[:, k] - 0.01]])
        mean = pair.mean(0)
        mean *= np.abs(pair).max(1).mean() / np.abs(mean).max()
        expected += np.outer(mean[IN:], mean[:IN])
    np.testing.assert_allclose(product(found), expected, atol=1e-12)


def test_lego_with_a_cluster_per_unit_keeps_every_unit():
    terms = terms_of(15)
    (one,) = on_factors.lego(terms[:1], NO_DRAWS, 3, seed=0)
    np.testing.assert_allclose(product(one), dense(terms[:1])[0], atol=1e-13)
    (every,) = on_factors.lego(terms, NO_DRAWS, 9, seed=0)  # output scaled by sqrt(r / K)
    np.testing.assert_allclose(product(every), dense(terms).sum(0) * (3 / 9) ** 0.5, atol=1e-13)


def test_clusters_that_are_there_are_those_of_scikit_learn():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    units = rng.normal(size=(5, 12))[rng.permutation(np.repeat(range(5), 5))]
    units = units + 0.3 * rng.normal(size=units.shape)
    ours = on_factors._kmeans(torch.tensor(units), 5, NO_DRAWS).numpy()
    theirs = KMeans(5, n_init=10, random_state=0).fit(units).labels_
    np.testing.assert_array_equal(ours[:, None] == ours, theirs[:, None] == theirs)
