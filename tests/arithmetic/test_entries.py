"""Exact selection in blocks of rows, and random numbers by place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from pem_composition.arithmetic.methods import entries as module
from pem_composition.arithmetic.methods.draws import Draws, splitmix64
from pem_composition.arithmetic.methods.entries import (
    Products,
    Scaled,
    Stacked,
    blocks,
    largest,
    magnitudes,
)
from pem_composition.arithmetic.terms import Factor


def chosen(source, count: int) -> np.ndarray:
    """Masks of the selected entries, block by block, (T, O, I)."""
    picked = largest(source, magnitudes, count)
    parts = [
        np.stack([p.mask(start, x.abs()).numpy() for p, x in zip(picked, X, strict=True)])
        for start, X in blocks(source)
    ]
    return np.concatenate(parts, axis=1)


def by_sorting(X: np.ndarray, count: int) -> np.ndarray:
    """Stable sort of every matrix by magnitude: of equal entries the first."""
    flat = np.abs(X).reshape(len(X), -1)
    mask = np.zeros_like(flat, dtype=bool)
    for t, row in enumerate(flat):
        mask[t, np.argsort(-row, kind="stable")[:count]] = True
    return mask.reshape(X.shape)


@examples(30)
@given(st.integers(0, 2**31), st.integers(1, 3), st.booleans(), st.sampled_from([7, 29, 10**6]))
def test_selection_is_that_of_a_sort_for_any_block_size(seed, modules, equal, block):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(modules, 6, 5)) * 10.0 ** rng.integers(-300, 300)
    if equal:  # many entries of equal magnitude, zeros among them
        X = rng.integers(-2, 3, size=X.shape).astype(float)
    source = Stacked(torch.tensor(X))
    before, module.BLOCK = module.BLOCK, block
    try:
        for count in (1, 13, 30):
            np.testing.assert_array_equal(chosen(source, count), by_sorting(X, count))
    finally:
        module.BLOCK = before


def test_values_that_share_their_leading_bits_are_told_apart(monkeypatch):
    """More candidates than a block in every pass: the radix goes down to the last bit."""
    monkeypatch.setattr(module, "BLOCK", 4)
    base = np.float64(1.0).view(np.int64)
    X = (base + np.random.default_rng(0).permutation(600)).view(np.float64).reshape(1, 30, 20)
    for count in (1, 300, 599):
        np.testing.assert_array_equal(chosen(Stacked(torch.tensor(X)), count), by_sorting(X, count))


def test_products_and_scaled_tensors_are_read_as_matrices(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 10)
    g = torch.Generator().manual_seed(0)
    terms = [
        Factor(w, torch.randn(2, 5, generator=g), torch.randn(7, 2, generator=g))
        for w in (0.5, -2.0)
    ]
    whole = torch.cat([X for _, X in blocks(Products(terms))], dim=1)
    for x, t in zip(whole, terms, strict=True):
        expected = t.weight * t.B_OR.double() @ t.A_RI.double()
        np.testing.assert_allclose(x, expected, rtol=1e-12)
    vector = torch.tensor([1.5, 1.0, 0.5])
    (start, X), *rest = blocks(Scaled([(2.0, vector)], neutral=1.0))
    assert (start, rest, X.tolist()) == (0, [], [[[1.0, 0.0, -1.0]]])
    cube = Scaled([(1.0, torch.zeros(4, 3, 2))])
    assert cube.shape == (12, 2)  # four matrices one below the other


def test_a_large_product_is_never_held_whole():
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(1, 5000, generator=g), torch.randn(3000, 1, generator=g)
    source = Products([Factor(1.0, A, B)])
    sizes = [X.numel() for _, X in blocks(source)]
    assert sum(sizes) == 15_000_000 and max(sizes) <= module.BLOCK
    (top,) = largest(source, magnitudes, 1)
    assert top.value == pytest.approx(float(A.abs().max() * B.abs().max()))


# Random numbers.


def test_the_generator_is_splitmix64():
    """Outputs of the published generator for seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = [int(x) % 2**64 for x in splitmix64(1234567, 0, 5)]
    assert found == expected


def test_a_number_depends_on_its_place_alone():
    draws = Draws(3, "enc.0.query")
    whole = draws.uniform(1, 0, 1000)
    parts = torch.cat([draws.uniform(1, i, 8) for i in range(0, 1000, 8)])
    assert torch.equal(whole, parts)
    for other in (Draws(4, "enc.0.query"), Draws(3, "enc.1.query")):
        assert not torch.equal(whole, other.uniform(1, 0, 1000))
    assert not torch.equal(whole, draws.uniform(0, 0, 1000))


def test_numbers_are_uniform():
    u = Draws(0, "x").uniform(0, 0, 200_000).numpy()
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, deviation 14
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
