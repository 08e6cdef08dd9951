"""Comparisons of modules against dense float64 NumPy, over ranks, scalings and targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from support.small_modules import updates as dense

from pem_composition.arithmetic.comparison import compare, profile
from pem_composition.config import FullConfig, IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules
from pem_composition.module import PEM, combine

OUT, IN = 7, 6


def lora(seed: int, r: int = 3, alpha: float = 6, layers=("b.0.q", "b.1.q"), **options) -> PEM:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_A"] = torch.randn(r, IN, generator=g)
        tensors[f"{layer}.lora_B"] = torch.randn(OUT, r, generator=g)
    return PEM(tensors, LoraConfig(r, alpha, ("q",), **options), name=f"m{seed}")


def ia3(seed: int) -> PEM:
    g = torch.Generator().manual_seed(seed)
    tensors = {f"b.{i}.k.ia3": 1 + 0.3 * torch.randn(IN, generator=g) for i in range(2)}
    return PEM(tensors, IA3Config(("k",)), name=f"m{seed}")


def full(seed: int) -> PEM:
    g = torch.Generator().manual_seed(seed)
    names = ("b.0.weight", "b.0.bias")
    shapes = ((OUT, IN), (OUT,))
    tensors = {
        f"{n}.delta": torch.randn(s, generator=g) for n, s in zip(names, shapes, strict=True)
    }
    return PEM(tensors, FullConfig(), name=f"m{seed}")


def flat(m: PEM, layers) -> np.ndarray:
    return np.concatenate([dense(m)[n].ravel() if n in dense(m) else [0.0] for n in layers])


PAIRS = {
    "lora": (lora(0), lora(1)),
    "ranks, rsLoRA": (lora(0), lora(1, r=5, alpha=2, use_rslora=True)),
    "ia3": (ia3(0), ia3(1)),
    "full": (full(0), full(1)),
}


@pytest.mark.parametrize("modules", PAIRS.values(), ids=PAIRS)
def test_every_layer_and_the_total_equal_the_dense_ones(modules):
    a, b = modules
    (pair,) = compare(modules).pairs
    x, y = dense(a), dense(b)
    assert pair.layers.keys() == x.keys() == y.keys()
    for layer, found in pair.layers.items():
        check(found, x[layer], y[layer])
    check(pair.total, flat(a, x), flat(b, x))


def check(found, x: np.ndarray, y: np.ndarray) -> None:
    norms = np.linalg.norm(x), np.linalg.norm(y)
    assert (found.norm_a, found.norm_b) == pytest.approx(norms)
    assert found.norm_ratio == pytest.approx(norms[0] / norms[1])
    assert found.cosine == pytest.approx((x * y).sum() / (norms[0] * norms[1]))
    opposite, weight = x * y < 0, np.abs(x * y)
    assert found.sign_conflict == pytest.approx(opposite.mean())
    assert found.weighted_sign_conflict == pytest.approx(weight[opposite].sum() / weight.sum())


@pytest.mark.parametrize("name", ["lora", "ranks, rsLoRA"])
def test_subspaces_are_those_of_the_dense_updates(name):
    a, b = PAIRS[name]
    (pair,) = compare([a, b]).pairs
    squares = {"columns": [], "rows": []}
    for layer, angles in pair.angles.items():
        x, y = dense(a)[layer], dense(b)[layer]
        for which, u, v in (("columns", x, y), ("rows", x.T, y.T)):
            bases = [np.linalg.svd(m)[0][:, : np.linalg.matrix_rank(m)] for m in (u, v)]
            expected = np.sort(subspace_angles(*bases))
            np.testing.assert_allclose(np.radians(getattr(angles, which)), expected, atol=1e-7)
            squares[which] += list(np.cos(expected) ** 2)
    assert pair.total.column_overlap == pytest.approx(np.mean(squares["columns"]))
    assert pair.total.row_overlap == pytest.approx(np.mean(squares["rows"]))


@pytest.mark.parametrize("coefficients", [None, (0.3, 0.7), (1.0, -0.4)])
@pytest.mark.parametrize("name", ["lora", "ia3", "full"])
def test_the_cross_term_error_is_the_certificate_of_the_parameter_space_sum(name, coefficients):
    modules = PAIRS[name]
    found = compare(modules, coefficients)
    written = combine(modules, coefficients or (0.5, 0.5)).provenance.certificate
    assert found.cross_term_error == found.pairs[0].total.cross_term_error == written.total
    errors = {n: m.cross_term_error for n, m in found.pairs[0].layers.items()}
    if name == "full":  # layers of a sum are parameters, named alike
        assert errors.keys() == written.layers.keys()
    assert errors == written.layers


def test_three_modules_are_three_pairs_and_one_sum():
    modules = [lora(i) for i in range(3)]
    found = compare(modules, (0.5, 0.2, -0.3))
    assert [(p.a, p.b) for p in found.pairs] == [("m0", "m1"), ("m0", "m2"), ("m1", "m2")]
    assert found.pairs[2].coefficients == (0.2, -0.3)
    assert found.cross_term_error == combine(modules, (0.5, 0.2, -0.3)).provenance.certificate.total
    alone = compare(modules[1:], (0.2, -0.3))
    assert alone.pairs[0] == found.pairs[2]


def test_a_module_against_itself_its_half_and_its_negative():
    a = lora(0)
    half = replace(combine([a], [0.5], space="delta"), name="half")
    minus = replace(combine([a], [-1.0], space="delta"), name="minus")
    same, opposite = compare([a, half]).pairs[0], compare([a, minus]).pairs[0]
    assert same.total.cosine == pytest.approx(1)
    assert same.total.norm_ratio == pytest.approx(2)
    assert same.total.column_overlap == same.total.row_overlap == pytest.approx(1)
    assert max(same.angles["b.0.q"].columns) < 1e-5
    assert (same.total.sign_conflict, opposite.total.sign_conflict) == (0, 1)
    assert opposite.total.cosine == pytest.approx(-1)


def test_layers_of_one_module_alone_count_in_the_norms():
    a, b = lora(0), lora(1, layers=("b.1.q", "b.2.q"))
    (pair,) = compare([a, b]).pairs
    assert (list(pair.layers), pair.only_a, pair.only_b) == (["b.1.q"], ("b.0.q",), ("b.2.q",))
    every = ("b.0.q", "b.1.q", "b.2.q")
    inner = (dense(a)["b.1.q"] * dense(b)["b.1.q"]).sum()
    norms = [np.linalg.norm(np.concatenate([v.ravel() for v in dense(m).values()])) for m in (a, b)]
    assert pair.total.cosine == pytest.approx(inner / np.prod(norms))
    assert len(every) == 3
    assert pair.total.cross_term_error is None
    assert "set of adapted layers (b.0.q in m0 only) differs" in pair.refused


def test_an_update_of_zero_has_no_angles_and_no_cosine():
    a, b = lora(0), lora(1)
    zero = replace(b, tensors={n: t * (not n.endswith("lora_B")) for n, t in b.tensors.items()})
    total = compare([a, zero]).pairs[0].total
    assert (total.cosine, total.norm_ratio, total.sign_conflict) == (None, None, None)
    assert (total.column_overlap, total.row_overlap) == (None, None)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((lora(0), ia3(1)), "kind differs"),
        ((lora(0),), "two modules or more"),
        ((lora(0), replace(lora(1), tensors={
            n: t[:, :4] if n.endswith("A") else t for n, t in lora(1).tensors.items()
        })), "layers of different size"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(modules, message):
    with pytest.raises(IncompatibleModules, match=message):
        compare(modules)


@pytest.mark.parametrize("module", [lora(0), ia3(0), full(0)], ids=lambda m: m.kind)
def test_a_profile_has_the_norms_and_ranks_of_the_dense_updates(module):
    found = profile(module)
    updates = dense(module)
    assert found.norm == pytest.approx(np.sqrt(sum((v**2).sum() for v in updates.values())))
    for layer, update in updates.items():
        measured = found.layers[layer]
        assert measured.norm == pytest.approx(np.linalg.norm(update))
        if module.kind == "lora":
            s = np.linalg.svd(update, compute_uv=False)[:3]
            assert measured.rank == 3
            assert measured.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2)
            assert measured.spectral_norm == pytest.approx(s[0])
        else:
            assert measured.rank is measured.stable_rank is measured.effective_rank is None
