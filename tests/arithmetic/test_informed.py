"""Fisher, RegMean and SSR as pure functions, against float64 NumPy and least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pem_composition.arithmetic.methods.fisher_average import fisher
from pem_composition.arithmetic.methods.regmean import regmean
from pem_composition.arithmetic.methods.ssr import ssr
from pem_composition.arithmetic.terms import Factor
from pem_composition.errors import PEMError

OUT, IN = 6, 5
RANKS = (2, 3, 1)
WEIGHTS, SHARES = (0.5, -1.25, 2.0), (0.2, 0.5, 0.3)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {"l.lora_A": draw(2, IN, seed=seed), "l.lora_B": draw(OUT, 2, seed=seed + 50)}


def fishers(seed: int) -> dict[str, torch.Tensor]:
    return {name: t.square() for name, t in tensors(seed + 100).items()}


# --- Fisher ---


@pytest.mark.parametrize("normalize", ["none", "norm"])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_fisher_is_the_average_weighted_by_information(normalize, floor):
    modules, diagonals = [tensors(s) for s in (1, 2, 3)], [fishers(s) for s in (1, 2, 3)]
    found = fisher(modules, diagonals, SHARES, floor=floor, normalize=normalize)
    for name in modules[0]:
        above = below = 0.0
        for module, diagonal, c in zip(modules, diagonals, SHARES, strict=True):
            entries = np.concatenate([d.numpy().ravel() for d in diagonal.values()])
            least = floor * entries.mean()
            size = np.linalg.norm(np.maximum(entries, least)) if normalize == "norm" else 1.0
            weight = c / size * np.maximum(diagonal[name].numpy(), least)
            above, below = above + weight * module[name].numpy(), below + weight
        np.testing.assert_allclose(found[name], above / below, rtol=1e-12)


def test_fisher_of_equal_modules_is_the_module_whatever_it_says():
    same = tensors(1)
    found = fisher([same, same], [fishers(1), fishers(2)], (0.1, 0.9), floor=1e-6, normalize="none")
    for name, tensor in same.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-12)


def test_what_one_module_alone_needs_is_taken_from_it():
    a, b = {"l.ia3": torch.tensor([2.0, 3.0])}, {"l.ia3": torch.tensor([5.0, 7.0])}
    needs = [{"l.ia3": torch.tensor([1.0, 0.0])}, {"l.ia3": torch.tensor([0.0, 1.0])}]
    found = fisher([a, b], needs, (1.0, 1.0), floor=1e-12, normalize="none")
    np.testing.assert_allclose(found["l.ia3"], [2.0, 7.0], atol=1e-9)


def test_a_fisher_that_is_zero_or_lacks_a_tensor_is_refused():
    module = tensors(1)
    zero = {n: torch.zeros_like(t) for n, t in module.items()}
    with pytest.raises(PEMError, match="module 1: is zero everywhere"):
        fisher([module] * 2, [fishers(1), zero], (1, 1), floor=1e-6, normalize="none")
    less = {"l.lora_A": zero["l.lora_A"]}
    with pytest.raises(PEMError, match=r"module 0: has no entry for tensor 'l.lora_B'"):
        fisher([module], [less], (1,), floor=1e-6, normalize="none")


# --- RegMean ---


def inputs(rows: int) -> list[np.ndarray]:
    return [draw(rows, IN, seed=70 + i).numpy() for i in range(len(RANKS))]


def terms() -> list[Factor]:
    return [
        Factor(w, draw(r, IN, seed=10 + r), draw(OUT, r, seed=20 + r))
        for w, r in zip(WEIGHTS, RANKS, strict=True)
    ]


def dense(term: Factor) -> np.ndarray:
    return term.weight * (term.B_OR @ term.A_RI).numpy()


def test_regmean_solves_the_least_squares_problem():
    """sum_i c_i ||(dW - dW_i) X_i||^2, stacked and given to NumPy's solver."""
    X = inputs(rows=9)
    grams = [torch.tensor(x.T @ x) for x in X]
    found = regmean(terms(), grams, SHARES, off_diagonal=1.0, layer="l")
    left = np.concatenate([np.sqrt(c) * x for c, x in zip(SHARES, X, strict=True)])
    right = np.concatenate(
        [np.sqrt(c) * x @ dense(t).T for c, x, t in zip(SHARES, X, terms(), strict=True)]
    )
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(dense(found), expected, rtol=1e-9, atol=1e-12)
    assert found.A_RI.shape == (sum(RANKS), IN)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9])
def test_off_diagonal_entries_are_scaled_as_published(off_diagonal):
    grams = [x.T @ x for x in inputs(rows=9)]
    scaled = [np.where(np.eye(IN) == 1, g, off_diagonal * g) for g in grams]
    above = sum(c * dense(t) @ g for c, t, g in zip(SHARES, terms(), scaled, strict=True))
    below = sum(c * g for c, g in zip(SHARES, scaled, strict=True))
    found = regmean(
        terms(), [torch.tensor(g) for g in grams], SHARES, off_diagonal=off_diagonal, layer="l"
    )
    np.testing.assert_allclose(dense(found), above @ np.linalg.inv(below), rtol=1e-9, atol=1e-12)


def test_with_equal_inputs_regmean_is_the_weighted_mean():
    gram = torch.tensor(inputs(rows=9)[0].T @ inputs(rows=9)[0])
    found = regmean(terms(), [gram] * 3, SHARES, off_diagonal=0.9, layer="l")
    expected = sum(c * dense(t) for c, t in zip(SHARES, terms(), strict=True))
    np.testing.assert_allclose(dense(found), expected, rtol=1e-9, atol=1e-12)


def test_directions_that_no_input_has_are_left_alone():
    """Two rows in five dimensions: the inverse does not exist, the pseudo-inverse's answer does."""
    X = inputs(rows=1)[:2]
    grams = [torch.tensor(x.T @ x) for x in X]
    found = regmean(terms()[:2], grams, (1.0, 1.0), off_diagonal=1.0, layer="l")
    stacked = np.concatenate(X)
    unseen = np.linalg.svd(stacked)[2][2:]
    np.testing.assert_allclose(dense(found) @ unseen.T, 0, atol=1e-9)
    for x, term in zip(X, terms(), strict=False):
        np.testing.assert_allclose(dense(found) @ x.T, dense(term) @ x.T, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_the_rounding_of_a_stored_gram_matrix_is_no_direction(rows):
    """float32 files: what is singular in exact arithmetic has eigenvalues of 1e-8, some above 0."""
    width, g = 32, torch.Generator().manual_seed(rows)
    X = [torch.randn(rows, width, generator=g, dtype=torch.float64) for _ in range(2)]
    wide = [
        Factor(1.0, *(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes))
        for shapes in (((3, width), (OUT, 3)), ((2, width), (OUT, 2)))
    ]
    exact = regmean(wide, [x.mT @ x for x in X], (1.0, 1.0), off_diagonal=1.0, layer="l")
    stored = [(x.mT @ x).float() for x in X]
    found = regmean(wide, stored, (1.0, 1.0), off_diagonal=1.0, layer="l")
    np.testing.assert_allclose(dense(found), dense(exact), atol=1e-4 * np.abs(dense(exact)).max())


def test_a_gram_matrix_of_another_layer_is_refused():
    with pytest.raises(PEMError, match=r"Gram matrix of l: .*found \(4, 4\), expected \(5, 5\)"):
        regmean(terms()[:1], [torch.eye(4)], (1.0,), off_diagonal=0.9, layer="l")


# --- SSR ---


def seen_by(own: list[Factor], X: list[np.ndarray]) -> list[torch.Tensor]:
    A = torch.cat([t.A_RI for t in own])
    return [A @ torch.tensor(x.T @ x) @ A.mT for x in X]


def test_ssr_is_the_nearest_update_whose_rows_are_the_modules():
    """Three rows of A in five dimensions; NumPy's solver finds B of B A."""
    own, X, shares = terms()[::2], inputs(rows=9)[:2], (0.2, 0.8)
    found = ssr(own, seen_by(own, X), shares, ridge=0.0, layer="l")
    A = np.concatenate([t.A_RI.numpy() for t in own])
    left = np.concatenate([np.sqrt(c) * x @ A.T for c, x in zip(shares, X, strict=True)])
    right = np.concatenate(
        [np.sqrt(c) * x @ dense(t).T for c, x, t in zip(shares, X, own, strict=True)]
    )
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T @ A
    np.testing.assert_allclose(dense(found), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(found.A_RI, torch.cat([t.A_RI for t in own]))


def test_where_the_rows_span_the_inputs_ssr_is_regmean():
    """Six rows of A in five dimensions: G is singular, its pseudo-inverse leaves nothing out."""
    X = inputs(rows=9)
    grams = [torch.tensor(x.T @ x) for x in X]
    expected = regmean(terms(), grams, SHARES, off_diagonal=1.0, layer="l")
    found = ssr(terms(), seen_by(terms(), X), SHARES, ridge=0.0, layer="l")
    np.testing.assert_allclose(dense(found), dense(expected), rtol=1e-8, atol=1e-10)
    near = ssr(terms(), seen_by(terms(), X), SHARES, ridge=1e-9, layer="l")
    np.testing.assert_allclose(dense(near), dense(expected), atol=1e-6)


def test_the_ridge_of_ssr_is_a_share_of_the_mean_diagonal():
    own, X = terms()[:1], inputs(rows=9)[:1]
    (S,) = seen_by(own, X)
    G = S.numpy()
    R = G @ np.linalg.inv(G + 0.5 * np.trace(G) / len(G) * np.eye(len(G)))
    found = ssr(own, [S], (1.0,), ridge=0.5, layer="l")
    expected = own[0].weight * own[0].B_OR.numpy() @ R @ own[0].A_RI.numpy()
    np.testing.assert_allclose(dense(found), expected, rtol=1e-10)


def test_statistics_of_other_ranks_are_refused():
    with pytest.raises(PEMError, match=r"statistics of l: .*found \(4, 4\), expected \(2, 2\)"):
        ssr(terms()[:1], [torch.eye(4)], (1.0,), ridge=0.0, layer="l")
