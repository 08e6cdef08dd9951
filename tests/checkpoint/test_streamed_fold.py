"""Folding into checkpoints equals folding into models in memory, PEFT's merge, and dense NumPy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import one_meaning as om
from support.small_modules import dense
from support.tiny_models import EACH, logits_of, moved, random_module, tiny
from torch import Tensor, nn

from pem_composition.adapters import attach, fold
from pem_composition.checkpoint import combine_full, fold_checkpoint, load
from pem_composition.checkpoint.full import Weights
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.composition import compose
from pem_composition.errors import IncompatibleModules, PEMError, UsageError
from pem_composition.module import PEM, negate


def weights(folder: Path) -> dict[str, Tensor]:
    with Weights(folder) as held:
        return {name: held.raw(name).clone() for name in held.infos}


def saved(model: nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def module_on(base: Path, module: PEM, folder: Path) -> Path:
    """The module with the identity of this base, on disk."""
    from pem_composition.checkpoint import base_identity

    replace(module, base=base_identity(base)).save(folder)
    return folder


def assert_equal(folder: Path, model: nn.Module) -> None:
    """Every tensor of the checkpoint is that of the model, bit for bit, and none is missing."""
    state, found = model.state_dict(), weights(folder)
    assert found, folder
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    kept = {t.data_ptr() for n, t in state.items() if n in found}
    assert all(t.data_ptr() in kept for t in state.values() if t.numel())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["peft", "reference"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", EACH)
def test_a_folded_checkpoint_is_the_folded_model(
    name: str, kind: str, placement: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny(name).to(dtype)
    base = saved(model, tmp_path / "base", max_shard_size="20KB")
    module = random_module(tiny(name), kind, seed=1, placement=placement, head_seed=3)
    path = module_on(base, module, tmp_path / "a")
    fold_checkpoint("a", {"a": path}, base, tmp_path / "out")
    fold(model, load(path), permanent=True)
    assert_equal(tmp_path / "out", model)
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    if dtype == torch.float32:  # .to(bfloat16) rounds rotary frequencies that a load does not
        assert torch.equal(logits_of(again.eval()), logits_of(model))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", ["roberta", "t5", "gpt2", "llama"])
def test_a_folded_checkpoint_is_what_peft_merges(name: str, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = saved(tiny(name), tmp_path / "base")
    module = random_module(tiny(name), kind, seed=2)
    path = module_on(
        base, replace(module, tensors=module.adapter_tensors(), head=None), tmp_path / "a"
    )
    fold_checkpoint("a", {"a": path}, base, tmp_path / "out")
    state = PeftModel.from_pretrained(tiny(name), path).merge_and_unload().state_dict()
    for n, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, state[n], rtol=1e-5, atol=1e-6)


def tuned(name: str, base: nn.Module, folder: Path, seed: int, size: float = 0.05) -> Path:
    """The model after a random step, its head included."""
    model = tiny(name)
    model.load_state_dict(base.state_dict())
    return saved(moved(model, seed, size), folder)


def test_kinds_add_up(tmp_path: Path) -> None:
    """2 LoRA, 1 (IA)^3 and 2 whole models in one expression, against dense float64."""
    model = tiny("roberta")
    base = saved(model, tmp_path / "base")
    places = {
        "a": module_on(base, random_module(tiny("roberta"), seed=1), tmp_path / "a"),
        "b": module_on(base, random_module(tiny("roberta"), seed=2, r=2), tmp_path / "b"),
        "l": module_on(base, random_module(tiny("roberta"), "ia3", seed=3), tmp_path / "l"),
        "f": tuned("roberta", model, tmp_path / "f", 4),
        "g": tuned("roberta", model, tmp_path / "g", 5),
    }
    expression = 'a - 0.4*b + 0.5*negate(l, 0.5) + 0.7*f - layers(g, "*.encoder.layer.0.*", 0.5)'
    fold_checkpoint(expression, places, base, tmp_path / "out", head="none")
    a, b, l_ = (load(places[n]) for n in "abl")
    theta, f, g = (weights(p) for p in (base, places["f"], places["g"]))
    found = weights(tmp_path / "out")
    assert found.keys() == theta.keys()
    wrong = norm = 0.0
    for name, tensor in found.items():
        zero = theta[name].double().numpy()
        exact = zero.copy()
        if "classifier" in name:  # the base's own head
            np.testing.assert_array_equal(tensor.numpy(), theta[name].numpy())
            continue
        exact += 0.7 * (f[name].double().numpy() - zero)
        share = 0.5 if "encoder.layer.0" in name else 1.0
        exact -= share * (g[name].double().numpy() - zero)
        layer, _, part = name.rpartition(".")
        if f"{layer}.lora_A" in a.tensors and part == "weight":
            exact += dense(a, layer) - 0.4 * dense(b, layer)
        vector = l_.tensors.get(f"{layer}.ia3")
        if vector is not None:
            change = -0.25 * (vector.double().numpy() - 1)
            of_input = l_.config.scales_input(layer)
            if part == "weight":
                exact += zero * (change if of_input else change[:, None])
            elif not of_input:
                exact += zero * change
        np.testing.assert_allclose(tensor.double().numpy(), exact, atol=2e-6, err_msg=name)
        wrong += float(np.square(tensor.double().numpy() - exact).sum())
        norm += float(np.square(exact - zero).sum())
    record = json.loads((tmp_path / "out" / "pem.json").read_text())
    assert record["certificate"]["against"] == "the update in float64"
    assert record["certificate"]["total"] <= (wrong / norm) ** 0.5 < 1e-5
    assert record["space"] == "delta"
    assert rebuild(tmp_path / "out").equal


def test_the_certificate_is_what_rounding_costs(tmp_path: Path) -> None:
    model = tiny("llama")
    base = saved(model, tmp_path / "base")
    module = random_module(tiny("llama"), seed=1)
    path = module_on(base, module, tmp_path / "a")
    fold_checkpoint("a", {"a": path}, base, tmp_path / "out", dtype="bfloat16")
    theta, found = weights(base), weights(tmp_path / "out")
    wrong = norm = 0.0
    for layer in module.layers:
        update = dense(load(path), layer)
        written = found[f"{layer}.weight"].double() - theta[f"{layer}.weight"].double()
        wrong += float(np.square(written.numpy() - update).sum())
        norm += float(np.square(update).sum())
    recorded = json.loads((tmp_path / "out" / "pem.json").read_text())["certificate"]
    assert recorded["total"] == pytest.approx((wrong / norm) ** 0.5, rel=1e-3)
    assert recorded["total"] > 1e-4
    assert recorded["layers"].keys() == {f"{layer}.weight" for layer in module.layers}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-2])
@pytest.mark.parametrize("what", ["adapter", "whole model"])
def test_the_certificate_sees_what_float32_loses(what: str, size: float, tmp_path: Path) -> None:
    """An update of a millionth of the weight is gone in part when float32 adds it."""
    base = saved(tiny("llama"), tmp_path / "base")
    theta = {n: t.double() for n, t in weights(base).items()}
    module = random_module(tiny("llama"), seed=1)
    if what == "adapter":
        small = {n: t * (size if n.endswith("lora_B") else 1) for n, t in module.tensors.items()}
        path = module_on(base, replace(module, tensors=small), tmp_path / "a")
        update = {f"{n}.weight": torch.from_numpy(dense(load(path), n)) for n in module.layers}
        fold_checkpoint("a", {"a": path}, base, tmp_path / "out")
    else:
        tuned = tiny("llama")
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(torch.randn_like(p))
        end = weights(saved(tuned, tmp_path / "f"))
        update = {n: size * (end[n].double() - t) for n, t in theta.items()}
        combine_full([tmp_path / "f"], [size], tmp_path / "out", base=base)
        fold_checkpoint(
            f"{size}*f", {"f": tmp_path / "f"}, base, tmp_path / "fold", allow_base_mismatch=True
        )
        certificates = [
            json.loads((tmp_path / o / "pem.json").read_text())["certificate"]
            for o in ("out", "fold")
        ]
        assert certificates[0] == certificates[1]
        assert weights(tmp_path / "out").keys() == weights(tmp_path / "fold").keys()
    found = weights(tmp_path / "out")
    wrong = sum(float((found[n].double() - theta[n] - u).square().sum()) for n, u in update.items())
    norm = sum(float(u.square().sum()) for u in update.values())
    stated = json.loads((tmp_path / "out" / "pem.json").read_text())["certificate"]["total"]
    assert stated == pytest.approx((wrong / norm) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_an_expression_means_what_compose_says(space: str, tmp_path: Path) -> None:
    model = tiny("llama")
    base = saved(model, tmp_path / "base")
    places = {
        n: module_on(base, random_module(tiny("llama"), seed=i), tmp_path / n)
        for i, n in enumerate("ab")
    }
    expression = "0.6*a - 0.4*negate(b)"
    fold_checkpoint(expression, places, base, tmp_path / "out", space=space)
    module = compose(expression, {n: load(p) for n, p in places.items()}, space=space)
    fold(model, module, permanent=True)
    assert_equal(tmp_path / "out", model)


def test_whole_models_alone_are_task_arithmetic(tmp_path: Path) -> None:
    model = tiny("roberta")
    base = saved(model, tmp_path / "base")
    places = {n: tuned("roberta", model, tmp_path / n, i) for i, n in enumerate("fg")}
    fold_checkpoint("f", places, base, tmp_path / "one")
    one, f = weights(tmp_path / "one"), weights(places["f"])
    assert one.keys() == f.keys()
    assert all(torch.equal(one[n], t) for n, t in f.items())
    fold_checkpoint("0.5*f + 0.7*g", places, base, tmp_path / "two", head="last")
    two, g, theta = weights(tmp_path / "two"), weights(places["g"]), weights(base)
    for name, tensor in two.items():
        exact = theta[name] + 0.5 * (f[name] - theta[name]) + 0.7 * (g[name] - theta[name])
        torch.testing.assert_close(tensor, g[name] if "classifier" in name else exact)


@pytest.mark.parametrize("policy", ["average", "first", "last", "none", "error"])
def test_the_head_by_policy(policy: str, tmp_path: Path) -> None:
    model = tiny("roberta")
    base = saved(model, tmp_path / "base")
    places = {
        n: module_on(base, random_module(tiny("roberta"), seed=i, head_seed=i), tmp_path / n)
        for i, n in enumerate("ab")
    }
    places["f"] = tuned("roberta", model, tmp_path / "f", 9)
    request = ("a - 3*b + 4*f", places, base, tmp_path / "out")
    if policy == "error":
        with pytest.raises(IncompatibleModules, match="the heads differ"):
            fold_checkpoint(*request, head=policy)
        assert not (tmp_path / "out").exists()
        return
    fold_checkpoint(*request, head=policy)
    found, own = weights(tmp_path / "out"), [load(places[n]).head_tensors() for n in "ab"]
    own.append(weights(places["f"]))
    for name in own[0]:
        a, b, f = (h[name] for h in own)
        expected = {
            "average": (a + 3 * b + 4 * f) / 8, "first": a, "last": f, "none": weights(base)[name],
        }[policy]  # fmt: skip
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


def test_a_bare_base_gets_the_names_of_the_model_with_the_head(tmp_path: Path) -> None:
    """A RobertaModel without prefix, folded with a classifier's module, opens as a classifier."""
    import transformers

    whole = tiny("roberta")
    base = saved(whole.roberta, tmp_path / "base")
    module = random_module(tiny("roberta"), seed=1, head_seed=2)
    path = module_on(base, module, tmp_path / "a")
    fold_checkpoint("a", {"a": path}, base, tmp_path / "out")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with attach(whole.double(), module):  # float64: what differs is the rounding of the weights
        found = logits_of(loaded.eval().double())
        torch.testing.assert_close(found, logits_of(whole), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    fold_checkpoint("a", {"a": path}, base, tmp_path / "body", head="none")
    assert weights(tmp_path / "body").keys() == weights(base).keys()


@pytest.mark.parametrize(
    ("name", "part"), [("roberta mlm", "lm_head"), ("bert mlm", "cls"), ("llama", "lm_head")]
)
def test_a_bare_base_gets_the_output_layer_of_the_module(
    name: str, part: str, tmp_path: Path
) -> None:
    """The base's class has an output layer, and its file ends before it."""
    m = om.BY_NAME[name]
    base = saved(om.built(name).base_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = [type(om.built(name)).__name__]
    (base / "config.json").write_text(json.dumps(config))
    options = {"target_modules": [m.attention[0]], "modules_to_save": [part]}
    made = om.made(m, "lora", options, base, tmp_path / "a")
    found = om.way_fold_auto(made, tmp_path)
    torch.testing.assert_close(found, made.want, rtol=1e-5, atol=1e-5)


def test_by_blocks_of_rows_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2", "roberta"):
        base = saved(tiny(name), tmp_path / name / "base")
        for kind in ("lora", "ia3"):
            folder = tmp_path / name / kind
            path = module_on(base, random_module(tiny(name), kind, seed=1), folder / "a")
            fold_checkpoint("a", {"a": path}, base, folder / "whole")
            with monkeypatch.context() as patch:
                patch.setattr("pem_composition.checkpoint.blocks.ROWS", 100)
                patch.setattr("pem_composition.checkpoint.stream.SLOT_BYTES", 64)
                fold_checkpoint("a", {"a": path}, base, folder / "rows")
            whole, rows = weights(folder / "whole"), weights(folder / "rows")
            for n, tensor in whole.items():
                torch.testing.assert_close(rows[n], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["bert", "llama tied"])
def test_a_whole_model_s_update_is_added_to_a_part_saved_whole(name: str, tmp_path: Path) -> None:
    """saved + 0.5 (theta - theta_0), as the update of an adapter is; and the record says so."""
    m = om.BY_NAME[name]
    base = om.base_folder(m, tmp_path)
    made = om.made(
        m, "lora", {"target_modules": list(m.attention[:1]), "modules_to_save": [m.norm]}, base,
        tmp_path / "s",
    )  # fmt: skip
    model = om.fresh(m, base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    model.save_pretrained(tmp_path / "f")
    places = {"s": made.module, "f": tmp_path / "f"}
    fold_checkpoint("s", places, base, tmp_path / "one", head="first")
    options = {"head": "first", "allow_base_mismatch": True}
    fold_checkpoint("s + 0.5*f", places, base, tmp_path / "two", **options)
    one, two, zero, theta = (weights(tmp_path / p) for p in ("one", "two", base, "f"))
    for n, tensor in two.items():
        head = n.startswith("classifier")  # the only one that a module has
        exact = theta[n] if head else one[n] + 0.5 * (theta[n] - zero[n])
        torch.testing.assert_close(tensor, exact)
    notes = json.loads((tmp_path / "two" / "pem.json").read_text())["notes"]
    assert sum("saved whole" in note for note in notes) == 1
    assert not any("left out (head policy none)" in note for note in notes)


@pytest.mark.parametrize("name", ["bert", "llama tied"])
def test_the_certificate_knows_which_saved_parts_are_the_sum(name: str, tmp_path: Path) -> None:
    """Its error of a part is 0 where the file holds W_0 + sum_i c_i (S_i - W_0), else unknown."""
    m = om.BY_NAME[name]
    base = om.base_folder(m, tmp_path)
    options = {"target_modules": list(m.attention[:1]), "modules_to_save": [m.norm]}
    places = {"a": om.made(m, "lora", options, base, tmp_path / "a").module}
    b = load(places["a"])
    replace(b, tensors={n: t + 0.1 for n, t in b.tensors.items()}).save(tmp_path / "b")
    negate(b).save(tmp_path / "n")
    places |= {n: tmp_path / n for n in "bn"}
    zero, parts = weights(base), {n: load(p).head_tensors() for n, p in places.items()}
    cases: list[tuple[str, dict[str, float], str]] = [
        ("a", {"a": 1}, "average"),
        ("n", {"n": 1}, "average"),
        ("0.5*a", {"a": 0.5}, "average"),
        ("-a", {"a": -1}, "average"),
        ("a", {"a": 1}, "none"),
        ("a + b", {"a": 1, "b": 1}, "last"),
        ("0.25*a + 0.75*b", {"a": 0.25, "b": 0.75}, "average"),
    ]
    for i, (text, terms, head) in enumerate(cases):
        out = tmp_path / f"f{i}"
        used = {n: places[n] for n in terms}
        fold_checkpoint(text, used, base, out, head=head, allow_base_mismatch=True)
        theta = weights(out)
        certificate = json.loads((out / "pem.json").read_text())["certificate"]
        wrong = 0
        for part in parts["a"]:
            if part.startswith("classifier"):  # no part of the base
                continue
            exact = zero[part] + sum(c * (parts[n][part] - zero[part]) for n, c in terms.items())
            is_sum = torch.allclose(theta[part], exact, atol=1e-6)
            assert certificate["layers"][part] == (0.0 if is_sum else None), (text, part)
            wrong += not is_sum
        assert (certificate["total"] is None) == bool(wrong), text


@pytest.mark.parametrize("name", ["bert", "llama tied"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_rounding_costs_a_saved_part_is_in_the_certificate(
    name: str, dtype: str, tmp_path: Path
) -> None:
    m = om.BY_NAME[name]
    base = om.base_folder(m, tmp_path)
    options = {"target_modules": list(m.attention[:1]), "modules_to_save": [m.norm, m.embedding]}
    made = om.made(m, "lora", options, base, tmp_path / "a").module
    fold_checkpoint("a", {"a": made}, base, tmp_path / "out", dtype=dtype)
    zero, theta = weights(base), weights(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "pem.json").read_text())["certificate"]
    parts = {n: t for n, t in load(made).head_tensors().items() if not n.startswith("classifier")}
    assert len(parts) > 2
    for part, tensor in parts.items():
        lost = (theta[part].double() - tensor.double()).norm()
        expected = float(lost / (tensor.double() - zero[part].double()).norm())
        assert found["layers"][part] == pytest.approx(expected, rel=1e-6)
        assert (expected > 0) == (dtype != "float32")


@pytest.mark.parametrize(("text", "space"), [("log(a)", None), ("0.5*a", "log")])
def test_whole_models_have_no_logarithm(text: str, space: str | None, tmp_path: Path) -> None:
    for name in ("base", "a"):
        tiny("bert", seed=len(name)).save_pretrained(tmp_path / name)
    with pytest.raises(
        PEMError, match=r"a: log space multiplies \(IA\)\^3 vectors; found kind full"
    ):
        fold_checkpoint(
            text, {"a": tmp_path / "a"}, tmp_path / "base", tmp_path / "out", space=space
        )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_folded_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("gpt2")
    base = saved(model, tmp_path / "base")
    places = {
        "a": module_on(base, random_module(tiny("gpt2"), seed=1), tmp_path / "a"),
        "l": module_on(base, random_module(tiny("gpt2"), "ia3", seed=1), tmp_path / "l"),
        "f": tuned("gpt2", model, tmp_path / "f", 1),
        "other": tmp_path / "other",
    }
    random_module(tiny("llama"), seed=1).save(places["other"])
    for expression, options, words in (
        ("ties(a, f)", {}, r"several kinds; found a \(lora\) and f \(full\)"),
        ("a + ties(f, f)", {}, "pem merge --full_merge"),
        ("a + l", {"space": "parameter"}, "sums of updates only"),
        ("a", {"head": "concat"}, "unknown policy"),
        ("other", {"allow_base_mismatch": True}, "no weight of layer model.layers.0"),
        ("other", {}, "base model type differs"),
        ("a", {"dtype": "int8"}, "'int8'"),
        ('layers(f, "nothing", 2)', {}, "no layer of f matches"),
        ("a + b", {}, "no module named 'b'"),
    ):
        with pytest.raises(PEMError, match=words):
            fold_checkpoint(expression, places, base, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="column 4"):
        fold_checkpoint("a +", places, base, tmp_path / "out")


def test_a_value_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    model = tiny("gpt2")
    base = saved(model, tmp_path / "base")
    path = module_on(base, random_module(tiny("gpt2"), seed=1), tmp_path / "a")
    held = load_file(base / "model.safetensors")
    held["transformer.wpe.weight"][3, 4] = float("inf")
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PEMError, match=r"wpe\.weight' is not finite; found 1 NaN or inf"):
        fold_checkpoint("a", {"a": path}, base, tmp_path / "out", allow_base_mismatch=True)
    assert not (tmp_path / "out").exists()


def test_rebuild_notices_another_base(tmp_path: Path) -> None:
    base = saved(tiny("gpt2"), tmp_path / "base")
    path = module_on(base, random_module(tiny("gpt2"), seed=1), tmp_path / "a")
    fold_checkpoint("0.5*a", {"a": path}, base, tmp_path / "out")
    assert rebuild(tmp_path / "out").equal
    saved(tiny("gpt2", seed=5), base)
    with pytest.raises(PEMError, match="is not the base that it was made with"):
        rebuild(tmp_path / "out")
