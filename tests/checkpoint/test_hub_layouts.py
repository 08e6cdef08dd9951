"""Bases laid out as the published ones are: what transformers makes of them is what a sum adds to.

The oracle is transformers: each model is what ``from_pretrained`` makes of a folder, the sum is
taken in float64 over state dicts, and what was written is loaded by transformers again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny
from torch import Tensor, nn

from pem_composition.checkpoint import combine_full, fold_checkpoint, load, save, stored_names
from pem_composition.checkpoint.full import Weights
from pem_composition.config import is_head
from pem_composition.module import combine

State = dict[str, Tensor]
SIZES = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 20,
}  # fmt: skip
T5 = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 24, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "max_position_embeddings": 20, "bos_token_id": 0, "pad_token_id": 1,
    "eos_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 24, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}
WHISPER = {
    "vocab_size": 24, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "num_mel_bins": 8, "max_source_positions": 8,
    "max_target_positions": 8, "classifier_proj_size": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAV2VEC2 = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8,
    "classifier_proj_size": 4,
}  # fmt: skip
XLNET = {"vocab_size": 24, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 12}


def old_norms(state: State) -> State:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    return {old(n): t for n, t in state.items()}


def as_gpt2(state: State) -> State:
    bare = {n.removeprefix("transformer."): t for n, t in state.items() if "lm_head" not in n}
    for i in range(2):
        bare[f"h.{i}.attn.bias"] = torch.ones(20, 20).tril().view(1, 1, 20, 20)
        bare[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return bare


def as_bert(state: State) -> State:
    return old_norms(state) | {"bert.embeddings.position_ids": torch.arange(20)[None]}


def as_t5(state: State) -> State:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return state | {name: torch.ones(32, 2)}


def as_bart(state: State) -> State:
    bare = {n.removeprefix("model."): t for n, t in state.items() if "final_logits" not in n}
    bare.pop("lm_head.weight", None)
    return bare | {"encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}


def as_llama(state: State) -> State:
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    return state | old


def unchanged(state: State) -> State:
    return state


def bare(state: State) -> State:
    """Without the prefix of the body, heads dropped."""
    return {n.partition(".")[2]: t for n, t in state.items() if n.startswith(("bert.", "model."))}


# name -> class of the base, its sizes, its layout, classes of models tuned from it
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[State], State], tuple[str, ...]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, as_gpt2, (
        "GPT2LMHeadModel", "GPT2ForSequenceClassification")),
    "bert": (
        "BertForPreTraining", SIZES, as_bert,
        ("BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM"),
    ),
    "bert-bare": ("BertModel", SIZES, old_norms, ("BertForSequenceClassification",)),
    "bert-no-prefix": ("BertForMaskedLM", SIZES, bare, ("BertForSequenceClassification",)),
    "roberta": (
        "RobertaForMaskedLM", SIZES, unchanged,
        ("RobertaForSequenceClassification", "RobertaForMaskedLM", "RobertaForMultipleChoice"),
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
         "sep_token_id": 2},
        unchanged, ("ModernBertForSequenceClassification", "ModernBertForMaskedLM"),
    ),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, unchanged, (
        "WhisperForConditionalGeneration", "WhisperForAudioClassification")),
    "m2m": ("M2M100ForConditionalGeneration", BART, unchanged, ("M2M100ForConditionalGeneration",)),
    "wav2vec2": ("Wav2Vec2ForPreTraining", WAV2VEC2, unchanged, (
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2ForCTC")),
    "t5": ("T5ForConditionalGeneration", T5, as_t5, (
        "T5ForConditionalGeneration", "T5EncoderModel", "T5ForSequenceClassification")),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 24, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
        old_norms, ("DistilBertForSequenceClassification", "DistilBertForQuestionAnswering"),
    ),
    "electra": ("ElectraForPreTraining", {**SIZES, "embedding_size": 8}, old_norms, (
        "ElectraForSequenceClassification",)),
    "electra-generator": ("ElectraForMaskedLM", {**SIZES, "embedding_size": 8}, old_norms, (
        "ElectraForSequenceClassification", "ElectraForMaskedLM")),
    "albert": ("AlbertForPreTraining", {**SIZES, "embedding_size": 8}, old_norms, (
        "AlbertForSequenceClassification", "AlbertForTokenClassification", "AlbertForMaskedLM")),
    "deberta": ("DebertaForMaskedLM", SIZES, old_norms, ("DebertaForSequenceClassification",)),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {**SIZES, "position_biased_input": False, "type_vocab_size": 0},
        lambda s: s | {"deberta.embeddings.position_embeddings.weight": torch.ones(20, 16),
                       "mask_predictions.dense.weight": torch.ones(16, 16)},
        ("DebertaV2ForSequenceClassification",),
    ),
    "bart": ("BartModel", BART, as_bart, (
        "BartForSequenceClassification", "BartForConditionalGeneration")),
    "bart-lm": ("BartForConditionalGeneration", BART, unchanged, (
        "BartForSequenceClassification", "BartForConditionalGeneration")),
    "xlnet": ("XLNetLMHeadModel", XLNET, unchanged, (
        "XLNetForSequenceClassification", "XLNetLMHeadModel")),
    "llama": ("LlamaForCausalLM", SIZES, as_llama, (
        "LlamaForCausalLM", "LlamaForSequenceClassification")),
    "llama-tied": ("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True}, as_llama, (
        "LlamaForCausalLM",)),
}  # fmt: skip
CELLS = [(family, tuned) for family, entry in FAMILIES.items() for tuned in entry[3]]


def spread(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_base(family: str, folder: Path, *, copies: bool) -> Path:
    """The base as it is published; ``copies``: what is tied is stored under every name."""
    name, sizes, layout, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = spread(cls(cls.config_class(**sizes)), 0)
    model.save_pretrained(folder)
    stored = {n: t.clone() for n, t in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = stored if copies else {n: t for n, t in stored.items() if n not in tied}
    save_file(layout(state), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings") and config["model_type"] != "llama":
        del config["tie_word_embeddings"]  # old files leave out what is the rule
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(tuned: str, folder: Path) -> tuple[nn.Module, set[str]]:
    """What transformers makes of a folder, and which of its tensors the folder lacked."""
    torch.manual_seed(7)
    model, info = getattr(transformers, tuned).from_pretrained(folder, output_loading_info=True)
    return model, set(info["missing_keys"])


def wide(model: nn.Module) -> State:
    return {n: t.detach().double().clone() for n, t in model.state_dict().items()}


@pytest.fixture
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(("family", "tuned"), CELLS, ids=[f"{f}-{t}" for f, t in CELLS])
def test_a_sum_around_a_published_base(
    family: str, tuned: str, copies: bool, tmp_path: Path, quiet: None
) -> None:
    base = write_base(family, tmp_path / "base", copies=copies)
    zero, new = loaded(tuned, base)
    origin = wide(zero)
    parts, folders = [], []
    for seed, name in enumerate("ab", start=1):
        model = spread(loaded(tuned, base)[0], seed)
        model.save_pretrained(tmp_path / name)
        if copies:  # every name once more, as .bin files and other writers have it
            state = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
            save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        parts.append(wide(model))
        folders.append(tmp_path / name)
    exact = {}
    for name, theta_0 in origin.items():
        a, b = (p[name] for p in parts)
        sum_ = theta_0 + 0.5 * (a - theta_0) + 0.7 * (b - theta_0)
        exact[name] = (0.5 * a + 0.7 * b) / 1.2 if name in new else sum_

    combine_full(folders, [0.5, 0.7], tmp_path / "sum", base=base)
    modules = [load(f, base=base) for f in folders]
    save(combine(modules, [0.5, 0.7]), tmp_path / "memory", base=base)
    fold_checkpoint(
        "0.5*a + 0.7*b", dict(zip("ab", folders, strict=True)), base, tmp_path / "folded"
    )
    if any(map(is_head, new)):
        config = json.loads((tmp_path / "folded" / "config.json").read_text())
        assert config["architectures"] == [tuned]
    for out in ("sum", "memory", "folded"):
        found, missing = loaded(tuned, tmp_path / out)
        assert not missing
        for name, tensor in wide(found).items():
            torch.testing.assert_close(tensor, exact[name], rtol=0, atol=2e-6, msg=f"{out} {name}")


# --- the table of names against transformers ------------------------------------------------------


def test_old_names_are_those_of_transformers() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    legacy = get_checkpoint_conversion_mapping("legacy")
    names = [
        "bert.encoder.layer.0.output.LayerNorm.gamma", "embeddings.LayerNorm.beta",
        "encoder.pos_conv_embed.conv.weight_g", "encoder.pos_conv_embed.conv.weight_v",
        "h.0.ln_1.weight", "layers.0.gamma",
    ]  # fmt: skip
    for name in names:
        expected = name
        for renaming in legacy:
            expected, _ = renaming.rename_source_key(expected)
        assert stored_names.current(name) == expected


def test_what_ties_by_default_is_what_transformers_ties() -> None:
    for kind in stored_names.TIED_TYPES:
        assert transformers.CONFIG_MAPPING[kind]().tie_word_embeddings is True, kind
    assert not stored_names.is_tied({"model_type": "llama"})
    assert stored_names.is_tied({"model_type": "llama", "tie_word_embeddings": True})
    assert not stored_names.is_tied({"model_type": "gpt2", "tie_word_embeddings": False})


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_are_those_of_the_class(family: str) -> None:
    name, sizes, _, tuned = FAMILIES[family]
    for each in (name, *tuned):
        cls = getattr(transformers, each)
        model = cls(cls.config_class(**sizes))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        names = list(model.state_dict())
        config = {**model.config.to_dict(), "architectures": [each]}
        assert stored_names.tied_names(config, names) == tied


def test_a_bias_of_a_layer_is_no_mask() -> None:
    from pem_composition.checkpoint.files import TensorInfo

    gpt2: dict[str, Any] = {"model_type": "gpt2"}
    for name, info, ignored in (
        ("h.0.attn.bias", TensorInfo("F32", (1, 1, 8, 8)), True),
        ("gpt_neox.layers.0.attention.bias", TensorInfo("BOOL", (1, 1, 8, 8)), True),
        ("gpt_neox.layers.0.attention.masked_bias", TensorInfo("F16", ()), True),
        ("transformer.h.0.attn.attention.bias", TensorInfo("U8", (1, 1, 8, 8)), True),
        ("blocks.0.attn.bias", TensorInfo("F32", (8,)), False),
        ("h.0.attn.c_attn.bias", TensorInfo("F32", (24,)), False),
        ("transformer.h.0.rotary_emb.inv_freq", TensorInfo("F32", (4,)), True),
        ("bert.embeddings.position_ids", TensorInfo("I64", (1, 8)), True),
        ("bert.embeddings.position_embeddings.weight", TensorInfo("F32", (8, 4)), False),
    ):
        assert stored_names.is_ignored(name, info, gpt2) is ignored, name


# --- folders --------------------------------------------------------------------------------------


def gpt2_pair(folder: Path) -> tuple[list[Path], Path]:
    """Two tuned GPT-2 and their base."""
    tiny("gpt2").save_pretrained(folder / "base")
    for seed, name in enumerate("ab", start=1):
        spread(tiny("gpt2"), seed).save_pretrained(folder / name)
    return [folder / "a", folder / "b"], folder / "base"


def test_of_two_forms_in_a_folder_the_one_that_transformers_loads(tmp_path: Path) -> None:
    (a, _), _ = gpt2_pair(tmp_path)
    tiny("gpt2", seed=5).save_pretrained(tmp_path / "other", max_shard_size="20KB")
    for file in (tmp_path / "other").glob("model*"):
        (a / file.name).write_bytes(file.read_bytes())
    torch.save(tiny("gpt2", seed=6).state_dict(), a / "pytorch_model.bin")
    live, _ = loaded("GPT2LMHeadModel", a)
    with Weights(a) as weights:
        for name, tensor in live.state_dict().items():
            assert torch.equal(weights.raw(weights.find(name) or ""), tensor)


def test_a_base_folder_with_hundreds_of_shards_and_few_open_files(tmp_path: Path) -> None:
    import resource

    state = {f"model.layers.{i}.w": torch.full((2, 2), float(i)) for i in range(200)}
    for name, shift in (("base", 0.0), ("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        table = {n: f"shard-{i}.safetensors" for i, n in enumerate(state)}
        for n, shard in table.items():
            save_file({n: state[n] + shift}, folder / shard)
        (folder / "config.json").write_text("{}")
        index = {"metadata": {}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        pair = [tmp_path / "a", tmp_path / "b"]
        combine_full(pair, [1.0, 1.0], tmp_path / "out", base=tmp_path / "base")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], t + 3.0) for n, t in state.items())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_shard_that_changes_between_two_reads_is_refused(form: str, tmp_path: Path) -> None:
    from pem_composition.errors import CheckpointError

    (a, _), _ = gpt2_pair(tmp_path)
    model, _ = loaded("GPT2LMHeadModel", a)
    for file in a.glob("model*"):
        file.unlink()
    halves = list(model.state_dict().items())
    table = {}
    for i, part in enumerate((dict(halves[:5]), dict(halves[5:]))):
        shard = f"part-{i}.{form}"
        table |= dict.fromkeys(part, shard)
        if form == "bin":
            torch.save(part, a / shard)
        else:
            table.pop("lm_head.weight", None)
            save_file({n: t for n, t in part.items() if n != "lm_head.weight"}, a / shard)
    stem = "pytorch_model.bin" if form == "bin" else "model.safetensors"
    (a / f"{stem}.index.json").write_text(json.dumps({"weight_map": table}))
    with Weights(a) as weights:
        first, last = next(iter(table)), "transformer.ln_f.weight"
        assert torch.equal(weights.raw(last), model.state_dict()[last])
        (a / table[first]).write_bytes((a / table[last]).read_bytes())
        with pytest.raises(CheckpointError, match="changed while it was read"):
            weights.raw(first)


def test_parts_that_a_model_ties_follow_the_embedding_of_a_base_stored_twice(
    tmp_path: Path,
) -> None:
    """A base that stores its output layer as well, folded with a model that does not."""
    (a, _), base = gpt2_pair(tmp_path)
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    fold_checkpoint("a", {"a": a}, base, tmp_path / "out", allow_base_mismatch=True)
    found, expected = (
        loaded("GPT2LMHeadModel", tmp_path / "out")[0],
        loaded("GPT2LMHeadModel", a)[0],
    )
    assert found.lm_head.weight is found.transformer.wte.weight
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)


# --- heads, tokens, scalars, stacked matrices -----------------------------------------------------


def classifier(folder: Path, labels: list[str], seed: int) -> Path:
    config = transformers.RobertaConfig(**SIZES, id2label=dict(enumerate(labels)))
    config.label2id = {w: i for i, w in enumerate(labels)}
    torch.manual_seed(0)
    spread(transformers.RobertaForSequenceClassification(config), seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", ["first", "last"])
@pytest.mark.parametrize("labels", [["yes", "no"], ["bad", "good"], ["a", "b", "c"]])
def test_head_and_labels_come_from_one_model(
    head: str, labels: list[str], tmp_path: Path, quiet: None
) -> None:
    pair = [classifier(tmp_path / "a", ["no", "yes"], 1), classifier(tmp_path / "b", labels, 2)]
    combine_full(pair, [0.5, 0.5], tmp_path / "out", head=head)
    found, missing = loaded("RobertaForSequenceClassification", tmp_path / "out")
    own, _ = loaded("RobertaForSequenceClassification", pair[0 if head == "first" else 1])
    assert not missing and found.config.id2label == own.config.id2label
    assert found.config.label2id == own.config.label2id
    for name, tensor in own.classifier.state_dict().items():
        assert torch.equal(found.classifier.state_dict()[name], tensor)


@pytest.mark.parametrize("labels", [["yes", "no"], ["bad", "good"]])
def test_heads_of_other_classes_are_not_averaged(labels: list[str], tmp_path: Path) -> None:
    from pem_composition.errors import IncompatibleModules

    pair = [classifier(tmp_path / "a", ["no", "yes"], 1), classifier(tmp_path / "b", labels, 2)]
    for head in ("average", "error"):
        with pytest.raises(IncompatibleModules, match="answer different classes"):
            combine_full(pair, [0.5, 0.5], tmp_path / "out", head=head)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["first", "largest"])
def test_added_tokens_are_no_excuse_for_other_rows(policy: str, tmp_path: Path) -> None:
    from pem_composition.errors import IncompatibleModules

    folders = []
    for heads in (1, 2):  # another number of key-value heads, and of positions
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=heads)
        folders.append(tmp_path / str(heads))
        transformers.LlamaForCausalLM(config).save_pretrained(folders[-1])
    with pytest.raises(IncompatibleModules, match=r"[kv]_proj.weight' differs"):
        combine_full(folders, [0.5, 0.5], tmp_path / "out", tokens=policy)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["simple", "slerp", "karcher", "ties", "della", "sce"])
def test_scalars_and_stacked_matrices(method: str, tmp_path: Path) -> None:
    """A temperature of shape () and the experts of a layer, as in CLIP and Mixtral."""
    generator = torch.Generator().manual_seed(0)
    folders = []
    for name in ("base", "a", "b"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        draw = {
            "logit_scale": torch.randn((), generator=generator),
            "mlp.experts.down_proj": torch.randn(4, 3, 5, generator=generator),
            "norm.weight": torch.randn(5, generator=generator),
        }
        save_file(draw, folders[-1] / "model.safetensors", metadata={"format": "pt"})
        (folders[-1] / "config.json").write_text("{}")
    base, *pair = folders
    combine_full(pair, [0.5, 0.7], tmp_path / "stream", base=base, method=method)
    held = [load(f, base=base) for f in pair]
    save(combine(held, [0.5, 0.7], method=method), tmp_path / "memory", base=base)
    found, same = (load_file(tmp_path / n / "model.safetensors") for n in ("stream", "memory"))
    assert found["logit_scale"].shape == ()
    for name, tensor in same.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
        assert found[name].isfinite().all()


def test_a_block_of_stacked_matrices_stays_small() -> None:
    from pem_composition.arithmetic.methods.entries import BLOCK, Scaled, blocks

    experts = torch.zeros(2, 3000, 1000)
    sizes = [X.numel() for _, X in blocks(Scaled([(1.0, experts)]))]
    assert sum(sizes) == experts.numel() and max(sizes) <= BLOCK


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_index_that_names_a_tensor_without_a_shard_is_refused(form: str, tmp_path: Path) -> None:
    from pem_composition.errors import CheckpointError

    state = {"h.weight": torch.ones(2, 2), "g.weight": torch.ones(2)}
    shard = f"shard.{form}"
    if form == "bin":
        torch.save(state, tmp_path / shard)
    else:
        save_file(state, tmp_path / shard)
    stem = "pytorch_model.bin" if form == "bin" else "model.safetensors"
    table = dict.fromkeys([*state, "lost.weight"], shard)
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match=r"missing tensor 'lost.weight'"):
        Weights(tmp_path)
    del table["lost.weight"], table["g.weight"]
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match=r"missing tensor 'g.weight'.*a shard with it"):
        Weights(tmp_path)


def test_an_output_layer_that_training_untied(tmp_path: Path, quiet: None) -> None:
    """The sum has both tensors, each around the one of the base; a fold has no place for them."""
    from pem_composition.errors import IncompatibleModules

    (a, _), base = gpt2_pair(tmp_path)
    state = load_file(a / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    save_file(state, a / "model.safetensors", metadata={"format": "pt"})
    zero = load_file(base / "model.safetensors")["transformer.wte.weight"]
    combine_full([a], [0.5], tmp_path / "sum", base=base)
    found, _ = loaded("GPT2LMHeadModel", tmp_path / "sum")
    for name in ("lm_head.weight", "transformer.wte.weight"):
        torch.testing.assert_close(found.state_dict()[name], 0.5 * (zero + state[name]))
    with pytest.raises(IncompatibleModules, match=r"no longer tied.*--full_merge"):
        fold_checkpoint("a", {"a": a}, base, tmp_path / "out", allow_base_mismatch=True)
    assert not (tmp_path / "out").exists()
