"""Detoxification: the exact form against dense float64, the others against their formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_module import dense, equal, expected, ia3, lora

import pem_composition as pem
from pem_composition.arithmetic.comparison import projection
from pem_composition.config import BaseIdentity
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import combine, detoxify

STRENGTHS = [0.0, 0.3, 1.0, -0.5, 2.5]


def numbers(module, role):
    return {
        n.removesuffix(f".{role}"): t.numpy()
        for n, t in module.tensors.items()
        if n.endswith(f".{role}")
    }


def trained_from(module, seed, size=0.2):
    """A module a little away from another one, as training it further gives."""
    g = torch.Generator().manual_seed(seed)
    moved = {
        n: t if n.endswith("head") else t + size * torch.randn(t.shape, generator=g, dtype=t.dtype)
        for n, t in module.tensors.items()
    }
    return replace(module, tensors=moved, name="toxic")


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(
    "toxic", [lora(1), lora(1, r=2, alpha=3, rslora=True), lora(1, layers=("enc.1.query",))]
)
def test_the_exact_form_is_the_dense_difference(strength, toxic):
    a = lora(0)
    found = detoxify(a, toxic, strength)
    want = expected([a, toxic], [1 + strength, -strength])
    assert dense(found).keys() == want.keys()
    for layer, dw in dense(found).items():
        np.testing.assert_allclose(dw, want[layer], atol=1e-12)
    assert found.provenance.certificate.total < 1e-14
    assert found.head.labels == ("no", "yes")
    assert torch.equal(found.tensors["classifier.weight.head"], a.tensors["classifier.weight.head"])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_exact_form_moves_along_the_line_through_both_modules(strength):
    """a - lam (toxic - a): at 0 the module, at -1 the toxic one, and linear between them."""
    a, toxic = lora(0), lora(1)
    one, other = dense(a), dense(toxic)
    for layer, dw in dense(detoxify(a, toxic, strength)).items():
        line = one[layer] + strength * (one[layer] - other[layer])
        np.testing.assert_allclose(dw, line, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_rank_gives_the_best_approximation_and_says_its_error(rank):
    a, toxic = lora(0), lora(1)
    want = expected([a, toxic], [1.5, -0.5])
    found = detoxify(a, toxic, 0.5, rank=rank)
    error = 0.0
    for layer, dw in want.items():
        u, s, vh = np.linalg.svd(dw)
        k = min(rank, len(s))
        best = u[:, :k] * s[:k] @ vh[:k]
        np.testing.assert_allclose(dense(found)[layer], best, atol=1e-10)
        error += np.linalg.norm(dw - best) ** 2
    total = sum(np.linalg.norm(dw) ** 2 for dw in want.values())
    assert found.provenance.certificate.total == pytest.approx((error / total) ** 0.5, abs=1e-12)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_reference_form_is_its_formula_on_the_factors(strength):
    a, toxic = lora(0), lora(1)
    found = detoxify(a, toxic, strength, form="reference")
    for layer, factor in numbers(found, "lora_A").items():
        own, other = numbers(a, "lora_A")[layer], numbers(toxic, "lora_A")[layer]
        np.testing.assert_allclose(factor, own + strength * (own - other), atol=1e-14)
    for layer, factor in numbers(found, "lora_B").items():
        own, other = numbers(a, "lora_B")[layer], numbers(toxic, "lora_B")[layer]
        np.testing.assert_allclose(factor, own + strength * (own + other), atol=1e-14)
    assert found.config == a.config
    assert torch.equal(found.tensors["classifier.weight.head"], a.tensors["classifier.weight.head"])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_parameter_form_is_the_papers_sum(strength):
    a, toxic = lora(0), lora(1)
    found = detoxify(a, toxic, strength, form="parameter")
    for role, sign in (("lora_A", 1), ("lora_B", -1)):
        for layer, factor in numbers(found, role).items():
            own, other = numbers(a, role)[layer], numbers(toxic, role)[layer]
            w, v = 1 + strength, sign * strength
            w, v = (abs(w), abs(v)) if sign > 0 else (w, v)
            np.testing.assert_allclose(factor, w * own + v * other, atol=1e-14)
    assert torch.equal(found.tensors["classifier.weight.head"], a.tensors["classifier.weight.head"])
    if strength >= 0:
        written = combine([a, combine([a, toxic], [1.0, -1.0])], [1.0, strength], head="first")
        for name, tensor in written.adapter_tensors().items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["exact", "parameter", "reference"])
@pytest.mark.parametrize("toxic", [trained_from(lora(0), 5), lora(1)])
def test_the_projection_is_the_dense_one_and_minus_the_strength_of_the_exact_form(form, toxic):
    a, strength = lora(0), 0.7
    found = detoxify(a, toxic, strength, form=form)
    at, begin, goal = (
        np.concatenate([dw.ravel() for _, dw in sorted(dense(m).items())])
        for m in (found, a, toxic)
    )
    gone, way = at - begin, goal - begin
    assert projection(found, a, toxic) == pytest.approx(gone @ way / (way @ way), rel=1e-9)
    if form == "exact":
        assert projection(found, a, toxic) == pytest.approx(-strength, rel=1e-9)
    assert projection(a, a, toxic) == pytest.approx(0, abs=1e-12)
    assert projection(toxic, a, toxic) == pytest.approx(1, rel=1e-12)
    assert projection(found, a, a) is None


def test_the_projection_of_a_layer_that_one_module_lacks_counts_it_as_no_change():
    for a, toxic in (
        (lora(0), lora(1, layers=("enc.1.query",))),
        (ia3(0), ia3(1, layers=("enc.1.query",))),
    ):
        for strength in (0.3, 1.0):
            found = detoxify(a, toxic, strength)
            assert projection(found, a, toxic) == pytest.approx(-strength, rel=1e-9)


def test_sums_of_factors_amplify_the_module_and_add_what_training_moved_in_one_of_them():
    """To first order, k = 1 + 2 lam: k B A -+ ... as in the docstring, against the exact form."""
    a, lam, small = lora(0), 0.4, 1e-6
    toxic = trained_from(a, 5, size=small)
    scaling = a.config.scaling(a.layers[0])
    forms = {f: dense(detoxify(a, toxic, lam, form=f)) for f in ("exact", "parameter", "reference")}
    for layer in a.layers:
        A, B = numbers(a, "lora_A")[layer], numbers(a, "lora_B")[layer]
        dA = numbers(toxic, "lora_A")[layer] - A
        dB = numbers(toxic, "lora_B")[layer] - B
        k = 1 + 2 * lam
        expected = {
            "exact": B @ A - lam * B @ dA - lam * dB @ A,
            "parameter": k * B @ A + lam * B @ dA - k * lam * dB @ A,
            "reference": k * B @ A - k * lam * B @ dA + lam * dB @ A,
        }
        for form, by_hand in expected.items():
            np.testing.assert_allclose(
                forms[form][layer], scaling * by_hand, atol=100 * small**2, err_msg=form
            )


def test_the_certificate_of_the_reference_form_is_its_distance_from_the_exact_one():
    a, toxic = lora(0), lora(1)
    found = detoxify(a, toxic, 0.3, form="reference")
    want, got = expected([a, toxic], [1.3, -0.3]), dense(found)
    error = sum(np.linalg.norm(got[n] - want[n]) ** 2 for n in want)
    total = sum(np.linalg.norm(want[n]) ** 2 for n in want)
    assert found.provenance.certificate.total == pytest.approx((error / total) ** 0.5)
    assert found.provenance.certificate.total > 0.1


def test_no_strength_changes_nothing():
    a, toxic = lora(0), lora(1)
    assert equal(detoxify(a, toxic, 0.0, form="reference"), a)
    for layer, dw in dense(detoxify(a, toxic, 0.0)).items():
        np.testing.assert_array_equal(dw, dense(a)[layer])


def test_vectors_have_one_form():
    a, toxic = ia3(0), ia3(1)
    found = detoxify(a, toxic, 0.3)
    for name, vector in found.tensors.items():
        l_a, l_t = a.tensors[name].numpy(), toxic.tensors[name].numpy()
        np.testing.assert_allclose(vector, 1 + 1.3 * (l_a - 1) - 0.3 * (l_t - 1), atol=1e-14)
    assert equal(detoxify(a, toxic, 0.3, form="parameter"), found)
    with pytest.raises(PEMError, match=r"reference_detoxify: not defined for modules of kind ia3"):
        detoxify(a, toxic, 0.3, form="reference")


def test_both_forms_say_what_they_are_made_of():
    a, toxic = lora(0), lora(1)
    exact, reference = detoxify(a, toxic, 0.3), detoxify(a, toxic, 0.3, form="reference")
    assert str(exact) == "+1.3*m0 -0.3*m1" and exact.provenance.space == "delta"
    assert str(reference) == "reference_detoxify(1.3*m0, -0.3*m1)"
    assert reference.provenance.space == "parameter"
    assert reference.provenance.method == "reference_detoxify"
    assert [s.name for s in reference.provenance.sources] == ["m0", "m1"]
    assert "reference_detoxify(1.3*m0, -0.3*m1)" in str(0.5 * reference)
    assert pem.detoxify is detoxify


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "other"}, "form: unknown; found 'other', expected exact or parameter or"),
        ({"form": "reference", "rank": 4}, "rank: the reference form keeps the modules' own"),
        ({"form": "parameter", "rank": 4}, "rank: the parameter form keeps the modules' own"),
        ({"strength": float("nan")}, "strength: a coefficient must be a finite number"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(PEMError, match=words):
        detoxify(lora(0), lora(1), **options)


def test_the_reference_form_needs_equal_ranks_and_both_need_one_base():
    with pytest.raises(IncompatibleModules, match="rank r"):
        detoxify(lora(0), lora(1, r=2), 0.3, form="reference")
    here, there = (BaseIdentity(fingerprint=c * 64) for c in "ab")
    for form in ("exact", "reference"):
        with pytest.raises(IncompatibleModules, match="base fingerprint differs"):
            detoxify(lora(0, base=here), lora(1, base=there), 0.3, form=form)
        detoxify(lora(0, base=here), lora(1, base=there), 0.3, form=form, allow_base_mismatch=True)


# --- modules trained from one another -----------------------------------------------------------


def fingerprint(module):
    from pem_composition.record import initialisation_fingerprint

    return initialisation_fingerprint(module.tensors)


def began(module, init, name):
    return replace(module, name=name, provenance=replace(module.provenance, init=init))


@pytest.mark.parametrize("kind", [lora, ia3])
def test_a_module_trained_from_another_one_has_its_beginning(kind):
    """The record of the second names the tensors of the first, whose record names the initial."""
    first = began(kind(0), "i" * 64, "first")
    second = began(kind(1), fingerprint(first), "second")
    third = began(kind(2), fingerprint(second), "third")
    for modules in ([first, second], [second, first], [first, second, third], [first, third]):
        merged = combine(modules, [1.0] * len(modules))
        told = [n for n in merged.provenance.notes if "different initialisations" in n]
        related = second in modules or third not in modules
        assert bool(told) == (not related)
        assert merged.provenance.init == ("i" * 64 if related else None)


def test_modules_of_different_beginning_are_told_apart_all_the_same():
    first = began(lora(0), "i" * 64, "first")
    stranger = began(lora(1), "j" * 64, "stranger")
    child = began(lora(2), fingerprint(first), "child")
    merged = combine([first, stranger, child], [1.0, 1.0, 1.0])
    assert any("different initialisations" in note for note in merged.provenance.notes)
    unknown = began(lora(3), None, "unknown")
    of_unknown = began(lora(4), fingerprint(unknown), "of unknown")
    merged = combine([unknown, of_unknown], [1.0, 1.0])
    assert merged.provenance.init is None and not merged.provenance.notes
