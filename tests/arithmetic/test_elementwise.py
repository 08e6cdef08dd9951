"""Methods that work entry by entry, on dense matrices: PEFT, NumPy and hand-computed cases.

What other implementations get wrong has a test named after it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from support.examples import examples

from pem_composition.arithmetic.methods import dare, della
from pem_composition.arithmetic.methods import entries as blocks_module
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Stacked, merged
from pem_composition.arithmetic.methods.ext_sub import on_factors
from pem_composition.arithmetic.methods.registry import ELEMENTWISE, resolve
from pem_composition.arithmetic.terms import Factor

SHAPE = (6, 5)
NAMES = [m.name for m in ELEMENTWISE]
FIXED = [m.name for m in ELEMENTWISE if not m.random]
seeds = st.integers(0, 2**31 - 1)


def arrays(seed: int, modules: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(modules, *SHAPE))


def run(name: str, X: np.ndarray, layer: str = "layer", **given: object) -> np.ndarray:
    """The method on T dense matrices."""
    choice = resolve(name, given, "full")
    source = Stacked(torch.tensor(X))
    draws = Draws(int(choice.as_dict().get("seed", 0)), layer)
    rule = choice.entry.function()(source, draws, **choice.as_dict())
    return merged(source, rule).numpy()


def top(x: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(-np.abs(x).ravel(), kind="stable")[:count]
    mask = np.zeros(x.size, dtype=bool)
    mask[order] = True
    return x * mask.reshape(x.shape)


def elected(X: np.ndarray, election: str = "total") -> np.ndarray:
    votes = X if election == "total" else np.sign(X)
    sign = np.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(X) == sign
    return np.where(agree, X, 0).sum(0) / np.maximum(agree.sum(0), 1)


# --- against PEFT's functions on dense tensors ---


@examples(30)
@given(seeds, st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]), st.sampled_from(["total", "frequency"]))
def test_ties_is_that_of_peft(seed, density, election):
    X = arrays(seed)
    expected = merge_utils.ties(list(torch.tensor(X)), torch.ones(3), density, election)
    found = run("ties", X, density=density, election=election)
    np.testing.assert_allclose(found, expected, atol=1e-14)


@examples(30)
@given(seeds, st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]))
def test_magnitude_pruning_is_that_of_peft(seed, density):
    X, c = arrays(seed), np.array([0.3, -1.2, 2.0])
    expected = merge_utils.magnitude_prune(list(torch.tensor(X)), torch.tensor(c), density)
    found = run("magnitude", c[:, None, None] * X, density=density)
    np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("election", ["total", "frequency"])
def test_dare_ties_after_the_drop_is_that_of_peft(election, monkeypatch):
    """The same masks in both: PEFT's random pruning is replaced by ours."""
    X = arrays(1)
    drop = dare.dropped(Draws(5, "layer"), 0.5)(0, torch.tensor(X))
    replaced = iter(drop)
    monkeypatch.setattr(merge_utils, "prune", lambda *a, **k: next(replaced))
    expected = merge_utils.dare_ties(list(torch.tensor(X)), torch.ones(3), 0.5, election)
    found = run("dare_ties", X, density=0.5, seed=5, election=election)
    np.testing.assert_allclose(found, expected, atol=1e-14)


# --- against the published rule in NumPy ---


@examples(30)
@given(seeds, st.sampled_from([0.1, 0.35, 0.8]), st.sampled_from([0.0, 0.04, 0.2]))
def test_breadcrumbs_drops_both_ends(seed, density, gamma):
    X = arrays(seed)
    size, outliers = X[0].size, int(gamma * X[0].size)
    expected = sum(top(x, outliers + int(density * size)) - top(x, outliers) for x in X)
    np.testing.assert_allclose(run("breadcrumbs", X, density=density, gamma=gamma), expected)


@examples(30)
@given(seeds, st.sampled_from([0.1, 0.5, 1.0]))
def test_sce_selects_calculates_erases(seed, density):
    X = arrays(seed)
    keep = top(X.var(axis=0), int(density * X[0].size)) != 0
    S = X * keep
    w = (S**2).sum((1, 2))[:, None, None]
    agree = np.sign(S) == np.where(S.sum(0) >= 0, 1, -1)
    total = (w * agree).sum(0)
    expected = np.where(total > 0, (w * S * agree).sum(0) / np.where(total > 0, total, 1), 0)
    np.testing.assert_allclose(run("sce", X, density=density), expected, atol=1e-14)


@given(seeds, st.sampled_from([1, 2, 3]))
def test_negmerge_is_the_mean_of_what_all_agree_on(seed, modules):
    """The published program: sums of signs are compared with the number of modules."""
    X = arrays(seed, modules)
    X[0, 0, 0] = 0.0  # agrees with nothing
    expected = np.zeros(SHAPE)
    for place in np.ndindex(SHAPE):
        column = X[(slice(None), *place)]
        if (column > 0).all() or (column < 0).all():
            expected[place] = column.sum() / modules
    np.testing.assert_allclose(run("negmerge", X), expected, atol=1e-14)


# --- Ext-Sub, row by row ---


def numpy_ext_sub(a: np.ndarray, b: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """The published program: a - s b + s (the part of b along the common direction)."""
    out = np.empty_like(a)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        common = x / np.linalg.norm(x) + y / np.linalg.norm(y)
        common /= np.linalg.norm(common)
        out[i] = x - strength * y + strength * (y @ common) * common
    return out


@given(seeds, st.sampled_from([0.3, 1.0]))
def test_ext_sub_is_the_published_program(seed, strength):
    a, b = arrays(seed, 2)
    found = run("ext_sub", np.stack([a, strength * b]))
    np.testing.assert_allclose(found, numpy_ext_sub(a, b, strength), atol=1e-12)


@given(seeds, st.sampled_from([(2, 3), (1, 1), (9, 4)]))
def test_ext_sub_on_factors_is_the_dense_one(seed, ranks):
    g = torch.Generator().manual_seed(seed)
    terms = [
        Factor(w, *(torch.randn(s, generator=g, dtype=torch.float64) for s in ((r, 5), (6, r))))
        for r, w in zip(ranks, (2.0, -0.7), strict=True)
    ]
    a, b = (t.weight * (t.B_OR @ t.A_RI).numpy() for t in terms)
    found = sum((t.B_OR @ t.A_RI).numpy() for t in on_factors(terms))
    np.testing.assert_allclose(found, numpy_ext_sub(a, b), atol=1e-11)


def test_where_one_row_is_zero_nothing_is_shared():
    a, b = arrays(1, 2)
    a[0] = b[1] = 0.0
    found = run("ext_sub", np.stack([a, b]))
    np.testing.assert_allclose(found[:2], [-b[0], a[1]], atol=1e-15)
    opposite = run("ext_sub", np.stack([a, -2 * a]))  # nothing in common: all is subtracted
    np.testing.assert_allclose(opposite, 3 * a, atol=1e-14)
    same = run("ext_sub", np.stack([a, 2 * a]))  # all in common: nothing is
    np.testing.assert_allclose(same, a, atol=1e-14)


def test_della_keeps_by_rank_in_the_row_and_rescales():
    X = torch.tensor([[[0.1, -3.0, 2.0], [5.0, -1.0, 4.0]]], dtype=torch.float64)
    p = della.keep_probabilities(X, 0.5, 0.2)
    np.testing.assert_allclose(p[0], [[0.4, 0.6, 0.5], [0.6, 0.4, 0.5]])
    found = run("della", X.numpy(), density=0.5, epsilon=0.2)
    kept = found != 0
    np.testing.assert_allclose(found[kept], (X[0] / p[0]).numpy()[kept])


def test_della_without_spread_is_dare_with_election():
    X = arrays(2)
    np.testing.assert_array_equal(
        run("della", X, density=0.4, epsilon=0, seed=3), run("dare_ties", X, density=0.4, seed=3)
    )


@pytest.mark.parametrize(("name", "density"), [("dare", 0.3), ("dare", 0.9)])
def test_dare_keeps_the_share_and_the_expectation(name, density):
    X = np.random.default_rng(0).normal(size=(1, 300, 200))
    found = run(name, X, density=density)
    kept = found != 0
    assert abs(kept.mean() - density) < 0.01
    np.testing.assert_allclose(found[kept], X[0][kept] / density, rtol=1e-15)
    many = np.mean([run(name, X[:, :3], density=density, seed=s) for s in range(600)], axis=0)
    assert abs((many * X[0, :3]).sum() / (X[0, :3] ** 2).sum() - 1) < 0.05


# --- worked by hand ---


def test_ties_by_hand():
    X = np.array([[[4.0, -3.0, 0.1, 2.0]], [[-5.0, -1.0, 0.2, 3.0]]])
    # trimmed to two: [4, -3, 0, 0] and [-5, 0, 0, 3]; signs: -, -, (none), +
    np.testing.assert_array_equal(run("ties", X, density=0.5), [[-5.0, -3.0, 0.0, 3.0]])
    # all kept: column 0: -5; column 1: (-3 - 1) / 2; column 2: 0.15; column 3: 2.5
    np.testing.assert_allclose(run("ties", X, density=1.0), [[-5.0, -2.0, 0.15, 2.5]])


def test_an_exact_tie_of_signs_elects_plus():
    X = np.array([[[2.0]], [[-2.0]]])
    np.testing.assert_array_equal(run("ties", X, density=1.0), [[2.0]])


def test_majority_of_signs_by_hand():
    X = np.array([[[-9.0]], [[1.0]], [[2.0]]])
    assert run("ties", X, density=1.0, election="frequency")[0, 0] == 1.5
    assert run("ties", X, density=1.0, election="total")[0, 0] == -9.0


def test_breadcrumbs_by_hand():
    X = np.array([[[10.0, 1.0, 2.0, 3.0, 4.0]]])
    np.testing.assert_array_equal(
        run("breadcrumbs", X, density=0.4, gamma=0.2), [[0, 0, 0, 3.0, 4.0]]
    )


# --- laws ---


@pytest.mark.parametrize("name", [n for n in NAMES if n != "breadcrumbs"])
def test_with_every_entry_kept_one_module_alone_is_itself(name):
    X = arrays(0, modules=1)
    given = {} if name == "negmerge" else {"density": 1.0}
    given |= {"epsilon": 0} if name == "della" else {}
    np.testing.assert_allclose(run(name, X, **given), X[0], rtol=1e-14)


def test_with_every_entry_kept_the_sums_are_the_sum():
    X = arrays(3)
    for name, extra in (("magnitude", {}), ("dare", {}), ("breadcrumbs", {"gamma": 0})):
        np.testing.assert_allclose(run(name, X, density=1.0, **extra), X.sum(0), rtol=1e-14)


@pytest.mark.parametrize("name", FIXED)
@examples(20)
@given(seeds)
def test_the_order_of_modules_does_not_matter(name, seed):
    X = arrays(seed)
    np.testing.assert_allclose(run(name, X), run(name, X[[2, 0, 1]]), atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@examples(20)
@given(seeds, st.floats(0.01, 100))
def test_a_common_factor_comes_out(name, seed, factor):
    X = arrays(seed)
    np.testing.assert_allclose(run(name, factor * X), factor * run(name, X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_flipped_axes_flip_the_result(name):
    """Rows or columns of other sign: the core's axes have no sign of their own."""
    X, rows = arrays(4), np.array([1, -1, -1, 1, -1, 1.0])[:, None]
    np.testing.assert_allclose(run(name, rows * X), rows * run(name, X), atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_any_size_give_the_same(name, monkeypatch):
    X = arrays(5)
    whole = run(name, X)
    for size in (1, 20, 40):
        monkeypatch.setattr(blocks_module, "BLOCK", size)
        # sce sums energies block by block; everything else is the same to the bit
        rtol = 1e-13 if name == "sce" else 0
        np.testing.assert_allclose(run(name, X), whole, rtol=rtol)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FIXED])
def test_the_seed_and_the_layer_decide_and_nothing_else(name):
    X = arrays(6)
    torch.manual_seed(1)
    first = run(name, X, seed=1)
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, run(name, X, seed=1))
    assert not np.array_equal(first, run(name, X, seed=2))
    assert not np.array_equal(first, run(name, X, "other", seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_zeros_is_no_opinion(name):
    """It neither votes nor divides the mean, and no value turns into nan."""
    X = arrays(7)
    with_zeros = np.concatenate([X, np.zeros((1, *SHAPE))])
    found = run(name, with_zeros)
    assert np.isfinite(found).all()
    if name not in ("sce", "negmerge"):  # a zero counts for the variance, or is a veto
        np.testing.assert_allclose(found, run(name, X), atol=1e-14)
    assert not run(name, np.zeros((2, *SHAPE))).any()


# --- what others get wrong ---


def test_dare_divides_by_the_density_in_the_result():
    """PEFT before 0.19 and LoRAX compute tensor / density and throw it away."""
    X = arrays(8, modules=1)
    found = run("dare", X, density=0.5)
    assert np.abs(found).max() > np.abs(X).max()


def test_a_density_near_zero_keeps_an_entry_and_is_no_nan():
    """PEFT's density = 0 is nan for DARE; here 0 is refused and the smallest density keeps one."""
    X = arrays(9)
    for name in ("ties", "magnitude", "sce"):
        found = run(name, X, density=1e-9)
        assert np.isfinite(found).all() and np.count_nonzero(found) >= 1


def test_breadcrumbs_without_outliers_does_not_wipe_the_update():
    """An empty slice from the top clears everything in mergekit (gamma = 0, or few entries)."""
    X = arrays(10)
    for gamma in (0.0, 0.01):  # 0.01 of 30 entries is none
        assert np.count_nonzero(run("breadcrumbs", X, density=0.5, gamma=gamma)) >= 15


def test_the_mean_of_ties_does_not_explode_with_mixed_signs():
    """mergekit divides by the sum of agreeing weights: 1 and -0.9 make a factor of 10."""
    X = np.array([[[1.0, 2.0]], [[1.0, -2.0]]])
    found = run("ties", np.array([1.0, -0.9])[:, None, None] * X, density=1.0)
    np.testing.assert_allclose(found, [[1.0, 1.9]])


def test_every_module_is_weighted_by_its_own_coefficient():
    """KnOTS' and core space's code multiply every module by weights[0]."""
    X = np.array([[[1.0]], [[10.0]]])
    assert run("magnitude", np.array([2.0, 3.0])[:, None, None] * X, density=1.0)[0, 0] == 32.0
