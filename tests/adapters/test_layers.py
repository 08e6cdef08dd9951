"""LoraLinear and IA3Linear against their equations in float64, and the base bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pem_composition.adapters.ia3 import IA3Linear, IA3Vector
from pem_composition.adapters.layer import features, is_conv1d
from pem_composition.adapters.lora import LoraFactors, LoraLinear

D_IN, D_OUT, R = 5, 7, 3
BASES = ("linear", "linear without bias", "conv1d")


def base_layer(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    if kind == "conv1d":
        layer = Conv1D(D_OUT, D_IN)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    return nn.Linear(D_IN, D_OUT, bias=kind == "linear").to(dtype)


def dense(layer: nn.Module) -> tuple[Tensor, Tensor | float]:
    """Weight (d_out, d_in) and bias in float64."""
    weight = layer.weight.detach().double()
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return (weight.T if is_conv1d(layer) else weight), bias


def factors(seed: int, scaling: float = 1.5, **options: float) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(R, D_IN, generator=g), torch.randn(D_OUT, R, generator=g), scaling, **options
    )


def bits(tensor: Tensor) -> Tensor:
    """Bit patterns: unlike ``torch.equal`` they tell -0.0 from 0.0."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def some_x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, D_IN, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("kind", BASES)
def test_lora_computes_its_equation_for_several_modules_with_multipliers(kind: str) -> None:
    layer = LoraLinear(base_layer(kind))
    assert features(layer) == features(layer.base) == (D_IN, D_OUT)
    layer.add("a", factors(0, scaling=1.5))
    layer.add("b", factors(1, scaling=-0.25))
    layer.add("off", factors(2))
    layer.adapters["b"].multiplier = 0.6
    layer.adapters["off"].active = False
    W, b = dense(layer.base)
    for name, scaling in (("a", 1.5), ("b", 0.6 * -0.25)):
        adapter = layer.adapters[name]
        W = W + scaling * (adapter.lora_B.double() @ adapter.lora_A.double())
    expected = some_x().double() @ W.T + b
    torch.testing.assert_close(layer(some_x()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_ia3_scales_output_and_input_and_several_modules_multiply(kind: str) -> None:
    layer = IA3Linear(base_layer(kind))
    g = torch.Generator().manual_seed(4)
    l_out, l_in = torch.randn(D_OUT, generator=g), torch.randn(D_IN, generator=g)
    layer.add("out", IA3Vector(l_out))
    layer.add("half", IA3Vector(l_out.clone()))
    layer.adapters["half"].multiplier = 0.5
    layer.add("in", IA3Vector(l_in, scales_input=True))
    W, b = dense(layer.base)
    scale = l_out.double() * (1 + 0.5 * (l_out.double() - 1))
    expected = scale * ((some_x().double() * l_in.double()) @ W.T + b)
    torch.testing.assert_close(layer(some_x()).double(), expected, rtol=1e-5, atol=1e-5)


# A module narrower than its base would round the base's output; PEFT and we default to float32.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize(("base", "module"), DTYPES)
@pytest.mark.parametrize("kind", BASES)
def test_fresh_layers_are_the_base_bit_for_bit(
    kind: str, base: torch.dtype, module: torch.dtype
) -> None:
    layer, x = base_layer(kind, base), some_x(base)
    expected = layer(x)
    lora = LoraLinear(layer)
    lora.add(
        "a", LoraFactors(torch.randn(R, D_IN), torch.zeros(D_OUT, R), 2.0, dropout=0.5).to(module)
    )
    ia3 = IA3Linear(layer)
    ia3.add("a", IA3Vector(torch.ones(D_OUT, dtype=module)))
    ia3.add("b", IA3Vector(torch.ones(D_IN, dtype=module), scales_input=True))
    for wrapped in (lora, ia3):
        assert wrapped(x).dtype == base
        assert torch.equal(bits(wrapped(x)), bits(expected))


def test_a_float32_module_on_a_bfloat16_base_rounds_once() -> None:
    layer = LoraLinear(base_layer("linear", torch.bfloat16))
    layer.add("a", factors(0))
    x = some_x(torch.bfloat16)
    adapter = layer.adapters["a"]
    update = 1.5 * (x.double() @ adapter.lora_A.double().T) @ adapter.lora_B.double().T
    exact = layer.base(x).double() + update
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-5)


def test_dropout_acts_on_the_input_of_A_in_training_only() -> None:
    layer = LoraLinear(base_layer("linear").eval())
    layer.add("a", factors(0, dropout=0.5))
    x = some_x()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    adapter = layer.adapters["a"]
    expected = layer.base(x) + 1.5 * dropped @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_masked_entries_have_no_effect_and_no_gradient(kind: str) -> None:
    rows = torch.arange(D_OUT) >= 3
    if kind == "lora":
        layer: LoraLinear | IA3Linear = LoraLinear(base_layer("conv1d"))
        mask = rows[:, None].expand(D_OUT, R).float()
        free = factors(0)
        layer.add("a", LoraFactors(free.lora_A.detach(), free.lora_B.detach(), 1.0, mask=mask))
        parameter = layer.adapters["a"].lora_B
    else:
        layer = IA3Linear(base_layer("conv1d"))
        layer.add("a", IA3Vector(torch.full((D_OUT,), 3.0), mask=rows))
        parameter = layer.adapters["a"].ia3
    y = layer(some_x())
    y.square().sum().backward()
    assert torch.equal(y[..., ~rows], layer.base(some_x())[..., ~rows])
    assert parameter.grad[~rows].eq(0).all() and parameter.grad[rows].ne(0).all()


def test_the_wrapper_shows_the_base_layers_weight_and_survives_a_copy() -> None:
    base = base_layer("linear")
    layer = LoraLinear(base)
    layer.add("a", factors(0))
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(some_x()), layer(some_x()))
    assert twin.adapters["a"].lora_A is not layer.adapters["a"].lora_A


def test_rank_stabilised_scaling_is_alpha_over_root_r() -> None:
    from pem_composition.config import LoraConfig

    config = LoraConfig(r=4, alpha=6, target_modules=("q",), use_rslora=True)
    assert config.scaling("x.q") == 6 / math.sqrt(4)
