"""The PEM value: operators, spaces, heads, provenance, refusals."""

from __future__ import annotations

import copy
import pickle
import re
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_modules import updates as dense

import pem_composition as library
from pem_composition.composition import compose
from pem_composition.config import BaseIdentity, FullConfig, IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM, HeadInfo, analogy, combine, negate
from pem_composition.record import Provenance

LAYERS = ("enc.0.query", "enc.1.query")


def lora(
    seed: int,
    r: int = 4,
    alpha: float = 8,
    layers=LAYERS,
    *,
    rslora=False,
    dtype=torch.float64,
    **kw,
) -> PEM:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_A"] = torch.randn(r, 5, generator=g, dtype=dtype)
        tensors[f"{layer}.lora_B"] = torch.randn(6, r, generator=g, dtype=dtype)
    tensors["classifier.weight.head"] = torch.randn(2, 5, generator=g, dtype=dtype)
    config = LoraConfig(r=r, alpha=alpha, target_modules=("query",), use_rslora=rslora)
    return PEM(tensors, config, name=f"m{seed}", head=HeadInfo(labels=("no", "yes")), **kw)


def ia3(seed: int, layers=LAYERS, feedforward=()) -> PEM:
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"{layer}.ia3": 1 + 0.2 * torch.randn(6, generator=g, dtype=torch.float64)
        for layer in layers
    }
    return PEM(
        tensors,
        IA3Config(target_modules=("query",), feedforward_modules=feedforward),
        name=f"m{seed}",
    )


def expected(modules, coefficients) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for m, c in zip(modules, coefficients, strict=True):
        for layer, dw in dense(m).items():
            total[layer] = total.get(layer, 0) + c * dw
    return total


def equal(a: PEM, b: PEM) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors
    )


MIXED = [
    lora(0),
    lora(1, r=2, alpha=3, rslora=True),
    lora(2, r=8, alpha=1, layers=("enc.1.query", "enc.2.query")),
]


@pytest.mark.parametrize("coefficients", [[0.3, 0.7, 0.2], [1.0, -0.4, 2.0], [-1.0, 0.0, 0.5]])
def test_delta_space_is_the_dense_sum_over_ranks_scalings_and_targets(coefficients):
    merged = combine(MIXED, coefficients, space="delta")
    want = expected(MIXED, coefficients)
    assert dense(merged).keys() == want.keys()
    for layer, dw in dense(merged).items():
        np.testing.assert_allclose(dw, want[layer], atol=1e-12)
    assert merged.provenance.certificate.total < 1e-12


def test_delta_space_with_a_rank_states_its_error_truly():
    merged = combine(MIXED, [1.0, -0.4, 2.0], space="delta", rank=3)
    want, got = expected(MIXED, [1.0, -0.4, 2.0]), dense(merged)
    certificate = merged.provenance.certificate
    errors = {k: np.linalg.norm(got[k] - want[k]) for k in want}
    norms = {k: np.linalg.norm(want[k]) for k in want}
    for layer in want:
        assert np.linalg.matrix_rank(got[layer]) <= 3
        assert certificate.layers[layer] == pytest.approx(errors[layer] / norms[layer], abs=1e-9)
    total = np.linalg.norm(list(errors.values())) / np.linalg.norm(list(norms.values()))
    assert certificate.total == pytest.approx(total, abs=1e-9) and total > 0.01


def test_the_certificate_of_a_parameter_space_sum_is_its_cross_term_error():
    a, b = lora(0), lora(1)
    merged = 0.3 * a + 0.7 * b
    want, got = expected([a, b], [0.3, 0.7]), dense(merged)
    error = np.sqrt(sum(np.linalg.norm(got[k] - want[k]) ** 2 for k in want))
    norm = np.sqrt(sum(np.linalg.norm(v) ** 2 for v in want.values()))
    assert merged.provenance.certificate.total == pytest.approx(error / norm, rel=1e-9)


def test_the_certificate_judges_the_rounded_tensors():
    a, b = lora(0, dtype=torch.float32), lora(1, dtype=torch.float32)
    merged = combine([a, b], [1, -0.4], space="delta", dtype="bfloat16")
    assert {t.dtype for t in merged.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < merged.provenance.certificate.total < 1e-2


def test_the_rest_of_an_analogy_is_that_of_the_number_as_written():
    a, b, c = (lora(i) for i in range(3))
    terms = [t.coefficient for t in analogy(a, b, c, 0.9).provenance.terms]
    assert terms == [0.9, 0.1, -0.1]


def test_what_is_written_in_float64_is_computed_in_float64():
    a, b = lora(0, dtype=torch.float32), lora(1, dtype=torch.float32)
    c, d = ({n: t.double().numpy() for n, t in m.tensors.items()} for m in (a, b))
    found = combine([a, b], [0.3, 0.7], dtype="float64")
    for name, tensor in found.tensors.items():
        np.testing.assert_allclose(tensor, 0.3 * c[name] + 0.7 * d[name], rtol=1e-15)
    negated = negate(a, 0.3, dtype="float64")
    composed = compose("negate(a, 0.3)", {"a": a}, dtype="float64")
    for name in (n for n in c if n.endswith("lora_B")):
        for module in (negated, composed):
            np.testing.assert_allclose(module.tensors[name], -0.3 * c[name], rtol=1e-15)
    assert 1e-4 < negate(a, 0.3, dtype="bfloat16").provenance.certificate.total < 1e-2


@pytest.mark.parametrize("space", ["parameter", "delta"])
@pytest.mark.parametrize("make", [lora, ia3])
def test_one_times_a_is_a_bit_for_bit(space, make):
    a = make(3)
    once = combine([a], [1.0], space=space)
    assert equal(once, a) and once.config == a.config


def test_delta_space_identities_hold_to_rounding():
    a, b = lora(0), lora(1)
    twice, double = (combine(*x, space="delta") for x in (([a, a], [1, 1]), ([a], [2])))
    back = combine([combine([a, b], [1, 1], space="delta"), b], [1, -1], space="delta")
    nothing = combine([a, a], [1, -1], space="delta")
    for layer, dw in dense(a).items():
        np.testing.assert_allclose(dense(twice)[layer], 2 * dw, atol=1e-12)
        np.testing.assert_allclose(dense(double)[layer], 2 * dw, atol=1e-12)
        np.testing.assert_allclose(dense(back)[layer], dw, atol=1e-12)
        np.testing.assert_allclose(dense(nothing)[layer], 0, atol=1e-12)


def test_ia3_in_delta_space_counts_a_missing_layer_as_one():
    a, b = ia3(0), ia3(1, layers=("enc.1.query", "enc.9.query"))
    merged = combine([a, b], [0.5, -2.0], space="delta")
    np.testing.assert_allclose(
        merged.tensors["enc.0.query.ia3"], 1 + 0.5 * (a.tensors["enc.0.query.ia3"] - 1)
    )
    np.testing.assert_allclose(
        merged.tensors["enc.9.query.ia3"], 1 - 2 * (b.tensors["enc.9.query.ia3"] - 1)
    )
    assert merged.provenance.certificate.total < 1e-15
    assert not merged.config.scales_input("enc.9.query")


def test_operators_equal_combine_and_nested_expressions_equal_flat_ones_bit_for_bit():
    a, b, c = lora(0), lora(1), lora(2)
    nested = 2 * (a - b) - (b + c) / 2
    flat = combine([a, b, b, c], [2, -2, -0.5, -0.5])
    assert equal(nested, flat)
    assert str(nested) == "+2*m0 -2*m1 -0.5*m1 -0.5*m2"
    assert nested.provenance.certificate == flat.provenance.certificate
    assert equal(-a, combine([a], [-1])) and equal(a - b, a + (-b))


def test_negate_keeps_the_head_and_reads_as_such():
    a = lora(0)
    n = negate(0.5 * a, 0.6)
    np.testing.assert_allclose(
        dense(n)["enc.0.query"], -0.6 * 0.25 * dense(a)["enc.0.query"], atol=1e-12
    )
    assert torch.equal(n.tensors["classifier.weight.head"], a.tensors["classifier.weight.head"])
    assert "negate(+0.5*m0, 0.6)" in str(n)
    assert "negate(+0.5*m0, 0.6)" in str(n + a)


def test_an_analogy_is_the_sum_and_with_language_models_it_has_the_classifiers_head():
    a, b, c = lora(0), lora(1), lora(2)
    assert equal(analogy(a, b, c, 0.4), combine([a, b, c], [0.4, 0.6, -0.6]))
    bare = [replace(m, tensors=m.adapter_tensors(), head=None) for m in (b, c)]
    for out in (analogy(a, *bare, 0.4), analogy(a, b, c, 0.4, head="first")):
        kept = out.head_tensors()["classifier.weight"]
        torch.testing.assert_close(kept, a.head_tensors()["classifier.weight"], rtol=1e-6, atol=0)


def test_nested_averages_of_heads_equal_the_flat_one():
    a, b, c = lora(0), lora(1), lora(2)
    flat = (a.head_tensors()["classifier.weight"] + b.head_tensors()["classifier.weight"]) / 4
    flat = flat + c.head_tensors()["classifier.weight"] / 2
    np.testing.assert_allclose(((a + b) / 2 + c).head_tensors()["classifier.weight"], flat)


def test_head_policies():
    a, b = lora(0), lora(1)
    heads = [m.head_tensors()["classifier.weight"] for m in (a, b)]
    pick = {p: combine([a, b], [0.3, 0.7], head=p).head_tensors().get("classifier.weight") for p in
            ("average", "first", "last", "none")}  # fmt: skip
    np.testing.assert_allclose(pick["average"], 0.3 * heads[0] + 0.7 * heads[1])
    assert (
        torch.equal(pick["first"], heads[0])
        and torch.equal(pick["last"], heads[1])
        and pick["none"] is None
    )
    with pytest.raises(IncompatibleModules, match="the heads differ"):
        combine([a, b], [1, 1], head="error")
    assert equal(combine([a], [1.0], head="error"), a)
    with pytest.raises(PEMError, match="found 'mean', expected average, first"):
        combine([a, b], [1, 1], head="mean")


@pytest.mark.parametrize("head", ["per-task", "concat"])
def test_the_head_of_a_module_that_stands_in_a_sum_twice_is_one_head(head):
    a = replace(lora(0), head=HeadInfo(("no", "yes")))
    twice, once = combine([a, a], [0.3, 0.7], head=head), combine([a], [1.0], head=head)
    assert twice.head == once.head and twice.heads.keys() == once.heads.keys()
    other = replace(lora(1), name=a.name, head=a.head)
    with pytest.raises(IncompatibleModules, match="two heads of one name"):
        combine([a, other], [0.3, 0.7], head=head)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lora(1, r=2), "rank r at enc.0.query differs; found 4 in m0 and 2 in m1.*--space delta"),
        (
            lora(1, alpha=16),
            "scaling at enc.0.query differs; found 2 .lora_alpha 8.* and 4 .lora_alpha 16",
        ),
        (lora(1, rslora=True), "scaling at enc.0.query differs.*use_rslora True"),
        (
            lora(1, layers=LAYERS[:1]),
            r"adapted layers \(enc.1.query in m0 only\) differs; found 2 in m0 and 1 in m1",
        ),
        (ia3(1), "kind differs; found lora in m0 and ia3 in m1"),
    ],
)
def test_parameter_space_refuses_unequal_modules_with_both_values(other, message):
    with pytest.raises(IncompatibleModules, match=message):
        combine([lora(0), other], [1, 1])


@pytest.mark.parametrize(
    ("x", "y", "same"),
    [
        (BaseIdentity("roberta-base"), BaseIdentity("FacebookAI/roberta-base"), True),
        (BaseIdentity("roberta-base"), BaseIdentity("gpt2"), False),
        (BaseIdentity("a", "f00"), BaseIdentity("b", "f00"), True),
        (BaseIdentity("a", "f00"), BaseIdentity("a", "bad"), False),
        (BaseIdentity("a"), BaseIdentity(), True),
        (BaseIdentity(model_type="bert"), BaseIdentity(model_type="t5"), False),
    ],
)
def test_modules_of_different_bases_are_refused_unless_allowed(x, y, same):
    a, b = replace(lora(0), base=x), replace(lora(1), base=y)
    if same:
        combine([a, b], [1, 1])
        return
    with pytest.raises(IncompatibleModules, match=r"differs; found .* in m0 and .* in m1"):
        combine([a, b], [1, 1], space="delta")
    combine([a, b], [1, 1], allow_base_mismatch=True)


def test_ia3_placements_must_agree():
    with pytest.raises(
        IncompatibleModules, match="scales the output in m0 and scales the input in m1"
    ):
        combine([ia3(0), ia3(1, feedforward=("query",))], [1, 1], space="delta")


def test_different_initialisations_are_said_and_equal_ones_kept():
    a, b = (replace(lora(s), provenance=Provenance(init=i)) for s, i in ((0, "aa11"), (1, "bb22")))
    merged = a + b
    assert merged.provenance.init is None
    assert any("different initialisations (aa11, bb22)" in n for n in merged.provenance.notes)
    assert (a + a).provenance.init == "aa11" and not (a + a).provenance.notes


@pytest.mark.parametrize("c", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_coefficients_are_refused(c):
    with pytest.raises(PEMError, match=re.escape(f"found {c}")):
        combine([lora(0)], [c])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "weights"}, "found 'weights', expected parameter or delta"),
        ({"rank": 2}, "rank: applies to delta space only"),
        ({"space": "delta", "rank": 0}, "not a rank; found 0"),
        ({"dtype": "int8"}, "unknown dtype; found 'int8'"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(PEMError, match=message):
        combine([lora(0)], [1.0], **options)


def test_a_value_that_does_not_fit_the_dtype_is_refused():
    a = lora(0)
    big = replace(a, tensors={n: t * 1e5 for n, t in a.tensors.items()})
    with pytest.raises(PEMError, match="does not fit float16"):
        combine([big], [1.0], dtype="float16")


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        (1e6, "float16", "does not fit float16; found 1e\\+06; choose bfloat16 or float32"),
        (3.4e38, "bfloat16", "does not fit bfloat16; found 3.4e\\+38; choose float32"),
        (1e39, "float32", "does not fit float32; found 1e\\+39; choose float64"),
        (1e39, "float16", "does not fit float16; found 1e\\+39; choose float64"),
    ],
)
def test_the_dtype_that_is_named_holds_what_another_does_not(value, dtype, remedy):
    one = PEM({"l.delta": torch.ones(2, dtype=torch.float64)}, FullConfig())
    with pytest.raises(PEMError, match=f"l.delta: a value {remedy}"):
        combine([one], [value], dtype=dtype)
    combine([one], [value], dtype=remedy.rpartition(" ")[2])
    narrow = PEM({"l.delta": torch.ones(2)}, FullConfig())
    if value > 3.41e38:
        with pytest.raises(PEMError, match="the sum is too large for float32"):
            combine([narrow], [value], dtype=dtype)


def test_a_copy_is_equal_and_independent():
    a = 0.5 * lora(0)
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert equal(a, b) and b.provenance == a.provenance and equal(2 * b, 2 * a)
        assert b.tensors["enc.0.query.lora_A"] is not a.tensors["enc.0.query.lora_A"]


def test_modules_are_values():
    a = lora(0)
    with pytest.raises(TypeError):
        a.tensors["x"] = 1
    with pytest.raises(TypeError):
        a * "2"
    with pytest.raises(PEMError, match="division of a module by zero"):
        a / 0


class Watched(Mapping):
    """Tensors made anew for each request, which count requests and how many are alive."""

    alive = most = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors, self.asked = tensors, Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        out = self._tensors[name].clone()
        Watched.alive += 1
        Watched.most = max(Watched.most, Watched.alive)
        weakref.finalize(out, self._gone)
        return out

    @staticmethod
    def _gone() -> None:
        Watched.alive -= 1

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@pytest.mark.parametrize("space", ["parameter", "delta"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_sum_asks_for_each_tensor_once_and_keeps_one_layer(space, kind):
    layers = tuple(f"enc.{i}.query" for i in range(20))
    made = [lora(s, layers=layers) if kind == "lora" else ia3(s, layers) for s in (1, 2, 3)]
    expected = combine(made, [0.2, 0.3, -0.5], space=space, head="none", certify=False)
    watched = [Watched(m.tensors) for m in made]
    modules = [replace(m, tensors=w) for m, w in zip(made, watched, strict=True)]
    Watched.alive = Watched.most = 0
    result = combine(modules, [0.2, 0.3, -0.5], space=space, head="none", certify=False)
    for w in watched:
        assert [w.asked[n] for n in made[0].adapter_names] == [1] * len(made[0].adapter_names)
    assert Watched.most <= 2 * len(modules) + 1
    for name in result.tensors:
        assert torch.equal(result.tensors[name], expected.tensors[name])


@pytest.mark.parametrize("text", ["negate(delta(0.5*a + b))", "negate(delta(a + b, rank=2), 0.5)"])
def test_a_negated_sum_says_its_space_and_reads_back(text):
    named = {"a": replace(lora(1), name="a"), "b": replace(lora(2), name="b")}
    made = compose(text, named)
    again = compose(str(made), named)
    assert "delta(" in str(made)
    for layer, update in dense(made).items():
        np.testing.assert_allclose(dense(again)[layer], update, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "inner", ["ties(a, b, density=0.4)", "delta(a + b, rank=1)", "parameter(0.6*a + 0.4*b)"]
)
@pytest.mark.parametrize("outer", ["0.5*{} + c", '0.5*layers({}, "*0.query", 3) + c'])
def test_an_error_inside_is_a_note_of_the_sum_that_hides_it(inner, outer):
    named = {n: replace(lora(i, r=1), name=n) for i, n in enumerate("abc")}
    operand = compose(inner, named)
    total = operand.provenance.certificate.total
    assert total > 0.01
    made = compose(outer.format(inner), named, space="delta")
    assert any(f"by {total:.2g}" in note for note in made.provenance.notes)


def test_a_module_at_the_prompt_is_one_line() -> None:
    module = lora(0, base=BaseIdentity(name="org/base"))
    assert repr(module) == "<PEM m0: lora r=4, 2 layers of org/base>"
    assert repr(ia3(1)) == "<PEM m1: ia3, 2 layers>"


WRONG = {
    "modules: wrong type; found 'runs/a' (str), expected a module; read it by pem.load(DIR)": [
        lambda m: library.combine(["runs/a"], [1.0]),
        lambda m: library.combine([m, "runs/a"], [1.0, 1.0]),
        lambda m: library.analogy("runs/a", m, m),
        lambda m: library.detoxify(m, "runs/a", 0.5),
        lambda m: library.compare([m, "runs/a"]),
    ],
    "module: wrong type; found 'runs/a' (str), expected a module; read it by pem.load(DIR)": [
        lambda m: library.negate("runs/a"),
        lambda m: library.save("runs/a", m),
        lambda m: library.attach(torch.nn.Linear(2, 2), "runs/a"),
        lambda m: library.fold(torch.nn.Linear(2, 2), "runs/a"),
    ],
    "modules: wrong type; found <PEM m0: lora r=4, 2 layers> (PEM), expected a list of modules": [
        lambda m: library.combine(m, [1.0]),
        lambda m: library.compare(m),
    ],
    "coefficients: wrong type; found '12' (str), expected a list of numbers": [
        lambda m: library.combine([m, m], "12"),
        lambda m: library.compare([m, m], "12"),
    ],
    "coefficients: wrong type; found 1.0 (float), expected a list of numbers": [
        lambda m: library.combine([m], 1.0),
    ],
    "method: wrong type; found 5 (int), expected the name of a method": [
        lambda m: library.combine([m, m], [1.0, 1.0], method=5),
    ],
    "settings: wrong type; found ['density'] (list), expected a dictionary": [
        lambda m: library.combine([m, m], [1.0, 1.0], method="ties", settings=["density"]),
    ],
    "ties: ties has no setting 5; expected density,": [
        lambda m: library.combine([m, m], [1.0, 1.0], method="ties", settings={5: 1}),
    ],
    "statistics: wrong type; found 'a.fisher' (str), expected the fisher statistics": [
        lambda m: library.combine([m], [1.0], method="fisher", statistics=["a.fisher"]),
    ],
    "expression: wrong type; found None (NoneType), expected a text": [
        lambda m: library.compose(None, {"a": m}),
    ],
    "a: wrong type; found 'runs/a' (str), expected a module; read it by pem.load(DIR)": [
        lambda m: library.compose("a", {"a": "runs/a"}),
    ],
    "modules: wrong type; found [] (list), expected a dictionary of modules by name": [
        lambda m: library.compose("a", []),
    ],
    "layers: wrong type; found 2 (int), expected a dictionary of factors by patterns": [
        lambda m: library.compose("a", {"a": m}, layers={"a": 2}),
    ],
    "pattern: wrong type; found 5 (int), expected a pattern of layer names": [
        lambda m: library.compose("a", {"a": m}, layers={"a": {5: 1.0}}),
    ],
    "layers: the expression has no module named 'b'; found names ['a']": [
        lambda m: library.compose("a", {"a": m}, layers={"b": {"*": 1.0}}),
    ],
    "path: wrong type; found 5 (int), expected the folder or the hub name of a module": [
        lambda m: library.load(5),
        lambda m: library.convert(5, "out"),
        lambda m: library.rebuild(5),
    ],
    "path: wrong type; found None (NoneType), expected a path": [
        lambda m: m.save(None),
    ],
    "model: wrong type; found 'roberta-base' (str), expected a torch.nn.Module": [
        lambda m: library.attach("roberta-base", m),
        lambda m: library.detach("roberta-base"),
        lambda m: library.extract("roberta-base"),
        lambda m: library.fold("roberta-base", m),
    ],
}


@pytest.mark.parametrize(
    ("said", "call"), [(said, call) for said, calls in WRONG.items() for call in calls]
)
def test_an_argument_of_a_wrong_type_is_named_with_what_was_expected(said, call):
    with pytest.raises(PEMError) as error:
        call(lora(0))
    assert str(error.value).startswith(said)
