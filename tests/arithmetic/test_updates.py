"""How far a module moved from its start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pem_composition.arithmetic.updates import drift
from pem_composition.errors import IncompatibleModules


def tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x.lora_A": torch.randn(3, 5, generator=g),
        "y.lora_A": torch.randn(3, 4, generator=g),
        "x.lora_B": torch.zeros(6, 3),
        "c.weight.head": torch.randn(2, 5, generator=g),
    }


def test_drift_is_the_relative_frobenius_distance_per_role():
    a, b = tensors(0), tensors(1)
    found = drift(a, b)
    assert found.keys() == {"lora_A", "head"}  # B starts at zero: no ratio
    for role in found:
        x, y = (
            np.concatenate([t.numpy().ravel() for n, t in m.items() if n.endswith(role)])
            for m in (a, b)
        )
        assert found[role] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-6)
    assert drift(a, a) == {"lora_A": 0.0, "head": 0.0}


def test_an_initial_module_of_another_shape_is_refused():
    short = {n: t for n, t in tensors(0).items() if not n.startswith("y")}
    with pytest.raises(IncompatibleModules, match=r"'y.lora_A'"):
        drift(tensors(0), short)
