"""Folding: attached and folded logits agree, swaps do not drift, restore is exact."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import EACH, logits_of, random_module, tiny
from torch import Tensor, nn

from pem_composition.adapters import attach, attach_fresh, extract, fold
from pem_composition.config import FullConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@torch.no_grad()
def scored(model: nn.Module) -> Tensor:
    """Logits without autograd: torch picks other kernels where a gradient is wanted."""
    return logits_of(model)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of state dict entries that are not bit for bit what they were."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {n for n, t in before.items() if not torch.equal(after[n], t)}


@pytest.mark.parametrize("placement", ["peft", "reference"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", EACH)
def test_folded_equals_attached_and_restore_is_bit_for_bit(
    name: str, kind: str, placement: str
) -> None:
    model = tiny(name)
    module = random_module(model, kind, seed=1, placement=placement, head_seed=3)
    with attach(model, module):
        expected = scored(model)
    before = state(model)
    with fold(model, module):
        torch.testing.assert_close(scored(model), expected, **CLOSE)
        owners = {n.rpartition(".")[0] for n in changed(model, before)}
        heads = {n.rpartition(".")[0] for n in module.head_tensors()}
        assert owners == set(module.layers) | heads
    assert changed(model, before) == set()
    assert fold(model, module, permanent=True) is None
    torch.testing.assert_close(scored(model), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_thousand_swaps_do_not_drift(kind: str) -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    a, b = (random_module(tiny("gpt2"), kind, seed=s) for s in (1, 2))
    before = state(model)
    folded = fold(model, a)
    first = state(model)
    for _ in range(500):
        folded.swap(b)
        folded.swap(a)
    assert changed(model, first) == set()
    folded.restore()
    folded.restore()
    assert changed(model, before) == set()


def test_folds_stack_and_come_off_in_any_order() -> None:
    model = tiny("roberta")
    a = random_module(model, seed=1)
    b = random_module(model, "ia3", seed=2)
    before = state(model)
    with attach(model, a, head="ignore"):
        alone = scored(model)
    first, second = fold(model, a, head="ignore"), fold(model, b, head="ignore")
    assert not torch.allclose(scored(model), alone, atol=1e-3)
    with pytest.raises(PEMError, match="restore them first"):
        fold(model, a, permanent=True)
    second.restore()
    torch.testing.assert_close(scored(model), alone, **CLOSE)
    second = fold(model, b, head="ignore")
    first.restore()
    second.restore()
    assert changed(model, before) == set()


def test_a_module_can_be_attached_to_a_model_with_another_one_folded() -> None:
    model = tiny("llama")
    a, b = (random_module(model, seed=s) for s in (1, 2))
    with attach(model, a, name="a"), attach(model, b, name="b"):
        expected = scored(model)
    before = state(model)
    with attach(model, a), fold(model, b):
        torch.testing.assert_close(scored(model), expected, **CLOSE)
    assert changed(model, before) == set()


def delta_module(model: nn.Module, seed: int = 0, head: bool = False) -> PEM:
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, _ in model.named_parameters() if head or "classifier" not in n]
    tensors = {
        f"{n}.delta": 0.05 * torch.randn(model.get_parameter(n).shape, generator=generator)
        for n in names
    }
    return PEM(tensors, FullConfig())


@pytest.mark.parametrize("name", EACH)
def test_a_full_module_adds_its_delta_to_every_parameter(name: str) -> None:
    model, tuned = tiny(name), tiny(name)
    module = delta_module(model, seed=1, head=True)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            p.add_(module.tensors[f"{n}.delta"])
    before = state(model)
    with attach(model, module) as attachment:
        assert torch.equal(scored(model), scored(tuned))
        attachment.swap(delta_module(model, seed=2, head=True))
        assert not torch.equal(scored(model), scored(tuned))
        attachment.swap(module)
        assert torch.equal(scored(model), scored(tuned))
        assert all(torch.equal(extract(model).tensors[n], t) for n, t in module.tensors.items())
    assert changed(model, before) == set()


def test_a_full_module_of_another_head_class_fits_by_prefix_and_ties_are_added_once() -> None:
    whole = tiny("gpt2")
    bare = whole.transformer
    module = delta_module(bare, seed=1)
    tied = PEM(
        {**{f"transformer.{n}": t for n, t in module.tensors.items()},
         "lm_head.weight.delta": module.tensors["wte.weight.delta"]}, FullConfig(),
    )  # fmt: skip
    with fold(whole, tied):
        expected = scored(whole)
    apart = PEM({**tied.tensors, "lm_head.weight.delta": torch.ones(96, 32)}, FullConfig())
    embedding, before = whole.lm_head.weight, whole.lm_head.weight.detach().clone()
    with fold(whole, apart):
        torch.testing.assert_close(whole.lm_head.weight.detach(), before + 1)
        added = before + module.tensors["wte.weight.delta"]
        torch.testing.assert_close(bare.wte.weight.detach(), added)
    assert whole.lm_head.weight is embedding is bare.wte.weight
    with pytest.raises(IncompatibleModules, match="is tied, and the module changes its names"):
        attach(whole, apart, trainable=True)
    assert torch.equal(embedding, before)
    with fold(bare, module):
        torch.testing.assert_close(scored(whole), expected, rtol=0, atol=0)
    resized = PEM({"wte.weight.delta": torch.ones(90, 32)}, FullConfig())
    with pytest.raises(IncompatibleModules, match=r"\(90, 32\) in the module, expected \(96, 32\)"):
        fold(bare, resized)
    with pytest.raises(IncompatibleModules, match=r"parameter wpe\.bias: not in GPT2Model"):
        fold(bare, PEM({"wpe.bias.delta": torch.ones(2)}, FullConfig()))


@pytest.mark.parametrize("name", ["roberta", "t5", "gpt2", "llama"])
def test_full_fine_tuning_extracts_the_difference_to_the_base(name: str) -> None:
    model = tiny(name)
    before = state(model)
    attachment = attach_fresh(model, FullConfig())
    assert all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(attachment.parameters(), lr=1e-2)
    logits_of(model).square().mean().backward()
    optimizer.step()
    logits, module = scored(model), attachment.extract()
    n = next(iter(module.adapter_tensors())).removesuffix(".delta")
    assert torch.equal(module.tensors[f"{n}.delta"], model.get_parameter(n).detach() - before[n])
    attachment.detach()
    assert changed(model, before) == set()
    with attach(model, module):
        torch.testing.assert_close(scored(model), logits, rtol=1e-5, atol=1e-6)
    with attach(model, module, trainable=True) as again:
        torch.testing.assert_close(scored(model), logits, rtol=1e-5, atol=1e-6)
        again.swap(module)
        assert again.extract().tensors.keys() == module.tensors.keys()
    assert changed(model, before) == set()


def test_folding_into_a_tied_weight_changes_the_named_layer_alone() -> None:
    model = tiny("gpt2")
    module = random_module(model, target_modules=("lm_head",))
    base, embedding = scored(model), model.lm_head.weight
    before = embedding.detach().clone()
    with attach(model, module):
        expected = scored(model)
    assert not torch.allclose(expected, base)
    first, second = fold(model, module), fold(model, module)
    first.restore()
    torch.testing.assert_close(scored(model), expected, **CLOSE)
    assert torch.equal(model.transformer.wte.weight, before)
    second.restore()
    assert model.lm_head.weight is embedding is model.transformer.wte.weight
    assert torch.equal(scored(model), base)
    assert fold(model, module, permanent=True) is None
    torch.testing.assert_close(scored(model), expected, **CLOSE)
    assert torch.equal(embedding, before)


def test_a_layer_that_computes_its_weight_is_refused_by_name():
    model = tiny("roberta")
    module = random_module(model, "lora")
    layer = model.get_submodule(module.layers[0])
    torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(IncompatibleModules, match=f"layer {module.layers[0]}: computes its weight"):
        fold(model, module)
