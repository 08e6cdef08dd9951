"""Methods on modules: ranks, certificates, kinds, missing layers, laws, other programs' sums."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from support.small_modules import LAYERS, full, ia3, lora, regauged, same_updates, updates
from torch import nn

from pem_composition.arithmetic.methods.draws import Draws
from pem_composition.arithmetic.methods.entries import Stacked, merged
from pem_composition.arithmetic.methods.registry import ELEMENTWISE, METHODS, Method, resolve
from pem_composition.arithmetic.statistics import BLOCKS, FISHER, SUBSPACE, Statistics, fingerprint
from pem_composition.config import LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM, combine

DELTA = [
    m.name for m in METHODS.values() if m.space == "delta" and m.name != "simple" and not m.needs
]
ENTRYWISE = [m.name for m in ELEMENTWISE]
# A method, or with the suffix one on core matrices instead of the entries of dW.
CASES = [*DELTA, *(f"{name}:core" for name in ENTRYWISE)]
BY_ROWS = [*ENTRYWISE, "ext_sub"]
FOR_ALL_KINDS = [*BY_ROWS, "slerp", "karcher"]
PAIRS = [m.name for m in METHODS.values() if m.modules[1] == 2]
A, B, C = lora(0), lora(1, r=2, alpha=5, rslora=True), lora(2, r=4, alpha=2)
EQUAL = [lora(seed) for seed in range(3)]  # of equal rank, for methods that compare rows


def entry(case: str) -> Method:
    return METHODS[case.partition(":")[0]]


def modules_for(name: str) -> list[PEM]:
    if name in PAIRS:
        return [A, B]
    return EQUAL if name == "robustmerge" else [A, B, C]


def merge(case: str, modules: list[PEM] | None = None, c=None, settings=None, **options) -> PEM:
    name, _, form = case.partition(":")
    modules = modules or modules_for(name)
    settings = {**({"form": form} if form else {}), **(settings or {})}
    return combine(modules, c or [1.0] * len(modules), method=name, settings=settings, **options)


def run(name: str, X: np.ndarray, layer: str, kind: str = "full", **given: object) -> np.ndarray:
    """The method on T dense matrices."""
    choice = resolve(name, given, kind)
    source = Stacked(torch.tensor(X).reshape(len(X), *X.shape[1:]))
    draws = Draws(int(choice.as_dict().get("seed", 0)), layer)
    settings = {k: v for k, v in choice.settings if k != "form"}
    return merged(source, choice.entry.function()(source, draws, **settings)).numpy()


# --- results ---


@pytest.mark.parametrize("name", CASES)
def test_a_result_is_a_module_of_low_rank_certified_against_the_method_itself(name):
    found = merge(name)
    ranks = sum(m.config.r for m in modules_for(name))
    for layer, dw in updates(found).items():
        assert np.linalg.matrix_rank(dw, tol=1e-9) <= found.config.rank(layer) <= ranks
    certificate = found.provenance.certificate
    assert certificate.against == "the method's own result"
    assert certificate.total < 1e-12
    assert found.provenance.space == "delta"


@pytest.mark.parametrize("name", CASES)
def test_a_rank_truncates_and_the_certificate_says_by_how_much(name):
    found, whole = merge(name, rank=2), merge(name)
    errors, norms = [], []
    for layer, dw in updates(found).items():
        assert np.linalg.matrix_rank(dw, tol=1e-9) <= 2
        if entry(name).own_rank:
            continue  # the rank is the method's own; nothing is cut after it
        exact = updates(whole)[layer]
        S = np.linalg.svd(exact, compute_uv=False)
        errors.append(np.linalg.norm(dw - exact))
        norms.append(np.linalg.norm(exact))
        np.testing.assert_allclose(errors[-1], np.linalg.norm(S[2:]), atol=1e-9)
    total = np.linalg.norm(errors) / np.linalg.norm(norms) if errors else 0.0
    assert found.provenance.certificate.total == pytest.approx(total, abs=1e-9)
    assert str(found.provenance.method).endswith(", rank 2")


@pytest.mark.parametrize("name", [n for n in CASES if not entry(n).own_rank])
def test_a_share_of_the_energy_decides_the_rank_of_every_layer(name):
    found, whole = merge(name, rank=0.6), updates(merge(name))
    kept = total = 0.0
    for layer, dw in updates(found).items():
        energies = np.square(np.linalg.svd(whole[layer], compute_uv=False))
        k = 1 + int((energies.cumsum() < 0.6 * energies.sum() * (1 - 1e-9)).sum())
        assert found.config.rank(layer) == k
        kept, total = kept + np.square(dw).sum(), total + energies.sum()
    assert found.provenance.certificate.kept_energy == pytest.approx(kept / total, abs=1e-9)
    assert str(found.provenance.method).endswith(", rank 0.6")


def test_the_certificate_is_that_of_the_rounded_result():
    found = merge("ties", dtype="bfloat16")
    exact = updates(merge("ties"))
    errors = [np.linalg.norm(dw - exact[layer]) for layer, dw in updates(found).items()]
    total = np.linalg.norm(errors) / np.linalg.norm([np.linalg.norm(x) for x in exact.values()])
    assert found.provenance.certificate.total == pytest.approx(total, rel=1e-9)
    assert 1e-4 < total < 2e-2


@pytest.mark.parametrize("name", ENTRYWISE)
def test_the_dense_form_is_the_method_on_dense_updates(name):
    """With a rank that holds everything; with less, the certificate is the true error."""
    found = merge(name, rank=7)
    less = merge(name)  # rank: the sum of ranks, here 9 > 7
    small = merge(name, rank=2)
    errors, norms = [], []
    for layer, dw in updates(found).items():
        exact = run(name, np.stack([updates(m)[layer] for m in (A, B, C)]), layer)
        np.testing.assert_allclose(dw, exact, atol=1e-10)
        np.testing.assert_allclose(updates(less)[layer], exact, atol=1e-10)
        errors.append(np.linalg.norm(updates(small)[layer] - exact))
        norms.append(np.linalg.norm(exact))
    total = np.linalg.norm(errors) / np.linalg.norm(norms)
    assert small.provenance.certificate.total == pytest.approx(total, rel=1e-9) and total > 0.01
    assert "form=dense" in small.provenance.method


@pytest.mark.parametrize("name", FOR_ALL_KINDS)
@pytest.mark.parametrize("make", [ia3, full])
def test_vectors_and_full_updates_are_merged_entry_by_entry(name, make):
    count = 2 if name in PAIRS else 3
    modules = [make(seed) for seed in range(count)]
    found = merge(name, modules)
    assert found.kind == modules[0].kind and "form" not in found.provenance.method
    for layer, change in updates(found).items():
        X = np.stack([updates(m)[layer] for m in modules])
        if name in BY_ROWS:
            flat = X.reshape(count, 1, -1) if X.ndim < 3 else X.reshape(count, -1, X.shape[-1])
            exact = run(name, flat, layer).reshape(change.shape)
        else:
            flat = X.reshape(count, -1)
            mean = METHODS[name].function()
            weights = mean(torch.tensor(flat @ flat.T), [1 / count] * count, layer)
            exact = np.tensordot(weights, X, 1)
        np.testing.assert_allclose(change, exact, atol=1e-12)
    assert found.provenance.certificate.total < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_updates_whose_squares_no_double_holds_are_refused_or_merged_right(case):
    modules = modules_for(entry(case).name)
    large = [replace(m, tensors={n: t * 1e100 for n, t in m.tensors.items()}) for m in modules]
    try:
        found = updates(merge(case, large))
    except PEMError as error:
        assert "too large for" in str(error)
        return
    for layer, update in updates(merge(case, modules)).items():
        np.testing.assert_allclose(found[layer] / 1e200, update, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["slerp", "karcher"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_numbers_that_move_in_opposite_ways_have_a_weighted_mean(name, shape):
    """Between two directions of a line lies no third: a mean on the sphere is the sum there."""
    modules = [
        replace(full(seed), tensors={**full(seed).tensors, "scale.delta": torch.full(shape, value)})
        for seed, value in ((0, 0.5), (1, -0.3))
    ]
    found = merge(name, modules, [0.75, 0.25]).tensors["scale.delta"]
    torch.testing.assert_close(found, torch.full(shape, 0.75 * 0.5 - 0.25 * 0.3))


@pytest.mark.parametrize("name", [n for n in DELTA if n not in FOR_ALL_KINDS])
@pytest.mark.parametrize("make", [ia3, full])
def test_methods_on_factors_refuse_other_kinds_by_name(name, make):
    with pytest.raises(PEMError, match=f"{name}: not defined for modules of kind"):
        merge(name, [make(0), make(1)])


# --- laws ---


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("iso_c", "iso_cts", *PAIRS)])
def test_one_module_with_everything_kept_is_itself(name):
    settings = {}
    if any(s.name == "density" for s in entry(name).settings):
        settings = {"density": 1.0}
    if name in ("knots", "ctm"):
        settings = {"density": 1.0}
    if name.startswith("della"):
        settings["epsilon"] = 0
    if name.startswith("breadcrumbs"):
        settings["gamma"] = 0
    same_updates(merge(name, [A], settings=settings), A)


# Masks go by position of the module, so that two copies of a module have two masks; the second
# operand of a detoxification is the one that is taken away.
BY_POSITION = {"dare", "dare_ties", "della", "dare:core", "dare_ties:core", "della:core"}
TAKES_AWAY = {"reference_detoxify", "ext_sub"}
SYMMETRIC = [n for n in (*CASES, *METHODS) if n not in BY_POSITION | TAKES_AWAY]


def informed(name: str, modules: list[PEM]) -> list[Statistics]:
    """Random statistics of the modules, for the methods that need them."""
    out = []
    for seed, m in enumerate(modules):
        g = torch.Generator().manual_seed(seed)
        facts, X = {}, {layer: torch.randn(20, 7, generator=g).double() for layer in m.layers}
        if METHODS[name].needs == FISHER:
            needed = {n: torch.rand(t.shape, generator=g).double() for n, t in m.tensors.items()}
        elif METHODS[name].needs == SUBSPACE:
            A = {
                n: torch.cat([o.tensors[f"{n}.lora_A"] for o in modules]).double() for n in m.layers
            }
            needed = {f"{n}.subspace": A[n] @ x.mT @ x @ A[n].mT for n, x in X.items()}
            facts = {BLOCKS: [fingerprint(o) for o in modules]}
        else:
            needed = {f"{layer}.gram": x.mT @ x for layer, x in X.items()}
        out.append(Statistics(METHODS[name].needs, needed, fingerprint(m), 20, facts))
    return out


SOME_RANKS = [None, *(pytest.param(r, marks=pytest.mark.slow) for r in (1, 2)), 4]


@pytest.mark.parametrize("rank", SOME_RANKS)
@pytest.mark.parametrize("name", list(dict.fromkeys(SYMMETRIC)))
def test_the_order_of_the_modules_does_not_matter(name, rank):
    """To rounding: sums of a dozen products of size 10 in float64, divided by gaps above 1e-3."""
    method = entry(name)
    if rank and method.space == "parameter":
        pytest.skip("parameter space has the modules' rank")
    modules = EQUAL if method.space == "parameter" else modules_for(name)
    c = [0.7, 0.2, 1.1][: len(modules)]
    given = informed(name, modules) if method.needs else ()
    space = {"space": "delta"} if name == "simple" else {}

    def merged_as(order):
        own = {"statistics": [given[i] for i in order]} if given else {}
        found, weights = [modules[i] for i in order], [c[i] for i in order]
        return merge(name, found, weights, rank=rank, certify=False, **own, **space)

    first, *others = map(merged_as, permutations(range(len(modules))))
    for other in others:
        same_updates(first, other, atol=1e-9)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_result_is_as_wide_as_the_widest_of_its_modules(name, rank):
    method = METHODS[name]
    if rank and method.space == "parameter" and name != "simple":
        pytest.skip("parameter space has the modules' rank")
    wide = EQUAL[: method.modules[1]]
    narrow = [replace(m, tensors={n: t.float() for n, t in m.tensors.items()}) for m in wide]
    for modules, expected in (
        (narrow, torch.float32),
        ([narrow[0], *wide[1:]], torch.float64),
        ([*wide[:-1], narrow[-1]], torch.float64),
    ):
        given = {"statistics": informed(name, modules)} if method.needs else {}
        space = {"space": "delta"} if name == "simple" else {}
        found = merge(name, modules, rank=rank, certify=False, **given, **space)
        assert {t.dtype for t in found.tensors.values()} == {expected}


@pytest.mark.parametrize("name", sorted(BY_POSITION))
def test_random_masks_go_by_position(name):
    assert METHODS[name.partition(":")[0]].random
    two = merge(name, [A, A], [0.5, 0.5]), merge(name, [A], [1.0])
    assert any(not np.allclose(x, updates(two[1])[layer]) for layer, x in updates(two[0]).items())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lower_rank_of_equal_singular_values_is_that_of_the_sum(rank):
    """iso_c: the leading directions of the sum, at the mean of all its singular values."""
    found = merge("iso_c", rank=rank)
    for layer, dw in updates(found).items():
        U, S, Vh = np.linalg.svd(sum(updates(m)[layer] for m in (A, B, C)))
        np.testing.assert_allclose(dw, S.mean() * U[:, :rank] @ Vh[:rank], atol=1e-10)
    np.testing.assert_allclose(
        found.provenance.certificate.total, (1 - rank / 7) ** 0.5, rtol=1e-9
    )  # 7 directions, of which ``rank`` are kept


@pytest.mark.parametrize("name", [n for n in CASES if not entry(n).shares])
def test_a_coefficient_is_a_factor_of_the_modules_update(name):
    """ties(a, 0.5*b) is ties(a, h) with h half of b's update."""
    modules = modules_for(name)
    half = combine([modules[1]], [-0.5], space="delta")
    if name == "lego":  # it splits the factor evenly; do the same
        root = 0.5**0.5
        half = replace(
            modules[1],
            tensors={
                n: t * (-root if n.endswith("lora_B") else root)
                for n, t in modules[1].adapter_tensors().items()
            },
        )
    scaled = merge(name, [modules[0], half, *modules[2:]])
    same_updates(scaled, merge(name, modules, [1.0, -0.5, *[1.0] * (len(modules) - 2)]), 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_common_factor_comes_out_of_the_method(name):
    modules = modules_for(name)
    twice = [combine([m], [2.0], space="delta") for m in modules]
    if entry(name).shares:
        same_updates(merge(name, twice), combine([merge(name)], [2.0], space="delta"), 1e-9)
        return
    found = merge(name, modules, [2.0] * len(modules))
    same_updates(found, combine([merge(name)], [2.0], space="delta"), atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("robustmerge", "lego")])
def test_how_an_update_is_split_in_factors_does_not_matter(name):
    modules = modules_for(name)
    same_updates(merge(name), merge(name, [regauged(m) for m in modules]), atol=1e-8)


@pytest.mark.parametrize("name", [n for n in CASES if entry(n).random])
def test_random_methods_depend_on_seed_and_layer_not_on_which_layers_there_are(name):
    modules = modules_for(name)
    one, two = (updates(merge(name, settings={"seed": s}))[LAYERS[0]] for s in (1, 2))
    # lego takes the best of many starts: of nine units the same for every seed
    assert np.allclose(one, two) == (name == "lego")
    alone = [
        replace(m, tensors={n: t for n, t in m.tensors.items() if n.startswith(LAYERS[1])})
        for m in modules
    ]
    torch.manual_seed(1)
    whole, part = merge(name), merge(name, alone)
    for side in ("lora_A", "lora_B"):
        name_of = f"{LAYERS[1]}.{side}"
        torch.testing.assert_close(whole.tensors[name_of], part.tensors[name_of], rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("slerp", "robustmerge")])
def test_a_layer_that_a_module_lacks_is_an_update_of_zero(name):
    short = lora(5, layers=LAYERS[:1])
    zeros = replace(
        short,
        tensors={
            **short.tensors,
            f"{LAYERS[1]}.lora_A": torch.ones(3, 7, dtype=torch.float64),
            f"{LAYERS[1]}.lora_B": torch.zeros(9, 3, dtype=torch.float64),
        },
    )
    if name == "lego":  # a unit [a, 0] is a unit; a missing one is none
        assert updates(merge(name, [A, short])).keys() == updates(A).keys()
        return
    rank = None if entry(name).own_rank else 7  # the default of the dense form counts ranks
    same_updates(merge(name, [A, short], rank=rank), merge(name, [A, zeros], rank=rank))


def test_knots_with_a_sum_changes_nothing():
    sums = combine([A, B, C], [0.3, -1.0, 2.0], space="delta")
    same_updates(merge("knots", c=[0.3, -1.0, 2.0], settings={"inner": "simple"}), sums)


def test_compress_then_merge_has_its_rank_by_construction():
    for inner in ("ties", "dare", "tsv", "iso_cts", "simple"):
        found = merge("ctm", settings={"inner": inner}, rank=2)
        assert found.config.r <= 2
        assert found.provenance.certificate.total < 1e-12
    assert merge("ctm").config.r <= 4  # the largest rank of the three


def test_a_mean_on_the_sphere_is_a_sum_with_a_weight_per_layer():
    found = merge("karcher", c=[1.0, 2.0, 1.0])
    for layer, dw in updates(found).items():
        X = np.stack([updates(m)[layer].ravel() for m in (A, B, C)])
        weights, residue, *_ = np.linalg.lstsq(X.T, dw.ravel(), rcond=None)
        assert residue[0] < 1e-18 and (weights > 0).all()
    assert str(found).startswith("karcher(m0, 2*m1, m2)")


# --- requests that cannot be ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tise"}, "unknown method 'tise'; did you mean ties"),
        ({"method": "ties", "space": "parameter"}, "ties merges updates; found space parameter"),
        ({"method": "reference", "space": "delta"}, "reference merges the modules' own tensors"),
        ({"method": "ties", "settings": {"density": 0}}, r"must be in \(0, 1\]; found 0"),
        ({"method": "reference_detoxify"}, "wrong number of modules; found 3, expected 2"),
        ({"method": "slerp"}, "wrong number of modules; found 3, expected 2; use karcher"),
        ({"method": "ties", "rank": 0}, "not a rank; found 0"),
        ({"method": "ctm", "rank": 0.5}, "ctm merges in R directions of its own; found a share"),
        ({"method": "ties", "rank": 1.0}, "all of the energy needs no rank; found 1.0"),
        ({"method": "reference", "rank": 2}, "rank: applies to delta space only"),
        ({"settings": {"density": 0.5}}, "simple has no setting 'density'"),
    ],
)
def test_a_request_that_cannot_be_is_refused(options, message):
    with pytest.raises(PEMError, match=message):
        combine([A, B, C], [1.0, 1.0, 1.0], **options)


@pytest.mark.parametrize("c", [[1.0, -0.5], [0.0, 0.0]])
def test_shares_are_not_negative_and_not_all_zero(c):
    for name in ("slerp", "karcher"):
        with pytest.raises(PEMError, match=r"as shares c / sum c; found .* expected coeff"):
            combine([A, B], c, method=name)


def test_unequal_ranks_are_refused_where_rows_are_compared():
    with pytest.raises(IncompatibleModules, match=r"enc.0.query: RobustMerge compares row k"):
        combine([A, C], [1, 1], method="robustmerge")


# --- other programs' sums ---


class Host(nn.Module):
    """Two linear layers to hang adapters on."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(7, 9)}) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.enc[0]["query"](x) + self.enc[1]["query"](x)


def peft_merge(modules: list[PEM], weights: list[float]) -> dict[str, np.ndarray]:
    """dW of PEFT's add_weighted_adapter(combination_type="linear"), measured on its layers."""
    from peft import IA3Config, LoraConfig, get_peft_model, set_peft_model_state_dict

    model = None
    for i, m in enumerate(modules):
        if m.kind == "lora":
            config = LoraConfig(r=m.config.r, lora_alpha=m.config.alpha, target_modules=["query"])
        else:
            config = IA3Config(target_modules=["query"], feedforward_modules=[])
        if model is None:
            model = get_peft_model(Host(), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
        state = {}
        for name, tensor in m.adapter_tensors().items():
            layer, _, role = name.rpartition(".")
            key = f"base_model.model.{layer}.{'ia3_l' if role == 'ia3' else role + '.weight'}"
            state[key] = tensor.float()[:, None] if role == "ia3" else tensor.float()
        set_peft_model_state_dict(model, state, adapter_name=f"a{i}")
    names = [f"a{i}" for i in range(len(modules))]
    if modules[0].kind == "lora":
        model.add_weighted_adapter(names, weights, "merged", combination_type="linear")
    else:
        model.base_model.add_weighted_adapter(names, weights, "merged")
    out = {}
    for i, layer in enumerate(LAYERS):
        module = model.base_model.model.enc[i]["query"]
        if modules[0].kind == "lora":
            out[layer] = module.get_delta_weight("merged").detach().numpy()
        else:
            out[layer] = module.ia3_l["merged"].detach().numpy()[:, 0] - 1
    return out


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [1.0, -0.5], [-1.0, -2.0]])
def test_peft_linear_is_what_the_installed_peft_writes(weights):
    modules = [lora(0, alpha=6), lora(1, alpha=1.5)]
    found = combine(modules, weights, method="peft_linear")
    for layer, dw in peft_merge(modules, weights).items():
        np.testing.assert_allclose(updates(found)[layer], dw, atol=1e-5)
    assert found.provenance.certificate.total > 0.3  # its cross terms
    assert found.provenance.certificate.against == "sum c_i dW_i"


def test_peft_linear_of_ia3_is_what_the_installed_peft_writes():
    modules = [ia3(0), ia3(1)]
    found = combine(modules, [1.0, 1.0], method="peft_linear")
    for layer, change in peft_merge(modules, [1.0, 1.0]).items():
        np.testing.assert_allclose(updates(found)[layer], change, atol=1e-6)
    assert updates(found)[LAYERS[0]].mean() > 0.8  # it doubles the activations


def test_a_negative_weight_has_a_root_and_a_sign():
    """PEFT before 0.18 took the root of it, and until 0.19 lost the sign."""
    found = combine([A], [-1.0], method="peft_linear")
    same_updates(found, combine([A], [-1.0], space="delta"))


def test_peft_linear_refuses_rslora_which_peft_inflates():
    with pytest.raises(PEMError, match=r"m1: PEFT keeps use_rslora .* inflates it by sqrt\(r\)"):
        combine([B, B], [1, 1], method="peft_linear")


def test_the_reference_divides_by_the_sum_and_takes_every_tensor_alike():
    a, b = EQUAL[:2]
    found = combine([a, b], [30, 70], method="reference")
    for name in a.adapter_tensors():
        expected = 0.3 * a.tensors[name] + 0.7 * b.tensors[name]
        torch.testing.assert_close(found.tensors[name], expected)
    same_updates(combine([a, b], [0.3, 0.7]), found)  # where no coefficient is negative
    mixed = combine([a, b], [1.5, -0.5], method="reference")
    for name in a.adapter_tensors():  # the sign is on both factors there: none on the update
        torch.testing.assert_close(
            mixed.tensors[name], 1.5 * a.tensors[name] - 0.5 * b.tensors[name]
        )
    with pytest.raises(PEMError, match="divided by their sum, which is 0; found 1, -1"):
        combine([a, b], [1, -1], method="reference")


def test_adapters_linear_scales_both_factors():
    a = EQUAL[0]
    found = combine([a], [0.3], method="adapters_linear", settings={"normalize": "false"})
    for layer, dw in updates(found).items():
        np.testing.assert_allclose(dw, 0.09 * updates(a)[layer], atol=1e-12)
    same_updates(combine([a], [0.3], method="adapters_linear"), a)  # normalised, the weight cancels
    vectors = [ia3(0), ia3(1)]
    summed = combine(vectors, [1, 1], method="adapters_linear", settings={"normalize": "false"})
    for name, tensor in summed.adapter_tensors().items():
        torch.testing.assert_close(tensor, vectors[0].tensors[name] + vectors[1].tensors[name])


def test_sums_of_own_tensors_need_equal_ranks():
    for name in ("reference", "adapters_linear"):
        with pytest.raises(IncompatibleModules, match=r"rank r at enc.0.query differs"):
            combine([A, C], [1, 1], method=name)
    with pytest.raises(PEMError, match="shapes of one layer differ"):
        combine([A, C], [1, 1], method="peft_linear")


# --- known faults of other implementations of low-rank merging ---


def test_every_scaling_enters_once():
    """PEFT's svd of 0.9 to 0.20 had alpha/r twice; adapters and KnOTS leave it out."""
    config = LoraConfig(r=3, alpha=12, target_modules=("query",))
    scaled = replace(A, config=config)
    for name in ("ties", "tsv", "knots", "ctm", "karcher"):
        settings = {"density": 1.0} if name in ("ties", "knots", "ctm") else {}
        same_updates(merge(name, [scaled], settings=settings), scaled)


def test_rslora_is_not_inflated():
    """PEFT's merged config keeps use_rslora: everything times sqrt(r)."""
    found = merge("ties", [B], settings={"density": 1.0})
    same_updates(found, B)
    assert isinstance(found.config, LoraConfig) and not found.config.use_rslora
    assert found.config.scaling(LAYERS[0]) == 1.0


def test_layers_of_the_second_module_alone_are_kept():
    """PEFT takes layers_to_transform from the first and drops the other's layers."""
    other = lora(3, layers=("enc.1.query", "enc.7.query"))
    for name in ("ties", "tsv", "karcher"):
        assert set(updates(merge(name, [A, other]))) == {*LAYERS, "enc.7.query"}
