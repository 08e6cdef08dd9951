"""The published, dense form on low-rank updates: compression, its error, bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pem_composition.arithmetic.methods import dense
from pem_composition.arithmetic.methods import entries as blocks_module
from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Products, merged
from pem_composition.arithmetic.methods.ties import ties
from pem_composition.arithmetic.terms import Factor

DRAWS = Draws(0, "layer")


def case(out: int = 40, inputs: int = 30, modules: int = 3) -> tuple[Products, object, np.ndarray]:
    """Updates of rank 2, the rule of TIES on them, and its dense result."""
    g = torch.Generator().manual_seed(0)
    terms = [
        Factor(1.0, torch.randn(2, inputs, generator=g), torch.randn(out, 2, generator=g))
        for _ in range(modules)
    ]
    source = Products(terms)
    rule = ties(source, DRAWS, density=0.2, election="total")
    return source, rule, merged(source, rule).numpy()


def product(factor: Factor) -> np.ndarray:
    return factor.B_OR.double().numpy() @ factor.A_RI.double().numpy()


@pytest.mark.parametrize("rank", [1, 6, 30, 500])
def test_a_small_layer_is_compressed_to_the_best_rank(rank):
    source, rule, exact = case()
    found = dense.compressed(source, rule, rank, DRAWS)
    S = np.linalg.svd(exact, compute_uv=False)
    error = np.linalg.norm(product(found) - exact)
    np.testing.assert_allclose(error, np.linalg.norm(S[rank:]), atol=1e-10)
    assert found.A_RI.shape[0] == min(rank, np.linalg.matrix_rank(exact))


def test_a_large_layer_is_sketched_close_to_the_best_rank(monkeypatch):
    monkeypatch.setattr(dense, "EXACT", 0)
    monkeypatch.setattr(blocks_module, "BLOCK", 2000)  # several blocks of rows
    source, rule, exact = case(200, 150)
    found = dense.compressed(source, rule, 8, DRAWS)
    S = np.linalg.svd(exact, compute_uv=False)
    best = np.linalg.norm(S[8:])
    error = np.linalg.norm(product(found) - exact)
    assert best <= error < 1.02 * best
    np.testing.assert_array_equal(product(found), product(dense.compressed(source, rule, 8, DRAWS)))


@pytest.mark.parametrize("limit", [dense.EXACT, 0], ids=["svd", "sketch"])
def test_a_share_of_the_energy_is_kept_with_few_directions(limit, monkeypatch):
    """By a sketch, too, which grows until it holds it; it may need a few directions more."""
    monkeypatch.setattr(dense, "EXACT", limit)
    monkeypatch.setattr(dense, "FIRST_COLUMNS", 8)
    source, rule, exact = case(200, 150)
    found = dense.compressed(source, rule, 0.95, DRAWS)
    energies = np.square(np.linalg.svd(exact, compute_uv=False))
    best = 1 + int((energies.cumsum() < 0.95 * energies.sum()).sum())
    assert 16 < best <= len(found.A_RI) <= (best if limit else best + 4)
    assert np.square(np.linalg.norm(product(found))) >= 0.95 * energies.sum()


def test_the_error_of_what_is_written_is_exact(monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK", 100)
    source, rule, exact = case()
    written = dense.compressed(source, rule, 4, DRAWS)
    written = Factor(1.0, written.A_RI.to(torch.bfloat16), written.B_OR.to(torch.bfloat16))
    report = dense.error(source, rule, written)
    assert report.error == pytest.approx(np.linalg.norm(product(written) - exact), rel=1e-12)
    assert report.norm == pytest.approx(np.linalg.norm(exact), rel=1e-12)


def test_a_large_layer_is_read_in_blocks_alone(monkeypatch):
    """Thresholds, sketch and error: never more than a block of rows at a time."""
    monkeypatch.setattr(dense, "EXACT", 0)
    monkeypatch.setattr(blocks_module, "BLOCK", 3000)
    seen = []

    class Watched(Products):
        def rows(self, start: int, stop: int) -> torch.Tensor:
            X = super().rows(start, stop)
            seen.append(X.numel())
            return X

    g = torch.Generator().manual_seed(0)
    terms = [Factor(1.0, torch.randn(2, 60, generator=g), torch.randn(90, 2, generator=g))] * 3
    source = Watched(terms)
    rule = ties(source, DRAWS, density=0.2, election="total")
    written = dense.compressed(source, rule, 4, DRAWS)
    dense.error(source, rule, written)
    assert max(seen) <= 3000 < 3 * 90 * 60
    passes = sum(seen) / (3 * 90 * 60)
    assert passes == pytest.approx(2 + 2 * dense.POWERS + 2 + 1)
