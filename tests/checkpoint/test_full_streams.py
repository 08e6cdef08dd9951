"""Streamed combinations of whole models: methods equal those in memory, added tokens, blocks."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import random_module, tiny
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from pem_composition.arithmetic.methods.registry import METHODS
from pem_composition.checkpoint import (
    blocks,
    combine_full,
    fold_checkpoint,
    inspect_header,
    load,
    save,
)
from pem_composition.checkpoint.conversion import convert
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.full import Weights
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.checkpoint.stream import (
    SLOT_BYTES,
    SLOTS,
    Output,
    Ring,
    Sink,
    stream_safetensors,
)
from pem_composition.checkpoint.tensors import info_of
from pem_composition.errors import IncompatibleModules, PEMError, Preempted
from pem_composition.module import combine, negate

Models = Callable[..., tuple[list[Path], Path]]
DELTA = tuple(
    m.name for m in METHODS.values()
    if "full" in m.kinds and m.space == "delta" and not m.needs and m.name != "simple"
)  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    with Weights(folder) as held:
        return {name: held.raw(name).clone() for name in held.infos}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tuned models in shards and their base, by name, number and dtype; they are only read."""

    @functools.cache
    def written(
        name: str, count: int = 3, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Path], Path]:
        folder = tmp_path_factory.mktemp(name)
        tiny(name).to(dtype).save_pretrained(folder / "base")
        places = []
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            model = tiny(name).to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(dtype))
            places.append(folder / f"m{seed}")
            model.save_pretrained(places[-1], max_shard_size="20KB")
        return places, folder / "base"

    return written


def test_the_routers_of_experts_are_no_head(tmp_path: Path) -> None:
    """Switch Transformers call them classifiers; they are summed as every other weight is."""
    config = SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / name)
    a, b, base = (tmp_path / n for n in ("a", "b", "base"))
    combine_full([a, b], [0.3, 0.2], tmp_path / "sum", base=base)
    fold_checkpoint("0.3*a + 0.2*b", {"a": a, "b": b}, base, tmp_path / "fold")
    zero, one, two = (weights(p) for p in (base, a, b))
    assert sum("router.classifier" in name for name in zero) == 2
    for name, tensor in zero.items():
        t = tensor.double()
        expected = t + 0.3 * (one[name].double() - t) + 0.2 * (two[name].double() - t)
        for out in ("sum", "fold"):
            found = weights(tmp_path / out)[name].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["sum", "negation", "rounded"])
def test_a_sum_saved_from_memory_is_certified_as_the_file_holds_it(
    what: str, stored: torch.dtype, dtype: str | None, models: Models, tmp_path: Path
) -> None:
    places, base = models("roberta", 2, stored)
    held = [load(p, base=base) for p in places]
    terms = [(0.5, held[0]), (-0.3, held[1])] if what != "negation" else [(-0.7, held[0])]
    module = negate(held[0], 0.7) if what == "negation" else combine(
        held, [0.5, -0.3], dtype="float16" if what == "rounded" else None
    )  # fmt: skip
    save(module, tmp_path / "out", base=base, dtype=dtype)
    found = json.loads((tmp_path / "out" / "pem.json").read_text())["certificate"]
    if what == "rounded":  # its operands are not at hand
        assert found["total"] is None
        return
    theta, zero = weights(tmp_path / "out"), weights(base)
    errors, norms = {}, {}
    for layer in module.layers:
        exact = sum(c * m.tensors[f"{layer}.delta"].double() for c, m in terms)
        change = theta[layer].double() - zero[layer].double()
        errors[layer], norms[layer] = float((change - exact).norm()), float(exact.norm())
        expected = errors[layer] / norms[layer] if norms[layer] else 0.0
        assert found["layers"][layer] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    total = math.hypot(*errors.values()) / math.hypot(*norms.values())
    assert found["total"] == pytest.approx(total, rel=1e-4, abs=1e-7) and total > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("method", DELTA)
def test_a_streamed_method_is_the_one_in_memory_bit_for_bit(
    method: str, dtype: str | None, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, base = models("roberta", min(3, METHODS[method].modules[1]))
    coefficients = [0.7, 1.3, 0.4][: len(places)]
    held = [load(p, base=base) for p in places]
    module = combine(held, coefficients, method=method, head="last")
    save(module, tmp_path / "memory", base=base, dtype=dtype)
    # small blocks: every threshold is found in several passes over several blocks of rows
    monkeypatch.setattr("pem_composition.arithmetic.methods.entries.BLOCK", 700)
    combine_full(
        places,
        coefficients,
        tmp_path / "stream",
        base=base,
        method=method,
        head="last",
        dtype=dtype,
    )
    found, expected = weights(tmp_path / "stream"), weights(tmp_path / "memory")
    assert found.keys() == expected.keys()
    if method in (
        "slerp",
        "karcher",
        "sce",
    ):  # weights are sums over blocks
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-2 if dtype else 1e-6, atol=1e-7)
    else:
        assert all(torch.equal(found[n], t) for n, t in expected.items())
    record = json.loads((tmp_path / "stream" / "pem.json").read_text())
    recorded, certificate = record["certificate"], module.provenance.certificate
    assert recorded["against"] == certificate.against
    assert recorded["total"] > 0.9 * certificate.total  # and the rounding of base plus difference
    assert recorded["layers"].keys() == certificate.layers.keys()
    assert record["method"] == module.provenance.method
    assert rebuild(tmp_path / "stream").equal


@pytest.mark.slow
@pytest.mark.parametrize("method", DELTA)
def test_with_the_block_of_every_day_each_bit_is_the_same(
    method: str, models: Models, tmp_path: Path
) -> None:
    places, base = models("gpt2", 2, torch.bfloat16)
    held = [load(p, base=base) for p in places]
    save(combine(held, [1.0, 0.5], method=method), tmp_path / "memory", base=base)
    combine_full(places, [1.0, 0.5], tmp_path / "stream", base=base, method=method)
    found, expected = weights(tmp_path / "stream"), weights(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_methods_that_whole_models_have_not(models: Models, tmp_path: Path) -> None:
    places, base = models("roberta")
    for options, words in (
        ({"method": "ties"}, "found no base model"),
        ({"method": "tsv", "base": base}, "tsv"),
        ({"method": "fisher", "base": base}, "fisher is not defined on whole models here"),
        ({"method": "ties", "base": base, "settings": {"density": 2}}, "density"),
        ({"method": "slerp", "base": base}, "wrong number of modules"),
        ({"method": "ties", "base": base, "tokens": "first"}, "needs tensors of one shape"),
    ):
        with pytest.raises(PEMError, match=words):
            combine_full(places, [1.0, 1.0, 1.0], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_a_difference_that_is_not_finite_is_named(models: Models, tmp_path: Path) -> None:
    """A random method might drop the entry; it is refused all the same."""
    from safetensors.torch import save_file

    given, base = models("roberta")
    places = [Path(shutil.copytree(p, tmp_path / p.name)) for p in given]
    shard = sorted(places[1].glob("*.safetensors"))[0]
    held = load_file(shard)
    name = next(n for n, t in held.items() if t.dim() == 2)
    held[name][1, 2] = float("nan")
    save_file(held, shard, metadata={"format": "pt"})
    for method in ("simple", "dare"):
        with pytest.raises(PEMError, match="is not finite; found 1 NaN") as error:
            combine_full(places, [1.0] * 3, tmp_path / "out", base=base, method=method)
        assert name in str(error.value)
        assert shard.name in str(error.value)


# --- added tokens ---------------------------------------------------------------------------------


def with_tokens(folder: Path, out: Path, rows: int) -> Path:
    """The model with a vocabulary of so many tokens, the added rows random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps({"rows": rows}))
    return out


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("policy", ["first", "largest"])
def test_tokens_that_some_models_lack_are_averaged_over_the_others(
    policy: str, name: str, models: Models, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (a, b, c), base = models(name)
    b, c = with_tokens(b, tmp_path / "b", 99), with_tokens(c, tmp_path / "c", 101)
    order = (b, a, c)
    with pytest.raises(IncompatibleModules, match=r"--tokens first\|largest"):
        combine_full(order, [0.5, 0.25, -0.5], tmp_path / "out", base=base)
    combine_full(order, [0.5, 0.25, -0.5], tmp_path / "out", base=base, tokens=policy)
    rows = 99 if policy == "first" else 101
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == rows
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"rows": rows}
    found, zero = weights(tmp_path / "out"), weights(base)
    x, y, z = (weights(p) for p in order)
    for key, tensor in found.items():
        shared = tensor if x[key].shape == zero[key].shape else tensor[:96]
        part = {n: t[key][: len(shared)].double() for n, t in (("x", x), ("y", y), ("z", z))}
        origin = zero[key].double()
        exact = origin + 0.5 * (part["x"] - origin) + 0.25 * (part["y"] - origin)
        exact -= 0.5 * (part["z"] - origin)
        torch.testing.assert_close(shared.double(), exact, rtol=0, atol=1e-6)
        if shared is not tensor:  # rows 96 to 98 are in b and c, with weights 0.5 and 0.5
            both = 0.5 * x[key][96:99] + 0.5 * z[key][96:99]
            torch.testing.assert_close(tensor[96:99], both)
            assert torch.equal(tensor[99:], z[key][99:rows])
    assert rebuild(tmp_path / "out").equal


def test_models_with_the_same_added_tokens_need_no_policy_but_for_the_base(
    models: Models, tmp_path: Path
) -> None:
    (a, b, _), base = models("gpt2")
    pair = [with_tokens(m, tmp_path / f"{m.name}-more", 98) for m in (a, b)]
    combine_full(pair, [0.5, 0.5], tmp_path / "out")
    with pytest.raises(
        IncompatibleModules, match=r"does not fit the base.*--tokens first\|largest"
    ):
        combine_full(pair, [0.5, 0.4], tmp_path / "around", base=base)
    combine_full(pair, [0.5, 0.4], tmp_path / "around", base=base, tokens="first")
    key = "transformer.wte.weight"
    x, y = (weights(p)[key] for p in pair)
    added = weights(tmp_path / "around")[key][96:]
    torch.testing.assert_close(added, (0.5 * x[96:] + 0.4 * y[96:]) / 0.9)


@pytest.mark.parametrize("policy", ["first", "largest"])
def test_a_bias_of_the_logits_has_a_column_for_every_token(policy: str, tmp_path: Path) -> None:
    """BART stores final_logits_bias as (1, tokens); what is written opens with the new size."""
    model, places = tiny("bart"), [tmp_path / n for n in ("base", "a", "b")]
    for place, rows in zip(places, (96, 98, 99), strict=True):
        torch.manual_seed(rows)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(0.1 * torch.randn(tensor.shape))
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.final_logits_bias.normal_()
        model.save_pretrained(place)
    base, a, b = places
    combine_full([a, b], [0.5, 0.25], tmp_path / "out", base=base, tokens=policy)
    rows = {"first": 98, "largest": 99}[policy]
    found = type(model).from_pretrained(tmp_path / "out").final_logits_bias[0]
    zero, x, y = (weights(p)["final_logits_bias"][0] for p in places)
    torch.testing.assert_close(found[:96], 0.25 * zero + 0.5 * x[:96] + 0.25 * y[:96])
    torch.testing.assert_close(found[96:98], (0.5 * x[96:98] + 0.25 * y[96:98]) / 0.75)
    assert torch.equal(found[98:], y[98:rows])
    assert len(found) == rows


# --- tied weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simple", "ties"])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "whisper"])
def test_a_sum_has_no_order_where_one_model_is_no_longer_tied(
    name: str, method: str, tmp_path: Path
) -> None:
    from support.one_meaning import BY_NAME, built

    if name == "whisper":
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        model = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=56, d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                decoder_ffn_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        output = "proj_out.weight"
    else:
        model, output = copy.deepcopy(built(name)), f"{BY_NAME[name].output}.weight"
    base, tied, apart = (tmp_path / n for n in ("base", "tied", "apart"))
    states = {}
    for place in (base, tied, apart):
        model.save_pretrained(place)
        states[place] = {n: t.double() for n, t in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    own = torch.randn(states[base][output].shape)
    save_file(
        load_file(apart / "model.safetensors") | {output: own},
        apart / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    states[apart][output] = own.double()
    found = []
    for order in ((tied, apart), (apart, tied)):
        shares = [{tied: 0.5, apart: 0.8}[p] for p in order]
        out = tmp_path / order[0].name[:2]
        combine_full(order, shares, out, base=base, method=method)
        found.append(
            {n: t.double() for n, t in type(model).from_pretrained(out).state_dict().items()}
        )
    for n, zero in states[base].items():
        torch.testing.assert_close(found[0][n], found[1][n], rtol=0, atol=1e-6)
        exact = zero + 0.5 * (states[tied][n] - zero) + 0.8 * (states[apart][n] - zero)
        if method == "simple":
            torch.testing.assert_close(found[0][n], exact, rtol=0, atol=1e-5)


# --- blocks and buffers ---------------------------------------------------------------------------


@pytest.mark.slow
def test_any_block_size_gives_the_same_bits(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, base = models("gpt2", dtype=torch.bfloat16)
    request = (places, [0.3, 0.4, -0.7])
    combine_full(*request, tmp_path / "one", base=base, dtype="bfloat16")
    for block, slot in ((7, 16), (64, 128), (1000, 24)):
        monkeypatch.setattr("pem_composition.checkpoint.stream.SLOT_BYTES", slot)
        monkeypatch.setattr("pem_composition.checkpoint.blocks.BLOCK", block)
        out = tmp_path / str(block)
        combine_full(*request, out, base=base, dtype="bfloat16")
        for file in sorted(f.name for f in (tmp_path / "one").glob("*.safetensors")):
            assert (out / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    zero, parts = weights(base), [weights(p) for p in places]
    for name, tensor in weights(tmp_path / "one").items():
        exact = zero[name].double()
        for c, part in zip(request[1], parts, strict=True):
            exact = exact + c * (part[name].double() - zero[name].double())
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_ring_of_buffers_holds_what_was_not_yet_written(tmp_path: Path) -> None:
    """Tensors that fill their last buffer exactly, in a slow and a fast order."""
    size = SLOT_BYTES // 4
    sizes = [size, 3, 2 * size, size] * SLOTS
    tensors = {f"t{i:02d}": torch.full((n,), float(i)) for i, n in enumerate(sizes)}
    outputs = {
        n: Output(info_of(t), lambda start, stop, t=t: t[start:stop], step=size)
        for n, t in tensors.items()
    }
    digest = stream_safetensors(tmp_path / "x.safetensors", outputs, Ring())
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[n], t) for n, t in tensors.items())
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_an_error_of_the_disk_reaches_the_caller(tmp_path: Path) -> None:
    """The second thread's error is raised, and nothing is left hanging."""
    t = torch.zeros(2**22)
    output = Output(info_of(t), lambda start, stop: t[start:stop], step=1000)
    with pytest.raises(OSError, match="No space left"):
        stream_safetensors(Path("/dev/full"), {"t": output}, Ring())


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([1, "half", 0], "coefficients: a coefficient must be a finite number; found 'half'"),
        ([1, 0], "one coefficient per model is needed; found 2 coefficients for 3 models"),
    ],
)
def test_coefficients_of_models_are_numbers_one_for_each(
    coefficients: list[Any], message: str, models: Models, tmp_path: Path
) -> None:
    places, base = models("gpt2")
    with pytest.raises(PEMError, match=message):
        combine_full(places, coefficients, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_an_overflow_in_the_written_dtype_is_said(models: Models, tmp_path: Path) -> None:
    places, base = models("gpt2")
    with pytest.raises(PEMError, match=r"overflows in torch.float16; .*--dtype bfloat16"):
        combine_full(places, [1e6, 0, 0], tmp_path / "out", base=base, dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        (7e4, "F16", "bfloat16 or float32"),
        (3.4e38, "BF16", "float32"),
        (1e39, "F32", "float64"),
    ],
)
def test_the_dtype_that_is_named_is_wider(
    value: float, dtype: str, remedy: str, tmp_path: Path
) -> None:
    t = torch.tensor([1.0, value], dtype=torch.float64)
    output = Output(TensorInfo(dtype, (2,)), lambda start, stop: t[start:stop], step=2)
    with pytest.raises(PEMError, match=rf"'t' overflows in .*; choose --dtype {remedy}$"):
        stream_safetensors(tmp_path / "t.safetensors", {"t": output}, Ring())


def test_a_sum_gives_the_threads_of_torch_back(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    add = blocks.add
    monkeypatch.setattr(
        blocks, "add", lambda *a: (used.append(torch.get_num_threads()), add(*a))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        places, base = models("gpt2")
        combine_full(places, [0.3, 0.4, -0.7], tmp_path / "out", base=base)
        assert torch.get_num_threads() == 3
        with pytest.raises(PEMError, match="overflows"):
            combine_full(places, [1e6, 0, 0], tmp_path / "big", base=base, dtype="float16")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(used) == {1}


@pytest.mark.parametrize("how", ["sum", "fold", "convert", "save"])
@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
def test_a_whole_model_takes_the_place_of_an_adapter_and_its_own_files_stay(
    how: str, layout: str, models: Models, tmp_path: Path
) -> None:
    places, base = models("roberta", 2)
    adapter = random_module(tiny("roberta"), "lora", seed=1)
    adapter.save(tmp_path / "adapter")
    adapter.save(tmp_path / "out", format=layout)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    if how == "sum":
        combine_full(places, [0.5, 0.5], out, overwrite=True)
    elif how == "fold":
        named = {"a": tmp_path / "adapter"}
        fold_checkpoint("a", named, base, out, overwrite=True, allow_base_mismatch=True)
    elif how == "convert":
        convert(places[0], out, overwrite=True)
    else:
        save(load(places[0], base=base), out, base=base, overwrite=True)
    assert inspect_header(out).format == "full"
    assert not [p.name for p in out.iterdir() if "adapter" in p.name or "head" in p.name]
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_the_certificate_of_a_method_is_that_of_the_file(
    dtype: str | None, models: Models, tmp_path: Path
) -> None:
    places, base = models("roberta", dtype=torch.bfloat16)
    out, settings = tmp_path / "out", {"density": 0.4}
    given = {"base": base, "method": "ties", "settings": settings, "head": "first"}
    combine_full(places, [0.7, 0.4, 1.3], out, dtype=dtype, **given)
    combine_full(places, [0.7, 0.4, 1.3], tmp_path / "exact", dtype="float64", **given)
    start, found, exact = weights(base), weights(out), weights(tmp_path / "exact")
    names = [n for n in start if not n.startswith("classifier")]
    wrong = sum(float((found[n].double() - exact[n]).square().sum()) for n in names)
    norm = sum(float((exact[n] - start[n].double()).square().sum()) for n in names)
    stated = inspect_header(out).provenance.certificate.total
    assert stated == pytest.approx((wrong / norm) ** 0.5, rel=0.2, abs=2e-7)
    assert stated > {"bfloat16": 1e-3, "float16": 1e-5}.get(dtype or "", 0.0)


def test_a_fold_of_a_method_notes_the_method_s_own_error(models: Models, tmp_path: Path) -> None:
    _, base = models("roberta", 1)
    named = {}
    for seed, name in enumerate("ab"):
        named[name] = tmp_path / name
        random_module(tiny("roberta"), "lora", seed=seed).save(named[name])
    fold_checkpoint(
        "ties(a, b, density=0.4)", named, base, tmp_path / "out", allow_base_mismatch=True
    )
    notes = inspect_header(tmp_path / "out").provenance.notes
    assert any("is off the method's own result by 0." in note for note in notes)


def test_a_stop_at_any_moment_of_a_write_ends(tmp_path: Path) -> None:
    """What a signal raises between two steps of ``write``, raised here at each of them in turn."""
    met = []

    def stopped_at(moment: int) -> None:
        left = moment

        def trace(frame: FrameType, event: str, _arg: object) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Preempted.build("SIGTERM", "stopped")
            return trace

        try:
            with Sink(tmp_path / f"{moment}") as sink:
                sys.settrace(trace)
                for _ in range(3):
                    sink.write(b"data")
                sys.settrace(None)
        except Preempted:
            met.append(moment)

    for moment in range(1, 400):
        thread = threading.Thread(target=stopped_at, args=(moment,), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), f"both threads wait, after a stop at moment {moment}"
        if moment not in met:
            break
    assert len(met) == moment - 1 > 5
