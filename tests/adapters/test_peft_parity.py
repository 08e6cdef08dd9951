"""Logits and gradients equal PEFT's for the same numbers, to float32 rounding."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import pytest
import torch
from support.tiny_models import inputs_for, logits_of, tiny
from torch import Tensor, nn

from pem_composition.adapters import Attachment, attach, fresh_module, resolve_targets
from pem_composition.config import IA3Config, LoraConfig
from pem_composition.module import PEM

NAMES = ("roberta", "t5", "t5-gated", "gpt2", "llama")
LORA_TARGETS = {
    "roberta": ["query", "value"],
    "t5": ["q", "v"],
    "t5-gated": ["q", "v"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}


def randomised(model: nn.Module, config: LoraConfig | IA3Config) -> PEM:
    """A module with random numbers in every tensor, the model's own head left out."""
    module = fresh_module(model, config, seed=1, head_names=())
    generator = torch.Generator().manual_seed(2)
    tensors = {
        n: (1.0 if n.endswith("ia3") else 0.0) + 0.2 * torch.randn(t.shape, generator=generator)
        for n, t in module.tensors.items()
    }
    return PEM(tensors, config)


def in_peft(model: nn.Module, config: object, module: PEM) -> nn.Module:
    """PEFT's model holding the same numbers; every adapter tensor of PEFT's gets one of ours."""
    held = peft.get_peft_model(model, config)
    suffixes = {
        "lora_A": ".lora_A.default.weight",
        "lora_B": ".lora_B.default.weight",
        "ia3": ".ia3_l.default",
    }
    parameters = dict(held.named_parameters())
    written = set()
    for name, tensor in module.tensors.items():
        layer, _, role = name.rpartition(".")
        key = f"base_model.model.{layer}{suffixes[role]}"
        with torch.no_grad():
            parameters[key].copy_(tensor.reshape(parameters[key].shape))
        written.add(key)
    assert written == {n for n, p in parameters.items() if p.requires_grad}
    return held


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"], autouse=True)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Every comparison is made twice: the equations (1e-10) and the float32 rounding (2e-4)."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def compare(name: str, module: PEM, config: object) -> None:
    dtype = torch.get_default_dtype()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    ours, theirs = tiny(name), in_peft(tiny(name), config, module)
    batch = inputs_for(ours)
    attachment = attach(ours, module, trainable=True)
    logits, expected = logits_of(ours, batch), theirs(**batch).logits
    assert logits.dtype == expected.dtype == dtype
    assert error(logits, expected) < tolerance
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    mine = {n: p.grad for n, p in _ours(attachment).items()}
    for peft_name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            gradient = mine.pop(_canonical(peft_name))
            assert gradient.norm() > 0
            assert error(gradient, parameter.grad.reshape(gradient.shape)) < tolerance, peft_name
    assert not mine


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float(((found - expected).norm() / expected.norm()).detach())


def _ours(attachment: Attachment) -> dict[str, Tensor]:
    """Canonical name -> live parameter."""
    shares = zip(attachment.pem.layers, attachment.layers, strict=True)
    return {f"{n}.{role}": p for n, share in shares for role, p in share.named_parameters()}


def _canonical(peft_name: str) -> str:
    name = peft_name.removeprefix("base_model.model.").replace(".default", "")
    return name.replace(".weight", "").replace(".ia3_l", ".ia3")


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_logits_and_gradients_equal_pefts(name: str, rslora: bool) -> None:
    model = tiny(name)
    targets = LORA_TARGETS[name]
    config = LoraConfig(r=4, alpha=7, target_modules=tuple(targets), use_rslora=rslora)
    theirs = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, use_rslora=rslora, fan_in_fan_out=name == "gpt2"
    )
    compare(name, randomised(model, config), theirs)


@pytest.mark.parametrize("placement", ["peft", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_ia3_logits_and_gradients_equal_pefts_in_both_placements(name: str, placement: str) -> None:
    """The reference placement in PEFT's terms: output scaling, no feedforward_modules."""
    model = tiny(name)
    targets = resolve_targets(model, "ia3", placement=placement)
    config = IA3Config(targets.target_modules, targets.feedforward_modules)
    theirs = peft.IA3Config(
        target_modules=list(targets.target_modules),
        feedforward_modules=list(targets.feedforward_modules),
        fan_in_fan_out=name == "gpt2",
    )
    compare(name, randomised(model, config), theirs)


def test_pefts_ambiguous_roberta_target_attaches_to_both_layers_it_names() -> None:
    """PEFT's ``output.dense`` also scales attention.output.dense; when told to, so do we."""
    config = IA3Config(("key", "value", "output.dense"), ("output.dense",))
    theirs = peft.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    )
    module = randomised(tiny("roberta"), config)
    assert any("attention.output.dense" in n for n in module.layers)
    compare("roberta", module, theirs)


def test_patterns_of_rank_and_alpha_mean_what_they_mean_in_peft() -> None:
    ranks, alphas = {"layer.0.attention.self.query": 2}, {"layer.1.attention.self.value": 3}
    config = LoraConfig(
        r=4, alpha=8, target_modules=("query", "value"), rank_pattern=ranks, alpha_pattern=alphas
    )
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    compare("roberta", randomised(tiny("roberta"), config), theirs)
