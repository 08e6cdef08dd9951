"""Laws of attach, detach, swap and extract on every tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_modules import dense
from support.tiny_models import EACH, inputs_for, logits_of, random_module, tiny
from torch import Tensor, nn
from transformers import RobertaModel

from pem_composition.adapters import (
    attach,
    attach_fresh,
    attached,
    detach,
    extract,
    fold,
    fresh_module,
    resolve_targets,
    set_active,
    set_multiplier,
)
from pem_composition.config import BaseIdentity, IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import PEM, combine

KINDS = ("lora", "ia3")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@torch.no_grad()
def scored(model: nn.Module) -> Tensor:
    """Logits without autograd: torch picks other kernels where a gradient is wanted."""
    return logits_of(model)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Asserts that module types, weights (bit for bit) and flags are the same afterwards."""
    types = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = state(model)
    yield
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(bits(after[n]), bits(t)) for n, t in before.items() if t.is_floating_point()
    )


def fresh(model: nn.Module, kind: str, placement: str = "peft", **options: object):
    targets = resolve_targets(model, kind, placement=placement)
    if kind == "lora":
        config = LoraConfig(r=4, alpha=6, target_modules=targets.target_modules, **options)
    else:
        config = IA3Config(targets.target_modules, targets.feedforward_modules)
    return attach_fresh(model, config, seed=7, blocks=targets.blocks)


@pytest.mark.parametrize("placement", ["peft", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EACH)
def test_a_fresh_module_is_the_base_bit_for_bit_and_leaves_no_trace(
    name: str, kind: str, placement: str
) -> None:
    model = tiny(name)
    base = scored(model)
    with untouched(model):
        with fresh(model, kind, placement) as attachment:
            assert torch.equal(bits(scored(model)), bits(base))
            trained = {id(p) for p in attachment.parameters()}
            assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
            model.train()
            logits_of(model).square().sum().backward()
            assert all(p.grad is not None for p in attachment.parameters())
            assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
        model.eval()
    assert torch.equal(bits(scored(model)), bits(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EACH)
def test_attach_then_extract_returns_the_module_and_detach_the_base(name: str, kind: str) -> None:
    model = tiny(name)
    base = scored(model)
    module = random_module(model, kind, seed=1, head_seed=5)
    with untouched(model), attach(model, module):
        changed = scored(model)
        out = extract(model)
    assert not torch.allclose(changed, base, atol=1e-3)
    assert torch.equal(scored(model), base)
    assert out.tensors.keys() == module.tensors.keys()
    assert all(torch.equal(out.tensors[n], t) for n, t in module.tensors.items())
    assert (out.config, out.base, out.head) == (module.config, module.base, module.head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["roberta", "t5", "gpt2", "llama"])
def test_swap_equals_a_fresh_attach_in_place_and_with_another_rank(name: str, kind: str) -> None:
    model = tiny(name)
    a = random_module(model, kind, seed=1, head_seed=1)
    b = random_module(model, kind, seed=2, head_seed=2)
    others = [b]
    if kind == "lora":
        others.append(random_module(model, kind, seed=3, r=2, alpha=5, use_rslora=True))
    with untouched(model):
        with attach(model, a) as attachment:
            for other in others:
                before = attachment.parameters()
                attachment.swap(other)
                got = scored(model)
                same = other.layers == a.layers and other.config == a.config
                assert same == all(
                    p is q for p, q in zip(attachment.parameters(), before, strict=True)
                )
                twin = tiny(name)
                with attach(twin, other):
                    assert torch.equal(got, scored(twin))
            attachment.swap(a)
            first = scored(model)
        with attach(model, a):
            assert torch.equal(first, scored(model))


@pytest.mark.parametrize("name", ["roberta", "t5", "gpt2", "llama"])
def test_lora_modules_held_at_once_equal_their_delta_space_sum(name: str) -> None:
    model = tiny(name)
    a = random_module(model, seed=1)
    b = random_module(model, seed=2, r=2, alpha=5)
    exact = combine([a, b], [0.7, -1.3], space="delta", head="none")
    with untouched(model):
        attach(model, a, name="a", head="ignore")
        attach(model, b, name="b", head="ignore")
        set_multiplier(model, "a", 0.7)
        set_multiplier(model, "b", -1.3)
        both = scored(model)
        set_active(model, "b")
        only_b = scored(model)
        detach(model, "a")
        assert torch.equal(only_b, scored(model))
        detach(model)
    with attach(model, exact, head="ignore"):
        torch.testing.assert_close(scored(model), both, **CLOSE)
    with attach(model, combine([b], [-1.3], space="delta"), head="ignore"):
        torch.testing.assert_close(scored(model), only_b, **CLOSE)


def test_ia3_modules_held_at_once_multiply() -> None:
    model = tiny("llama")
    a, b = (random_module(model, "ia3", seed=s) for s in (1, 2))
    product = PEM({n: t * b.tensors[n] for n, t in a.tensors.items()}, a.config)
    with attach(model, a, name="type"), attach(model, b, name="rte-1"):
        assert list(attached(model)) == ["type", "rte-1"]
        both = scored(model)
    with attach(model, product):
        torch.testing.assert_close(scored(model), both, **CLOSE)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_modules_can_be_detached_in_any_order(order: tuple[int, int]) -> None:
    model = tiny("roberta")
    with untouched(model):
        held = [
            fresh(model, "lora"),
            attach(model, random_module(model, seed=2), name="b", head="ignore"),
        ]
        for i in order:
            held[i].detach()
            held[i].detach()
        assert attached(model) == {}


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_a_module_fits_the_model_with_and_without_its_task_head(name: str) -> None:
    """Names gain or lose the base model's prefix; hidden states are the same either way."""
    whole = tiny(name)
    bare = getattr(whole, whole.base_model_prefix)
    module = random_module(whole, seed=1)
    batch = inputs_for(whole)
    with attach(whole, module, head="ignore"):
        expected = whole(**batch, output_hidden_states=True).hidden_states[-1]
    with attach(bare, module, head="ignore") as attachment:
        assert torch.equal(bare(**batch).last_hidden_state, expected)
        stripped = random_module(bare, seed=1)
        assert attachment.extract().layers == module.layers
    assert stripped.layers == tuple(
        n.removeprefix(whole.base_model_prefix + ".") for n in module.layers
    )
    with attach(whole, stripped):
        again = whole(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_trained_module_extracts_what_was_trained_and_keeps_its_identity() -> None:
    model = tiny("roberta")
    identity = BaseIdentity("roberta-base", "f" * 64, "roberta", 768)
    targets = resolve_targets(model)
    config = LoraConfig(r=4, alpha=6, target_modules=targets.target_modules, dropout=0.1)
    of_class = replace(config, extra={"task_type": "SEQ_CLS"})
    with untouched(model):
        attachment = attach_fresh(model, config, seed=0, base=identity)
        start = attachment.extract()
        optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits_of(model), torch.tensor([0, 2])).backward()
            optimizer.step()
        model.eval()
        trained, logits = extract(model, name="default"), scored(model)
        detach(model)
    assert trained.base == identity and trained.config == of_class
    assert trained.head is not None and trained.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert set(trained.head_tensors()) == {
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    }
    assert all(not torch.equal(trained.tensors[n], t) for n, t in start.tensors.items())
    with attach(model, trained):
        assert torch.equal(scored(model), logits)


@pytest.mark.parametrize("name", EACH)
def test_modules_that_keep_their_common_a_have_one_sum_in_both_spaces(name: str) -> None:
    """sum_t w_t B_t A = (sum_t w_t B_t) (sum_t w_t A), sum_t w_t = 1; a frozen A keeps its bits."""
    model = tiny(name)
    targets = resolve_targets(model, "lora")
    config = LoraConfig(r=4, alpha=8, target_modules=targets.target_modules)
    start = fresh_module(model, config, seed=0, blocks=targets.blocks)
    trained = []
    for sign in (1, -1):
        kept = {"trainable": True, "blocks": targets.blocks, "frozen": "lora_A"}
        with attach(model, start, **kept) as attachment:
            optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2, weight_decay=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                (sign * logits_of(model).square().mean()).backward()
                optimizer.step()
            trained.append(attachment.extract())
    first = [n for n in start.tensors if n.endswith(".lora_A")]
    assert all(
        torch.equal(bits(m.tensors[n]), bits(start.tensors[n])) for m in trained for n in first
    )
    tensors, exact = (combine(trained, [0.7, 0.3], space=s) for s in ("parameter", "delta"))
    for layer in start.layers:
        expected = dense(exact, layer)
        np.testing.assert_allclose(dense(tensors, layer), expected, rtol=1e-4, atol=1e-7)
        assert expected.any()


def test_a_frozen_factor_must_leave_something_to_learn() -> None:
    model = tiny("llama")
    targets = resolve_targets(model, "lora")
    config = LoraConfig(r=4, alpha=8, target_modules=targets.target_modules)
    start = fresh_module(model, config, seed=0, blocks=targets.blocks)
    with pytest.raises(IncompatibleModules, match="would not learn: its lora_B is zero"):
        attach(model, start, trainable=True, frozen="lora_B")
    vectors = random_module(model, "ia3", seed=1)
    with pytest.raises(IncompatibleModules, match="has no lora_A to leave as it is; found ia3"):
        attach(model, vectors, trainable=True, frozen="lora_A")
    with pytest.raises(PEMError, match=r"not trained, so that lora_A stays.*trainable=True"):
        attach(model, start, frozen="lora_A")
    assert not attached(model)
    learned = random_module(model, seed=1)
    with attach(model, learned, trainable=True, frozen="lora_B") as attachment:
        for other, said in ((start, "would not learn"), (vectors, "has no lora_B")):
            with pytest.raises(IncompatibleModules, match=said):
                attachment.swap(other)
        kept = attachment.extract()
        assert all(torch.equal(kept.tensors[n], t) for n, t in learned.tensors.items())
        attachment.swap(random_module(model, seed=2, r=6))
        assert {p.shape[0] for p in attachment.parameters()} == {6}, "every A, and no B"
        assert all(p.requires_grad for p in attachment.parameters())


def test_equal_seeds_give_equal_modules_and_leave_the_global_generator_alone() -> None:
    model = tiny("bert")
    config = LoraConfig(r=3, alpha=3, target_modules=("query", "value"))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = (fresh_module(model, config, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    name = "bert.encoder.layer.1.attention.self.value.lora_A"
    assert torch.equal(a.tensors[name], b.tensors[name])
    assert not torch.equal(a.tensors[name], c.tensors[name])
    assert a.tensors[name].abs().max() <= 32**-0.5


@pytest.mark.parametrize("rslora", [False, True])
def test_query_and_value_blocks_of_a_fused_layer_train_alone(rslora: bool) -> None:
    """GPT-2 as the reference code adapts it: independent q and v factors, k untouched."""
    model = tiny("gpt2")
    targets = resolve_targets(model, "lora", placement="reference")
    config = LoraConfig(r=4, alpha=6, target_modules=targets.target_modules, use_rslora=rslora)
    attachment = attach_fresh(model, config, seed=0, blocks=targets.blocks)
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits_of(model).square().mean().backward()
        optimizer.step()
    module, logits = attachment.extract(), scored(model)
    layer = "transformer.h.1.attn.c_attn"
    A, B = module.tensors[f"{layer}.lora_A"], module.tensors[f"{layer}.lora_B"]
    assert A.shape == (8, 32) and B.shape == (96, 8)
    assert module.config.scaling(layer) == pytest.approx(config.scaling(layer))
    blocks = B.reshape(3, 32, 2, 4)  # part, row, block, rank
    assert blocks[1].eq(0).all() and blocks[0, :, 1].eq(0).all() and blocks[2, :, 0].eq(0).all()
    assert blocks[0, :, 0].ne(0).all() and blocks[2, :, 1].ne(0).all()
    attachment.detach()
    with attach(model, module):
        assert torch.equal(scored(model), logits)
    with attach(model, module, trainable=True, blocks=targets.blocks):
        assert torch.equal(scored(model), logits)
    plain = random_module(model, seed=1)
    with pytest.raises(
        IncompatibleModules, match=r"outside its blocks; found \d+ entries that are not 0"
    ):
        attach(model, plain, trainable=True, blocks=targets.blocks)


def test_fused_blocks_among_other_layers_keep_every_scaling() -> None:
    model = tiny("gpt2")
    config = LoraConfig(r=4, alpha=6, target_modules=("c_attn", "mlp.c_fc"))
    module = fresh_module(model, config, seed=0, blocks={"c_attn": ("q", "v")})
    for layer, rank in (("transformer.h.0.attn.c_attn", 8), ("transformer.h.0.mlp.c_fc", 4)):
        assert module.config.rank(layer) == rank == module.tensors[f"{layer}.lora_A"].shape[0]
        assert module.config.scaling(layer) == 1.5
    with attach(model, module):
        pass


def test_fused_ia3_keeps_the_query_part_at_one_under_weight_decay() -> None:
    model = tiny("gpt2")
    attachment = fresh(model, "ia3")
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2, weight_decay=0.5)
    logits_of(model).square().mean().backward()
    optimizer.step()
    vector = attachment.extract().tensors["transformer.h.0.attn.c_attn.ia3"]
    assert vector.shape == (96,) and vector[:32].eq(1).all() and vector[32:].ne(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["roberta", "t5", "gpt2", "llama"])
def test_a_float32_module_works_on_a_half_precision_base(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    exact, model = tiny(name), tiny(name).to(dtype)
    base = scored(model)
    with fresh(model, kind):
        assert torch.equal(scored(model), base)
    module = random_module(exact, kind, seed=1)
    with attach(exact, module, head="ignore"):
        expected = scored(exact)
    with attach(model, module, head="ignore", trainable=True) as attachment:
        got = logits_of(model)
        got.float().square().mean().backward()
        assert got.dtype == dtype
        assert all(p.dtype == torch.float32 and p.grad is not None for p in attachment.parameters())
        out = attachment.extract()
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    assert all(torch.equal(out.tensors[n], t) for n, t in module.adapter_tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_on_a_float32_base_gives_gradients_in_float32(kind: str) -> None:
    model = tiny("roberta")
    module = random_module(model, kind, seed=1)
    with attach(model, module):
        expected = scored(model)
    attachment = attach(model, module, trainable=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits_of(model)
    got.float().square().mean().backward()
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in attachment.parameters()
    )


def test_a_fresh_head_on_a_bfloat16_base_is_a_float32_module_that_changes_nothing() -> None:
    model = tiny("roberta").to(torch.bfloat16)
    base = scored(model)
    with fresh(model, "lora") as attachment:
        assert torch.equal(scored(model), base)
        assert {t.dtype for t in attachment.extract().tensors.values()} == {torch.float32}


def checkpoint_activations(model: nn.Module) -> None:
    """As the trainer does it; the method's name changed within transformers 5."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


@pytest.mark.parametrize("early", [False, True], ids=["after attaching", "before attaching"])
@pytest.mark.parametrize("name", ["roberta", "deberta-v3", "bart", "t5", "gpt2", "llama"])
def test_gradients_with_and_without_checkpointing_are_equal(name: str, early: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = tiny(name)
        if checkpointing and early:
            checkpoint_activations(model)
        module = random_module(model, seed=1, dropout=0.2)
        attachment = attach(model, module, trainable=True)
        if checkpointing and not early:
            checkpoint_activations(model)
        model.train()  # dropout on: a checkpoint replays the random numbers of its forward pass
        torch.manual_seed(0)
        logits_of(model).square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert len(grads) == len(attachment.parameters())
        return grads

    plain, saved = gradients(False), gradients(True)
    for n, gradient in plain.items():
        torch.testing.assert_close(saved[n], gradient, rtol=1e-5, atol=1e-7, msg=n)


def test_names_layers_shapes_and_kinds_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model, wide = tiny("roberta"), tiny("roberta")
    module = random_module(model, seed=1)
    wide.config.model_type = "roberta"
    name = "roberta.encoder.layer.0.attention.self.query"
    narrow = PEM(
        {n: t[:, :30] if n.endswith("lora_A") else t for n, t in module.tensors.items()},
        module.config,
    )
    alien = PEM({"bert.encoder.layer.9.q.lora_A": torch.ones(4, 32)}, module.config)
    wrong_rank = PEM(module.tensors, LoraConfig(r=8, alpha=8, target_modules=("query", "value")))
    faults = {
        r"query.*\(4, 30\) in the module, expected \(4, 32\) for a layer 32 -> 32": narrow,
        r"bert.encoder.layer.9.q: not in RobertaForSequence.*self\.query.*base model": alien,
        r"\(4, 32\) in the module, expected \(8, 32\)": wrong_rank,
        r"found t5 module, expected roberta": random_module(tiny("t5")),
    }
    with untouched(model):
        for message, fault in faults.items():
            with pytest.raises(IncompatibleModules, match=message):
                attach(model, fault)
        with attach(model, module):
            with pytest.raises(PEMError, match="already holds one of that name; detach it"):
                attach(model, module)
            with pytest.raises(IncompatibleModules, match="two attached modules bring a head"):
                attach(model, module, name="b")
            ia3 = random_module(model, "ia3")
            with pytest.raises(IncompatibleModules, match=r"no agreed order; found LoraLinear"):
                attach(model, ia3, name="b", head="ignore")
            before = scored(model)
            with pytest.raises(IncompatibleModules):
                attached(model)["default"].swap(narrow)
            assert torch.equal(scored(model), before)
    assert name in module.layers
    for bad in ("a.b", "", "../x"):
        with pytest.raises(PEMError, match="attachment name: cannot be used"):
            attach(model, module, name=bad)
    with pytest.raises(PEMError, match="found no attachments"):
        extract(model)


def test_a_layer_that_is_not_linear_is_refused_by_name() -> None:
    model = tiny("roberta")
    config = LoraConfig(r=1, alpha=1, target_modules=("word_embeddings",))
    name = "roberta.embeddings.word_embeddings"
    module = PEM({f"{name}.lora_A": torch.ones(1, 96), f"{name}.lora_B": torch.ones(32, 1)}, config)
    with pytest.raises(
        IncompatibleModules, match=r"word_embeddings: cannot be adapted; found Embedding"
    ):
        attach(model, module)
    assert isinstance(model.roberta, RobertaModel)


def test_the_body_of_a_with_block_may_fail_and_the_model_is_restored() -> None:
    model = tiny("gpt2")
    module = random_module(model)
    with untouched(model), pytest.raises(RuntimeError, match="stop"), attach(model, module):
        raise RuntimeError("stop")


@pytest.mark.parametrize("wrapped", ["whole model", "a block", "a layer", "data parallel name"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_wrappers_do_not_change_the_names_of_layers(wrapped: str, kind: str) -> None:
    """torch.compile and activation checkpointing put parts of their own into names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, model = tiny("llama"), tiny("llama")
    module = random_module(plain, kind, seed=1)
    with attach(plain, module):
        expected = logits_of(plain)
    base, call = logits_of(plain), model
    layers = model.model.layers
    if wrapped == "whole model":
        call = torch.compile(model, backend="eager")
    elif wrapped == "a block":
        layers[0] = checkpoint_wrapper(layers[0])
    elif wrapped == "a layer":
        layers[1].self_attn.v_proj = checkpoint_wrapper(layers[1].self_attn.v_proj)
    else:
        call = type("DistributedDataParallel", (torch.nn.Module,), {})()
        call.module = model
    before = [n for n, _ in call.named_modules()]
    for hold in (attach, fold):
        with torch.no_grad(), hold(call, module):
            torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
        assert [n for n, _ in call.named_modules()] == before
        assert torch.equal(logits_of(model), base)
