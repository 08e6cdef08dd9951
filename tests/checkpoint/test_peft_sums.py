"""Sums of modules as PEFT makes them, with options drawn at random, against dense float64."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
import peft
from support import one_meaning as om
from support.copies import Mould

from pem_composition import cli
from pem_composition.checkpoint import fold_checkpoint, load
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.config import is_head
from pem_composition.errors import PEMError
from pem_composition.module import combine, negate

Live = tuple[dict[str, Tensor], dict[str, Tensor]]  # updates of layers, parameters of copies


@functools.cache
def _base(name: str) -> Mould[nn.Module]:
    return Mould(copy.deepcopy(om.built(name)).double().eval())


def base_of(name: str) -> nn.Module:
    return _base(name)()


def live(model: nn.Module) -> Live:
    """What PEFT itself holds: the update of every layer, the parameters of every copy."""
    updates, saved = {}, {}
    for name, part in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if getattr(part, "lora_A", None):
            updates[name] = part.get_delta_weight("default").detach().clone()
        if type(part).__name__ == "ModulesToSaveWrapper":
            for key, value in part.modules_to_save["default"].state_dict().items():
                saved[f"{name}.{key}"] = value.detach().clone()
    return updates, saved


def made(name: str, folder: Path, seed: int, **options: Any) -> Live:
    """A module that PEFT writes, with values of its own in float64; what PEFT holds of it."""
    with om.quiet():
        adapted = peft.get_peft_model(base_of(name), peft.LoraConfig(**options)).eval()
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        adapted.save_pretrained(folder)
    return live(adapted)


def opened(name: str, folder: Path) -> Live:
    with om.quiet():
        return live(peft.PeftModel.from_pretrained(base_of(name), folder))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal but for layers that one of the two lacks and the other leaves alone."""
    for name in found.keys() | expected.keys():
        there = found.get(name), expected.get(name)
        some = next(t for t in there if t is not None)
        a, b = (torch.zeros_like(some) if t is None else t for t in there)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def options_of(draw: random.Random, m: om.Model) -> dict[str, Any]:
    """Ranks, scalings, patterns, targets and saved parts as people ask PEFT for them."""
    every = [*m.attention, *m.forward]
    targets = draw.sample(every, draw.randint(1, len(every)))
    numbered = rf".*\.1\..*{re.escape(targets[0])}"
    options: dict[str, Any] = {
        "r": draw.randint(1, 5), "lora_alpha": draw.choice([0.5, 2, 7.3, 16]),
        "use_rslora": draw.random() < 0.3,
        "target_modules": draw.choice([targets, targets, "|".join(rf".*{t}" for t in targets)]),
    }  # fmt: skip
    if draw.random() < 0.4:
        options["rank_pattern"] = {draw.choice([*targets, numbered]): draw.randint(1, 6)}
    if draw.random() < 0.4:
        options["alpha_pattern"] = {draw.choice([*targets, numbered]): draw.choice([1, 3, 10])}
    if isinstance(options["target_modules"], list) and draw.random() < 0.2:
        options["layers_to_transform"] = draw.choice([0, [1]])
    saved = [n for n in (m.head, m.norm, m.embedding) if n]
    if draw.random() < 0.5:
        options["modules_to_save"] = draw.sample(saved, draw.randint(1, 2))
    return options


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["roberta", "bert answers", "distilbert", "gpt2", "llama tied", "t5", "vit", "lfm2"]
)
def test_sums_are_those_of_the_updates_that_peft_holds(name: str, tmp_path: Path) -> None:
    """In delta space, whole and cut to a rank; saved parts are means with weights |c|."""
    m = om.BY_NAME[name]
    for seed in range(2):
        draw, root = random.Random(f"{name} {seed}"), tmp_path / str(seed)
        count = draw.randint(1, 3)
        parts = [made(name, root / str(i), i, **options_of(draw, m)) for i in range(count)]
        c = [draw.choice([1, 0, -1, 0.5, -0.4, draw.uniform(-2, 2)]) for _ in parts]
        modules = [load(root / str(i)) for i in range(count)]
        layers = {n for updates, _ in parts for n in updates}
        sums = {
            n: sum(k * u[n] for k, (u, _) in zip(c, parts, strict=True) if n in u) for n in layers
        }
        means = {}
        for n in {n for _, saved in parts for n in saved}:
            held = [(abs(k), s[n]) for k, (_, s) in zip(c, parts, strict=True) if n in s]
            total = sum(w for w, _ in held)
            if total or is_head(n):  # without weight the base's own stays, and heads have none
                means[n] = sum((w / total if total else 1 / len(held)) * t for w, t in held)
        combine(modules, c, space="delta").save(root / "sum")
        found = opened(name, root / "sum")
        same(found[0], sums)
        same(found[1], means)
        rank = draw.randint(1, 3)
        combine(modules, c, space="delta", rank=rank).save(root / "cut")
        best = {}
        for n, d in sums.items():
            U, S, Vh = torch.linalg.svd(d, full_matrices=False)
            best[n] = U[:, :rank] * S[:rank] @ Vh[:rank]
        same(opened(name, root / "cut")[0], best)
        negate(modules[0], 0.7).save(root / "minus")
        found = opened(name, root / "minus")
        same(found[0], {n: -0.7 * d for n, d in parts[0][0].items()})
        same(found[1], parts[0][1])


@pytest.mark.parametrize("name", ["distilbert", "bart classifier"])
def test_a_layer_saved_whole_by_one_and_adapted_by_another(name: str, tmp_path: Path) -> None:
    """PEFT has no such module. Both remedies are true: without the copy, and folded."""
    m = om.BY_NAME[name]
    assert m.head is not None
    saving = {"target_modules": [m.attention[0]], "modules_to_save": [m.head]}
    _, saved = made(name, tmp_path / "a", 1, **saving)
    updates, _ = made(name, tmp_path / "b", 2, target_modules="all-linear")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    total = combine([a, b], [1.0, 0.5], space="delta")
    with pytest.raises(PEMError, match=rf"both saved whole and adapted; found {m.head} saved"):
        total.save(tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    combine([a, b], [1.0, 0.5], space="delta", head="none").save(tmp_path / "sum")
    assert any(n.startswith(m.head) for n in opened(name, tmp_path / "sum")[0])
    base = om.base_folder(m, tmp_path)
    inputs = {"a": tmp_path / "a", "b": tmp_path / "b"}
    fold_checkpoint("a + 0.5*b", inputs, base, tmp_path / "folded", space="delta")
    state = om.opened(m, tmp_path / "folded").state_dict()
    for key, value in saved.items():
        layer = key.removesuffix(".weight")
        expected = value + (0.5 * updates[layer] if layer in updates else 0.0)
        torch.testing.assert_close(state[key].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("head", ["average", "first", "last"])
def test_a_decoder_saved_alone_and_within_its_layer(head: str, order: int, tmp_path: Path) -> None:
    """The bias that the output layer and its decoder share has one value, PEFT's."""
    for name, decoder, bias in [
        ("roberta mlm", "lm_head.decoder", "lm_head.bias"),
        ("bert mlm", "cls.predictions.decoder", "cls.predictions.bias"),
    ]:
        root = tmp_path / name
        parts = [decoder.split(".")[0], decoder][::order]
        first = [om.BY_NAME[name].attention[0]]
        saved = [
            made(name, root / p, i, target_modules=first, modules_to_save=[p])[1]
            for i, p in enumerate(parts)
        ]
        x, y = (s[f"{decoder}.bias"] for s in saved)
        expected = {"average": 0.25 * x + 0.75 * y, "first": x, "last": y}[head]
        operands = [load(root / p) for p in parts]
        combine(operands, [0.25, 0.75], space="delta", head=head).save(root / "sum")
        found = opened(name, root / "sum")[1]
        torch.testing.assert_close(found[f"{decoder}.bias"], expected)
        if bias in found:
            assert torch.equal(found[bias], found[f"{decoder}.bias"])
        stored = load(root / "sum").head_tensors()
        assert bias not in stored or torch.equal(stored[bias], stored[f"{decoder}.bias"])


@pytest.mark.parametrize(
    ("name", "saved", "inner"),
    [
        ("roberta", ["classifier", "out_proj"], "classifier.out_proj"),
        ("roberta", ["encoder.layer.1", "output"], "roberta.encoder.layer.1.output"),
        ("modernbert", ["head", "dense", "classifier"], "head.dense"),
        ("bert mlm", ["cls", "LayerNorm"], None),  # deeper inside: keys of the wrapper itself
    ],
)
def test_parts_saved_inside_each_other_are_refused(
    name: str, saved: list[str], inner: str | None, tmp_path: Path
) -> None:
    """PEFT's file holds a copy of the inner part that its own model did not use."""
    m = om.BY_NAME[name]
    base = om.base_folder(m, tmp_path)
    options = {"target_modules": [m.attention[0]], "modules_to_save": saved}
    wrote = om.made(m, "lora", options, base, tmp_path / "a")
    with pytest.raises(KeyError):
        wrote.peft(tmp_path / "a")
    outer = inner.rpartition(".")[0] if inner else saved[0]
    words = rf"names {inner} and {outer}.*again with {outer} alone"
    with pytest.raises(
        PEMError, match=words if inner else "in each other, train with the outer ones alone"
    ):
        load(tmp_path / "a")
    options["modules_to_save"] = [outer]  # as the remedy says
    wrote = om.made(m, "lora", options, base, tmp_path / "b")
    found = om.way_attach(wrote, tmp_path)
    torch.testing.assert_close(found, wrote.want, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    """PEFT writes it into a subfolder, which the parent leads to as long as it is alone."""
    m = om.BY_NAME["bert mlm"]
    model = base_of(m.name)
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["cls"], r=2)
    with om.quiet():
        adapted = peft.get_peft_model(model, config, adapter_name="style").eval()
        with torch.no_grad():
            for i, p in enumerate(q for q in adapted.parameters() if q.requires_grad):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        adapted.save_pretrained(tmp_path / "a")
    want = om.output(adapted, m.inputs)
    for place in (tmp_path / "a", tmp_path / "a" / "style"):
        out = tmp_path / f"from-{place.name}"
        combine([load(place)], [1.0], space="delta").save(out)
        with om.quiet():
            again = peft.PeftModel.from_pretrained(base_of(m.name), out).eval()
        torch.testing.assert_close(om.output(again, m.inputs), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "output.dense"], "rank_pattern": {"query": 3}},
        {"target_modules": r".*\.1\..*query", "use_rslora": True},
        {"target_modules": ["encoder.layer.0.attention.self.query"], "alpha_pattern": {"query": 3}},
        {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
    ],
)
def test_the_remedy_for_two_names_of_a_layer_is_true(options: Any, tmp_path: Path) -> None:
    """One module of a bare model, one of a classifier: what the message asks for adds them up."""
    bare = made("roberta bare", tmp_path / "b", 1, r=2, **options)
    whole = made("roberta", tmp_path / "a", 2, r=2, target_modules=["query", "output.dense"])
    load(tmp_path / "b").save(tmp_path / "ours")  # with a record of its own
    for source in ("b", "ours"):
        with pytest.raises(PEMError, match="in two ways") as error:
            combine([load(tmp_path / "a"), load(tmp_path / source)], [1.0, -0.5], space="delta")
        words = re.search(r"\(pem (convert IN OUT .*)\)", str(error.value))
        assert words
        there = {"IN": str(tmp_path / source), "OUT": str(tmp_path / f"{source}-named")}
        assert cli.main([there.get(w, w) for w in words[1].split()]) == 0
        named = load(there["OUT"])
        assert rebuild(there["OUT"]).equal
        combine([load(tmp_path / "a"), named], [1.0, -0.5], space="delta").save(
            tmp_path / "sum", overwrite=True
        )
        updates, saved = opened("roberta", tmp_path / "sum")
        expected = dict(whole[0])
        for layer, update in bare[0].items():
            name = f"roberta.{layer}"
            expected[name] = expected.get(name, torch.zeros_like(update)) - 0.5 * update
        same(updates, expected)
        same(saved, {f"roberta.{n}": t for n, t in bare[1].items()})


def test_a_vector_is_renamed_with_its_side(tmp_path: Path) -> None:
    m = om.BY_NAME["roberta bare"]
    config = peft.IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]
    )
    with om.quiet():
        adapted = peft.get_peft_model(base_of(m.name), config).eval()
        with torch.no_grad():
            for i, p in enumerate(q for q in adapted.parameters() if q.requires_grad):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        adapted.save_pretrained(tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "named", prefix="roberta")
    module = load(tmp_path / "named")
    model = base_of("roberta")
    with om.quiet():
        again = peft.PeftModel.from_pretrained(model, tmp_path / "named").eval()
    hidden = again.base_model.model.roberta(**om.inputs(m.inputs)).last_hidden_state
    own = base_of("roberta")
    bare = base_of(m.name)
    bare.load_state_dict(own.roberta.state_dict(), strict=False)
    with om.quiet():
        alone = peft.PeftModel.from_pretrained(bare, tmp_path / "b").eval()
    want = alone(**om.inputs(m.inputs)).last_hidden_state
    torch.testing.assert_close(hidden, want, rtol=1e-9, atol=1e-9)
    assert all(n.startswith("roberta.encoder.") for n in module.layers)


@pytest.mark.parametrize("prefix", ["", "a b", "../x", "roberta.", "é"])
def test_a_prefix_is_a_name(prefix: str, tmp_path: Path) -> None:
    made("roberta bare", tmp_path / "b", 1, r=2, target_modules=["query"])
    with pytest.raises(PEMError, match="--prefix: no name of a module"):
        convert(tmp_path / "b", tmp_path / "out", prefix=prefix)
    assert not (tmp_path / "out").exists()
