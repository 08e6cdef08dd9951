"""A LoRA module out of two checkpoints, against NumPy's SVD in float64, PEFT, and the fold."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import one_meaning as om
from support.small_modules import dense
from support.tiny_models import logits_of, moved, random_module, tiny
from torch import nn

from pem_composition.adapters import attach, fold
from pem_composition.adapters.locate import linear_layers
from pem_composition.checkpoint import fold_checkpoint, load
from pem_composition.checkpoint.extraction import extract_lora
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.config import matches
from pem_composition.errors import IncompatibleModules, PEMError
from pem_composition.module import combine

NAMES = ("roberta", "t5", "gpt2", "llama")
QUICK = ("roberta", "gpt2")


def pair(name: str, folder: Path, *, size: float = 0.05) -> tuple[Path, Path]:
    """A base and the same model after a random step of every parameter."""
    model = tiny(name)
    model.save_pretrained(folder / "base")
    moved(model, 1, size).save_pretrained(folder / "tuned", max_shard_size="20KB")
    return folder / "base", folder / "tuned"


def differences(name: str, base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """dW (d_out, d_in) of every parameter, float64."""
    a, b = (type(tiny(name)).from_pretrained(p).state_dict() for p in (base, tuned))
    conv = name == "gpt2"
    return {
        n: (t.double() - a[n].double()).numpy().T if conv and ".c_" in n and t.dim() == 2
        else (t.double() - a[n].double()).numpy()
        for n, t in b.items()
    }  # fmt: skip


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_it_is_the_best_approximation_of_every_layer(
    name: str, method: str, tmp_path: Path
) -> None:
    base, tuned = pair(name, tmp_path)
    module = extract_lora(base, tuned, rank=5, method=method)
    exact = differences(name, base, tuned)
    error = norm = 0.0
    for layer in module.layers:
        dW = exact[f"{layer}.weight"]
        S = np.linalg.svd(dW, compute_uv=False)
        best = float(np.square(S[5:]).sum()) ** 0.5
        found = float(np.linalg.norm(dense(module, layer) - dW))
        assert found >= best * (1 - 1e-6)
        assert found <= best * (1 + 1e-5 if method == "exact" else 1.01)
        A, B = (module.tensors[f"{layer}.lora_{side}"].double() for side in "AB")
        np.testing.assert_allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-5)
        recorded = module.provenance.certificate.layers[layer]
        assert recorded == pytest.approx(found / np.linalg.norm(dW), rel=1e-6)
        error, norm = error + found**2, norm + float(np.square(dW).sum())
    assert module.provenance.certificate.total == pytest.approx((error / norm) ** 0.5, rel=1e-6)
    linear = {n for n, m in tiny(name).named_modules() if isinstance(m, nn.Linear)}
    linear |= {n for n, _ in tiny(name).named_modules() if name == "gpt2" and ".c_" in n}
    assert set(module.layers) == {n for n in linear if "classifier" not in n and n != "lm_head"}


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_share_of_the_energy_decides_the_rank_of_every_layer(method, tmp_path: Path) -> None:
    base, tuned = pair("gpt2", tmp_path)
    module = extract_lora(base, tuned, rank=0.9, method=method)
    for layer, dW in differences("gpt2", base, tuned).items():
        if layer.removesuffix(".weight") in module.layers:
            energies = np.square(np.linalg.svd(dW, compute_uv=False))
            k = module.config.rank(layer.removesuffix(".weight"))
            assert energies[: k - 1].sum() < 0.9 * energies.sum() <= energies[:k].sum()
    assert 0.9 <= module.provenance.certificate.kept_energy < 1.0
    assert len({module.config.rank(layer) for layer in module.layers}) > 1
    module.save(tmp_path / "m")
    assert load(tmp_path / "m").config.rank_pattern == module.config.rank_pattern
    assert rebuild(tmp_path / "m").equal


@pytest.mark.parametrize("kind", ["peft", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_extracting_what_was_folded_gives_the_update_back(
    name: str, kind: str, tmp_path: Path
) -> None:
    tiny(name).save_pretrained(tmp_path / "base")
    module = random_module(tiny(name), seed=1, head_seed=2, placement=kind)
    module.save(tmp_path / "a")
    fold_checkpoint("a", {"a": tmp_path / "a"}, tmp_path / "base", tmp_path / "tuned")
    found = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=8, strict=True)
    assert found.layers == module.layers
    assert found.provenance.certificate.total < 1e-6
    for layer in module.layers:
        np.testing.assert_allclose(dense(found, layer), dense(module, layer), atol=1e-5)
    heads = module.head_tensors()
    assert found.head_tensors().keys() == heads.keys()
    assert all(torch.equal(t, heads[n]) for n, t in found.head_tensors().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_peft_and_in_the_programs(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base, tuned = pair(name, tmp_path)
    extract_lora(base, tuned, rank=3).save(tmp_path / "out")
    module = load(tmp_path / "out")
    for model in (tiny(name).double(), tiny(name).double()):
        with attach(model, module):
            expected = logits_of(model)
        peft = PeftModel.from_pretrained(model, tmp_path / "out")
        torch.testing.assert_close(logits_of(peft.eval().double()), expected, rtol=1e-9, atol=1e-9)
    assert rebuild(tmp_path / "out").equal
    combine([module, module], [1.0, -0.5], space="delta", rank=2).save(tmp_path / "sum")
    assert rebuild(tmp_path / "sum").equal


def test_full_rank_and_the_left_out_rest_give_the_tuned_model(tmp_path: Path) -> None:
    base, tuned = pair("llama", tmp_path)
    module = extract_lora(base, tuned, rank=1000)
    assert module.provenance.certificate.total < 1e-6
    assert max(module.config.rank(layer) for layer in module.layers) == 32
    exact = differences("llama", base, tuned)
    held = {f"{layer}.weight" for layer in module.layers}
    lost = sum(float(np.square(d).sum()) for n, d in exact.items() if n not in held)
    share = (lost / sum(float(np.square(d).sum()) for d in exact.values())) ** 0.5
    (note,) = module.provenance.notes
    count = sum(n not in held for n in exact)
    assert note.startswith(
        f"{count} tensors that differ are left out, {share:.2g} of the difference's norm: "
    )
    module.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pem.json").read_text())["notes"] == [note]
    model = type(tiny("llama")).from_pretrained(base)
    fold(model, module, permanent=True)
    reached = model.state_dict()
    wanted = type(tiny("llama")).from_pretrained(tuned).state_dict()
    for n in held:
        torch.testing.assert_close(reached[n], wanted[n], rtol=1e-5, atol=1e-6)


def test_targets(tmp_path: Path) -> None:
    base, tuned = pair("roberta", tmp_path)
    module = extract_lora(base, tuned, rank=2, target_modules=["query", "output.dense"])
    layers = list(extract_lora(base, tuned, rank=2).layers)
    expected = [n for n in layers if matches(n, "query") or matches(n, "output.dense")]
    assert list(module.layers) == expected
    assert extract_lora(base, tuned, rank=2, target_modules=["query"]).config.target_modules == (
        "query",
    )
    # "dense" names the head's layer, too
    assert "dense" not in extract_lora(base, tuned, rank=2).config.target_modules


def test_bfloat16_checkpoints_and_factors(tmp_path: Path) -> None:
    base, tuned = pair("llama", tmp_path)
    for path in (base, tuned):
        model = type(tiny("llama")).from_pretrained(path, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / f"{path.name}16")
    places = tmp_path / "base16", tmp_path / "tuned16"
    module = extract_lora(*places, rank=4, dtype="bfloat16")
    a, b = (load_file(p / "model.safetensors") for p in places)
    for layer in module.layers:
        dW = (b[f"{layer}.weight"].double() - a[f"{layer}.weight"].double()).numpy()
        found = np.linalg.norm(dense(module, layer) - dW) / np.linalg.norm(dW)
        assert module.provenance.certificate.layers[layer] == pytest.approx(found, rel=1e-6)
    module.save(tmp_path / "out", dtype="bfloat16")
    assert rebuild(tmp_path / "out").equal
    exact = extract_lora(*places, rank=64, dtype="float64")
    assert max(exact.provenance.certificate.layers.values()) < 1e-13


def test_the_difference_is_taken_in_float64(tmp_path: Path) -> None:
    """Of weights that are far apart float32 holds no exact difference."""
    base, tuned = pair("roberta", tmp_path, size=3.0)
    module = extract_lora(base, tuned, rank=64, dtype="float64")
    exact = differences("roberta", base, tuned)
    for layer in module.layers:
        dW = exact[f"{layer}.weight"]
        assert np.linalg.norm(dense(module, layer) - dW) <= 1e-13 * np.linalg.norm(dW)
    assert module.provenance.certificate.total < 1e-13


def test_the_seed_decides_the_randomised_module(tmp_path: Path) -> None:
    base, tuned = pair("llama", tmp_path)
    one, same, other = (
        extract_lora(base, tuned, rank=2, method="randomized", seed=s).tensors for s in (1, 1, 2)
    )
    assert all(torch.equal(t, same[n]) for n, t in one.items())
    assert not all(torch.equal(t, other[n]) for n, t in one.items())


def test_what_cannot_be_extracted_is_refused_by_name(tmp_path: Path) -> None:
    base, tuned = pair("gpt2", tmp_path)
    tiny("llama").save_pretrained(tmp_path / "other")
    for options, words in (
        ({"rank": 0}, "not a rank; found 0"),
        ({"rank": 2, "method": "fast"}, "found 'fast', expected exact or randomized"),
        ({"rank": 2, "target_modules": ["query"]}, "'query' names no matrix"),
        ({"rank": 2, "strict": True}, r"tensors differ that the module cannot hold; found .*wte"),
        ({"rank": 2, "dtype": "int8"}, "found 'int8'"),
    ):
        with pytest.raises(PEMError, match=words):
            extract_lora(base, tuned, **options)
    with pytest.raises(IncompatibleModules, match="does not fit the base"):
        extract_lora(base, tmp_path / "other", rank=2)
    with pytest.raises(IncompatibleModules, match="no linear layer to extract"):
        extract_lora(base, base, rank=2)


@pytest.mark.parametrize("kind", ["bert", "wav2vec2", "modernbert"])
def test_a_part_that_the_base_lacks_is_the_modules(kind: str, tmp_path: Path) -> None:
    """A pooler, a projector, a head in two layers: saved whole, as the task's own head is."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
    batch = {"input_ids": torch.arange(5, 12)[None]}
    if kind == "wav2vec2":
        config = transformers.Wav2Vec2Config(
            **sizes, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            classifier_proj_size=12,
        )  # fmt: skip
        model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
        inner, part = model.wav2vec2, "projector"
        batch = {"input_values": torch.linspace(-1, 1, 400)[None].sin()}
    elif kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
        inner, part = transformers.BertModel(model.config, add_pooling_layer=False), "bert.pooler"
        inner.load_state_dict(model.bert.state_dict(), strict=False)
    else:
        config = transformers.ModernBertConfig(
            **sizes, bos_token_id=1, eos_token_id=2, cls_token_id=3, sep_token_id=4
        )
        model = transformers.ModernBertForSequenceClassification(config).eval()
        inner, part = model.model, "head"
    inner.save_pretrained(tmp_path / "base")
    before = {n: t.clone() for n, t in inner.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            added = name.startswith((part, "classifier"))
            if added or (parameter.dim() == 2 and "embed" not in name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        want = model(**batch).logits
    model.save_pretrained(tmp_path / "tuned")
    module = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=24, strict=True)
    assert any(n.startswith(part) for n in module.head_tensors())
    assert not any(layer.startswith(part) for layer in module.layers)
    module.save(tmp_path / "module")
    torch.manual_seed(5)  # another head and another part, which the module's replace
    fresh = type(model)(model.config).eval()
    inside = fresh.get_submodule(fresh.base_model_prefix)
    inside.load_state_dict(before, strict=False)
    with torch.no_grad(), attach(fresh, load(tmp_path / "module"), allow_base_mismatch=True):
        torch.testing.assert_close(fresh(**batch).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("kind", ["whisper", "modernbert", "electra", "distilbert", "bert"])
def test_an_output_layer_is_no_layer_whatever_it_is_called(
    kind: str, untied: bool, tmp_path: Path
) -> None:
    if kind == "whisper":
        model = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                decoder_ffn_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
            )
        )  # fmt: skip
    else:
        config = {
            "modernbert": transformers.ModernBertConfig, "electra": transformers.ElectraConfig,
            "distilbert": transformers.DistilBertConfig, "bert": transformers.BertConfig,
        }[kind](vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                pad_token_id=0)  # fmt: skip
        if kind == "distilbert":
            config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=4)
        model = transformers.AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    output = model.get_output_embeddings()
    (name,) = (n for n, m in model.named_modules() if m is output)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        if untied:
            state[f"{name}.weight"] += torch.randn(output.weight.shape)
    model.save_pretrained(tmp_path / "tuned")
    stored = load_file(tmp_path / "tuned" / "model.safetensors").keys()
    kept = {n: t for n, t in state.items() if n in stored or (untied and n == f"{name}.weight")}
    save_file(kept, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    module = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=4)
    assert module.layers and name not in module.layers


@pytest.mark.parametrize("name", ["mixtral", "vit"])
def test_what_a_class_renames_on_loading_is_no_layer_of_a_module(name: str, tmp_path: Path) -> None:
    """Experts and routers are left out and named; a class that renames layers is refused."""
    m = om.BY_NAME[name]
    base, model = om.base_folder(m, tmp_path), copy.deepcopy(om.built(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned")
    if name == "vit":
        with pytest.raises(IncompatibleModules, match="its class renames what the file holds"):
            extract_lora(base, tmp_path / "tuned", rank=2)
        return
    module = extract_lora(base, tmp_path / "tuned", rank=2)
    assert set(module.layers) == {n for n in linear_layers(model) if n != "lm_head"}
    assert "experts" in module.provenance.notes[0]
    attach(om.opened(m, base), module).detach()
