"""combine on another device: the same module, and nothing of it computed half here, half there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.other_device import DEVICE, OtherDevice, There
from support.small_modules import full, ia3, lora

from pem_composition import cli
from pem_composition.arithmetic.methods.registry import METHODS
from pem_composition.errors import PEMError
from pem_composition.module import PEM, combine

COEFFICIENTS = (0.6, 0.9, -0.2)
QUICK = ("simple", "ties", "tsv")  # of sums, of entries, of singular vectors
CASES = [
    pytest.param(m.name, form, marks=() if m.name in QUICK else pytest.mark.slow)
    for m in METHODS.values()
    for form in ("dense", "core")
    if not m.needs and (form == "dense" or any(s.name == "form" for s in m.settings))
]


@pytest.fixture
def other():
    with OtherDevice():
        yield DEVICE


def equal(one: PEM, two: PEM) -> None:
    """The factors' product, or the tensors, to float32's rounding; certificates, too."""
    assert one.config == two.config
    for name, tensor in one.tensors.items():
        assert type(two.tensors[name]) is torch.Tensor
        if not name.endswith((".lora_A", ".lora_B")):
            torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-6, atol=1e-6)
    for layer in one.layers if one.kind == "lora" else ():
        products = [m.tensors[f"{layer}.lora_B"] @ m.tensors[f"{layer}.lora_A"] for m in (one, two)]
        torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-5)
    errors = [m.provenance.certificate.total for m in (one, two)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("method", "form"), CASES)
def test_every_method_gives_the_same_module(method, form, other):
    most = METHODS[method].modules[1]
    modules = [lora(seed) for seed in range(3)][:most]
    named = any(s.name == "form" for s in METHODS[method].settings)
    settings = {"method": method, "settings": {"form": form} if named else {}}
    space = {"space": "delta"} if method == "simple" else {}
    weights = [abs(c) for c in COEFFICIENTS[: len(modules)]]
    here = combine(modules, weights, **settings, **space)
    equal(here, combine(modules, weights, **settings, **space, device=other))


@pytest.mark.parametrize("make", [lora, ia3, full])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"space": "delta"},
        {"method": "ties"},
        pytest.param({"method": "karcher"}, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_module_gives_the_same(make, options, other):
    modules = [make(seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    equal(combine(modules, weights, **options), combine(modules, weights, **options, device=other))


@pytest.mark.parametrize("method", ["simple", "slerp", "karcher", "tsv", "ties"])
def test_updates_of_zero_give_zero_there(method, other):
    zero = replace(lora(0), tensors={n: 0 * t for n, t in lora(0).tensors.items()})
    found = combine([zero, zero], [0.5, 0.5], method=method, space="delta", device=other)
    assert not any(found.tensors[f"{layer}.lora_B"].any() for layer in found.layers)


@pytest.mark.parametrize("rank", [2, 0.9])
@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16"])
def test_the_best_approximation_and_every_dtype_are_the_same(rank, dtype, other):
    modules, options = [lora(0), lora(1)], {"space": "delta", "rank": rank, "dtype": dtype}
    here, there = (combine(modules, [1.0, -0.5], **options, **d) for d in ({}, {"device": other}))
    assert here.provenance.certificate.total == pytest.approx(
        there.provenance.certificate.total, rel=1e-2
    )
    assert {n: t.dtype for n, t in here.tensors.items()} == {
        n: t.dtype for n, t in there.tensors.items()
    }


def test_the_work_is_done_there(other, monkeypatch):
    """The SVDs of KnOTS, of which there is one or more a layer."""
    seen, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda t, **k: seen.append(type(t)) or svd(t, **k))
    combine([lora(0), lora(1)], [1.0, 1.0], method="knots", device=other)
    assert seen
    assert set(seen) == {There}


@pytest.mark.parametrize("device", ["meta", "cuda:77", "nowhere"])
def test_a_device_that_is_not_here_is_refused_by_name(device, tmp_path, capsys):
    with pytest.raises(PEMError, match=rf"device: .*; found {device}, expected cpu"):
        combine([lora(0)], [1.0], device=device)
    for seed in range(2):
        lora(seed).save(tmp_path / f"m{seed}")
    words = ["merge", "-a", str(tmp_path / "m0"), str(tmp_path / "m1"), "-p", str(tmp_path / "out")]
    assert cli.main([*words, "-w", "knots", "--device", device]) == 2
    assert f"found {device}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*words, "-w", "knots", "--device", "cpu"]) == 0
