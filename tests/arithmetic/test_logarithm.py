"""Log space: the laws of a vector space on (IA)^3, against NumPy in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.small_modules import full, ia3, lora

from pem_composition.checkpoint import load
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.composition import compose
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM, analogy, combine

NUMBERS = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


def vectors(seed: int, layers: tuple[str, ...] = ("enc.0.query", "enc.1.query")) -> PEM:
    """Positive float32 vectors around 1, as training leaves them."""
    module = ia3(seed, layers)
    return replace(
        module, tensors={n: t.abs().clamp(min=1e-3).float() for n, t in module.tensors.items()}
    )


def plus(*terms: tuple[float, PEM]) -> PEM:
    return combine([m for _, m in terms], [c for c, _ in terms], space="log")


def same(x: PEM, y: PEM, rtol: float = 0.0) -> None:
    assert x.tensors.keys() == y.tensors.keys()
    for name, tensor in x.tensors.items():
        torch.testing.assert_close(tensor, y.tensors[name], rtol=rtol, atol=0)


def test_one_times_a_module_is_the_module_and_itself_minus_itself_is_one() -> None:
    a, b = vectors(1), vectors(2)
    same(plus((1.0, a)), a)
    same(plus((1.0, a), (0.0, b)), a)
    for gone in (plus((1.0, a), (-1.0, a)), plus((0.7, a), (-0.7, a)), plus((0.0, a))):
        assert all(bool((t == 1).all()) for t in gone.tensors.values())


@examples(40)
@given(NUMBERS, NUMBERS, st.integers(0, 50))
def test_the_laws_of_a_vector_space(j: float, k: float, seed: int) -> None:
    a, b = vectors(seed), vectors(seed + 1)
    same(plus((j, a), (k, b)), plus((k, b), (j, a)))
    same(plus((k, plus((1.0, a), (1.0, b)))), plus((k, plus((1.0, a))), (k, plus((1.0, b)))))
    same(plus((j + k, a)), plus((j, a), (k, a)), rtol=1e-6)
    same(plus((j, plus((k, a)))), plus((j * k, a)), rtol=1e-6)
    for name, tensor in plus((j, a), (k, b)).tensors.items():
        x, y = (m.tensors[name].double().numpy() for m in (a, b))
        np.testing.assert_allclose(tensor.double().numpy(), x**j * y**k, rtol=1e-6)


def test_the_sum_is_the_two_modules_one_after_the_other() -> None:
    a, b = vectors(1), vectors(2)
    for name, tensor in plus((1.0, a), (1.0, b)).tensors.items():
        torch.testing.assert_close(tensor, a.tensors[name] * b.tensors[name])


def test_a_layer_that_a_module_lacks_counts_as_one() -> None:
    a, b = vectors(1, ("enc.0.query",)), vectors(2, ("enc.1.query",))
    out = plus((2.0, a), (-1.0, b))
    torch.testing.assert_close(out.tensors["enc.0.query.ia3"], a.tensors["enc.0.query.ia3"] ** 2)
    torch.testing.assert_close(out.tensors["enc.1.query.ia3"], 1 / b.tensors["enc.1.query.ia3"])
    assert out.layers == ("enc.0.query", "enc.1.query")


def test_the_certificate_is_the_rounding_of_the_product() -> None:
    a, b = vectors(1), vectors(2)
    assert plus((1.0, a), (-1.0, a)).provenance.certificate.total == 0
    out = combine([a, b], [0.5, -2.0], space="log", dtype="bfloat16")
    wrong = norm = 0.0
    for name, tensor in out.tensors.items():
        x, y = (m.tensors[name].double().numpy() for m in (a, b))
        exact = x**0.5 * y**-2.0
        wrong += float(np.square(tensor.double().numpy() - exact).sum())
        norm += float(np.square(exact - 1).sum())
    found = out.provenance.certificate
    assert found.against == "prod l_i^c_i"
    assert found.total == pytest.approx((wrong / norm) ** 0.5, rel=1e-9)
    assert found.total > 1e-4


def test_expressions_and_analogies(tmp_path) -> None:
    a, b, c = (replace(vectors(i), name=n) for i, n in enumerate("abc"))
    named = {"a": a, "b": b, "c": c}
    out = compose("0.6*a + 0.4*(b - negate(c, 0.5))", named, space="log")
    tree = compose('log(a + layers(b, "enc.0.*", 3)) + c', named, space="delta")
    for name, tensor in out.tensors.items():
        x, y, z = (m.tensors[name].double().numpy() for m in (a, b, c))
        np.testing.assert_allclose(tensor.numpy(), x**0.6 * y**0.4 * z**0.2, rtol=1e-6)
        cube = 3 if "enc.0" in name else 1
        product = x * y**cube + z - 1
        np.testing.assert_allclose(tree.tensors[name].numpy(), product, rtol=1e-5, atol=1e-6)
    same(compose(str(out), named, space="log"), out)
    same(compose(str(tree), named, space="delta"), tree)
    same(analogy(a, b, c, 0.3, space="log"), plus((0.3, a), (0.7, b), (-0.7, c)))
    for name, module in named.items():
        module.save(tmp_path / name)
    read = {n: load(tmp_path / n) for n in named}
    compose("log(a - 0.5*b) + c", read, space="delta").save(tmp_path / "mixed")
    compose("0.3*a - negate(b)", read, space="log", dtype="bfloat16").save(
        tmp_path / "log", dtype="bfloat16"
    )
    for path in ("mixed", "log"):
        assert rebuild(tmp_path / path).equal
    assert load(tmp_path / "log").provenance.notes[-1].endswith("in log space")


@pytest.mark.parametrize("value", [0.0, -0.25])
def test_an_entry_that_is_not_positive_is_refused_by_name(value: float) -> None:
    a, b = replace(vectors(1), name="a"), replace(vectors(2), name="b")
    b.tensors["enc.1.query.ia3"][3] = value
    for request in (
        lambda: plus((1.0, a), (1.0, b)),
        lambda: plus((1.0, b)),
        lambda: compose('layers(b, "*", 2)', {"b": b}, space="log"),
    ):
        with pytest.raises(PEMError) as error:
            request()
        assert str(error.value) == (
            f"b: 'enc.1.query.ia3' has an entry without a logarithm; found {value:.6g}, expected "
            "entries > 0; use another space (--space parameter or delta)"
        )


def test_what_has_no_logarithm_is_refused() -> None:
    for module in (lora(1), full(1)):
        with pytest.raises(IncompatibleModules, match=r"log space multiplies \(IA\)\^3 vectors"):
            combine([module], [0.5], space="log")
    with pytest.raises(PEMError, match="ties merges updates; found space log"):
        combine([vectors(1)], [1.0], space="log", method="ties")
    with pytest.raises(PEMError, match="ties merges updates; found space log"):
        compose("ties(a, a)", {"a": vectors(1)}, space="log")
    with pytest.raises(PEMError, match="peft_linear merges the modules' own tensors"):
        combine([vectors(1)], [1.0], space="log", method="peft_linear")
    with pytest.raises(PEMError, match="rank: applies to delta space only"):
        combine([vectors(1)], [1.0], space="log", rank=2)
    with pytest.raises(PEMError, match="leaves the range of float32"):
        combine([vectors(1)], [900.0], space="log")
