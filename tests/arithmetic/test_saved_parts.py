"""Parameters of the base that modules save whole, labels of averaged heads, names of layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import small_modules as modules

from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import HeadInfo, combine, negate

NORM = "model.norm.weight"


def saving(seed):
    g = torch.Generator().manual_seed(seed)
    part = {f"{NORM}.head": torch.randn(4, generator=g, dtype=torch.float64)}
    m = modules.lora(seed)
    return replace(m, tensors=dict(m.tensors) | part)


@pytest.mark.parametrize("space", ["parameter", "delta"])
@pytest.mark.parametrize("c", [(0.3, 0.7), (1.0, 1.0), (1.0, -0.4)])
@pytest.mark.parametrize("head", ["average", "first", "last", "none"])
def test_a_saved_part_is_the_sum_for_any_base_or_its_error_is_unknown(space, c, head):
    a, b = saving(1), saving(2)
    x = combine([a, b], c, space=space, head=head)
    right = head == "average" and c == (0.3, 0.7)
    if right:
        sums = 0.3 * a.head_tensors()[NORM] + 0.7 * b.head_tensors()[NORM]
        torch.testing.assert_close(x.head_tensors()[NORM], sums)
    assert (NORM in x.head_tensors()) == (head != "none")
    assert x.provenance.certificate.layers[NORM] == (0.0 if right else math.inf)
    assert math.isinf(x.provenance.certificate.total) != right
    assert any(NORM in note for note in x.provenance.notes)
    assert math.isinf(negate(a, 0.5).provenance.certificate.total)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_saved_part_that_rounding_changes_is_not_the_sum(dtype, exact):
    a = saving(1)
    if exact:  # values that the dtype holds
        a = replace(a, tensors=dict(a.tensors) | {f"{NORM}.head": torch.tensor([1.0, 0.5, 0, -2])})
    lost = 0.0 if exact else math.inf
    for x in (
        combine([a], [1.0], dtype=dtype),
        combine([a, a], [0.25, 0.75], space="delta", dtype=dtype),
        negate(a, -1.0, dtype=dtype),
    ):
        assert x.provenance.certificate.layers[NORM] == lost
        assert math.isinf(x.provenance.certificate.total) != exact


def test_heads_that_answer_different_classes_have_no_average():
    a, b = modules.lora(1), replace(modules.lora(2), head=HeadInfo(labels=("yes", "no")))
    with pytest.raises(IncompatibleModules, match="different classes"):
        combine([a, b], [0.5, 0.5])
    assert combine([a, b], [0.5, 0.5], head="last").head.labels == ("yes", "no")


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_one_layer_under_two_names_is_refused(space):
    a, b = modules.lora(1), modules.lora(2, layers=("bert.enc.0.query", "bert.enc.1.query"))
    with pytest.raises(IncompatibleModules, match="in two ways"):
        combine([a, b], [0.5, 0.5], space=space)


def test_a_sum_beyond_its_dtype_is_refused_at_once():
    with pytest.raises(PEMError, match="too large for float32"):
        1e39 * modules.lora(1, dtype=torch.float32)


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_a_part_whose_modules_have_no_weight_stays_the_bases(space):
    """0 * (t - t_0) is no change: the part is not saved, and that is exact."""
    a, b = modules.lora(1), saving(2)
    x = combine([a, b], [1.0, 0.0], space=space)
    assert NORM not in x.head_tensors()
    assert x.provenance.certificate.layers[NORM] == 0
    both = combine([saving(1), b], [1.0, 0.0], space=space)
    assert both.head_tensors()[NORM].equal(saving(1).head_tensors()[NORM])
