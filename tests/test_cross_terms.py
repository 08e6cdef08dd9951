"""Cross terms of the paper's sum: foretold exactly where every pair of modules is alike."""

from __future__ import annotations

import importlib

import pytest
import torch

from pem_composition.config import LoraConfig
from pem_composition.module import PEM

WIDTH = 24


@pytest.fixture(scope="module")
def cross_terms(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts"))
        return importlib.import_module("cross_terms")


def module(a: torch.Tensor, b: torch.Tensor, name: str) -> PEM:
    config = LoraConfig(r=a.shape[0], alpha=a.shape[0], target_modules=("fc",))
    return PEM({"fc.lora_A": a, "fc.lora_B": b}, config, name=name)


def made(count: int, rank: int, drift: float):
    """Modules whose updates are orthogonal: outputs of their own, and D_i of their own inputs."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    first = eye[:rank].clone()
    found = []
    for i in range(count):
        a, b = first.clone(), torch.zeros(WIDTH, rank, dtype=torch.float64)
        row = i if rank > 1 else 0
        a[row] += drift * eye[12 + i]  # where no other module and A_0 have anything
        b[i, row] = 3.0
        found.append(module(a, b, f"m{i}"))
    return module(first, torch.zeros(WIDTH, rank, dtype=torch.float64), "init"), found


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("drift", [0.2, 1.0, 3.0])
def test_modules_with_nothing_in_common_have_the_error_that_each_alone_foretells(
    cross_terms, count, drift
):
    found = cross_terms.measured(*made(count, 1, drift))  # of rank 1 every B meets every D
    assert found["share"] == pytest.approx(drift**2 / (1 + drift**2))
    assert [found[n] for n in ("alike_a", "alike_b", "alike")] == pytest.approx([0, 0, 0])
    assert found["cross_terms"] == pytest.approx(found["foretold"], rel=1e-6)
    assert found["foretold"] == pytest.approx(found["apart"])
    # Where no B meets a foreign D there is less: the own D alone are cut.
    less = cross_terms.measured(*made(count, count, drift))
    assert less["cross_terms"] == pytest.approx((1 - 1 / count) * less["share"] ** 0.5, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("of_a", "of_b"), [(0.5, 0.0), (0.0, 0.6), (0.7, 0.4)])
def test_agreement_of_equal_pairs_is_exact(cross_terms, count, of_a, of_b):
    """Unit vectors with one cosine between any two of them, of inputs and of outputs."""

    def with_cosine(value: float) -> torch.Tensor:
        gram = torch.full((count, count), value, dtype=torch.float64)
        return torch.linalg.cholesky(gram.fill_diagonal_(1.0))

    eye, drift = torch.eye(WIDTH, dtype=torch.float64), 1.5
    inputs, outputs = with_cosine(of_a) @ eye[12 : 12 + count], with_cosine(of_b) @ eye[:count]
    modules = [
        module(eye[10:11] + drift * x[None], y[:, None], f"m{i}")
        for i, (x, y) in enumerate(zip(inputs, outputs, strict=True))
    ]
    initial = module(eye[10:11].clone(), torch.zeros(WIDTH, 1, dtype=torch.float64), "init")
    found = cross_terms.measured(initial, modules)
    assert (found["alike_a"], found["alike_b"]) == (pytest.approx(of_a), pytest.approx(of_b))
    assert found["cross_terms"] == pytest.approx(found["foretold"], rel=1e-6)


def test_what_did_not_move_has_no_cross_terms(cross_terms):
    found = cross_terms.measured(*made(3, 3, 0.0))
    assert (found["drift"], found["share"], found["foretold"]) == (0, 0, 0)
    assert found["cross_terms"] == pytest.approx(0, abs=1e-7)


def test_what_all_write_alike_makes_no_cross_terms(cross_terms):
    first, (one, *_) = made(2, 1, 0.8)
    a, b = one.adapter_tensors()["fc.lora_A"], torch.zeros(WIDTH, 1, dtype=torch.float64)
    b[5, 0] = 2.0
    found = cross_terms.measured(first, [one, module(a, b, "other")])
    assert found["alike_a"] == pytest.approx(1) and found["share"] > 0.3
    assert found["cross_terms"] == pytest.approx(0, abs=1e-7)
