"""Cross terms of the paper's sum: both ends of what the share of A foretells are reached."""

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
    first = eye[:rank].repeat(1, 1)
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
def test_the_error_is_at_the_end_that_foreign_products_say(cross_terms, count, drift):
    share = drift**2 / (1 + drift**2)
    # Of rank 1 every B meets every D; with a rank of its own for each module none meets another's.
    for rank, end in ((1, "high"), (count, "low")):
        found = cross_terms.measured(*made(count, rank, drift))
        assert found["share"] == pytest.approx(share)
        assert found["cross_terms"] == pytest.approx(found[end], rel=1e-6)
        assert found["low"] < found["high"] and found["modules"] == count
        assert found["alike"] == pytest.approx(0)


def test_what_did_not_move_has_no_cross_terms(cross_terms):
    found = cross_terms.measured(*made(3, 2 + 1, 0.0))
    assert (found["drift"], found["share"], found["high"]) == (0, 0, 0)
    assert found["cross_terms"] == pytest.approx(0, abs=1e-7)


def test_what_all_write_alike_makes_no_cross_terms(cross_terms):
    first, (one, *_) = made(2, 1, 0.8)
    a, b = one.adapter_tensors()["fc.lora_A"], torch.zeros(WIDTH, 1, dtype=torch.float64)
    b[5, 0] = 2.0
    found = cross_terms.measured(first, [one, module(a, b, "other")])
    assert found["alike"] == pytest.approx(1) and found["share"] > 0.3
    assert found["cross_terms"] == pytest.approx(0, abs=1e-7)
