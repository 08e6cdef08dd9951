"""What transformers calls, ties or ignores of what a file holds; what it adds to it.

The one table of it, for whole models and for folds, since the arithmetic imports no transformers;
``tests/checkpoint`` compares it with transformers 5: ``_keys_to_ignore_on_load_unexpected`` and
``_adjust_missing_and_unexpected_keys`` (buffers), the mapping ``legacy`` of ``conversion_mapping``
(old names), ``_tied_weights_keys`` with ``tie_weights`` (ties: of several names transformers
stores one, and gives the others its values on loading), and the layers that a forward pass calls.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.config import is_head, matches, tied_bias

# Old names, anywhere in a key.
RENAMED = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)
# Buffers that releases of transformers stored and none reads any more.
MASKS = re.compile(r"(^|\.)(attn|attention|crossattention)\.(bias|masked_bias)$")
BUFFERS = re.compile(
    r"(^|\.)(position_ids|relative_position_index)$|(^|[._])inv_freq$"
    r"|(^|\.)(encoder|decoder)\.version$"
    r"|(^|\.)decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
)
# Embeddings of the vocabulary; of several the output layer is the first in this order.
TABLES = (
    "shared", "embed_tokens", "word_embeddings", "word_embedding", "wte", "embed_in",
    "tokens_embed", "tok_embeddings", "embeddings", "w",
)  # fmt: skip
# Embedding of a model of two sides -> what each side calls it.
SHARED = {"shared.weight": "embed_tokens", "prophetnet.word_embeddings.weight": "word_embeddings"}
SIDES = ("encoder", "decoder", "text_encoder", "text_decoder")
LANGUAGE_MODELS = re.compile(
    r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration|EncoderDecoderModel|DoubleHeadsModel|"
    r"ForMaskedLM|ForPreTraining|ForCausalImageModeling|ForVisionText2Text|ForSpeechToText|"
    r"MarianMTModel|BlipForQuestionAnswering|BertGenerationDecoder|ReformerModelWithLMHead)"
)
# BERT and its kin: output layer -> a parameter beside it that is always stored.
BERT_OUTPUTS = {
    "cls.predictions.decoder": "cls.predictions.transform.dense.weight",
    "lm_head.decoder": "lm_head.dense.weight",
    "predictions.decoder": "predictions.dense.weight",
    "vocab_projector": "vocab_transform.weight",
    "generator_lm_head": "generator_predictions.dense.weight",
    "decoder": "head.dense.weight",
}
# Model type -> its output layer, where it is not lm_head.
OUTPUTS = {
    **dict.fromkeys(
        ("whisper", "moonshine", "moonshine_streaming", "canary", "cohere_asr"), "proj_out"
    ),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    **dict.fromkeys(("xlm", "flaubert"), "pred_layer.proj"),
    **dict.fromkeys(("t5gemma", "t5gemma2"), "lm_head.out_proj"),
    **dict.fromkeys(("vilt", "bridgetower"), "mlm_score.decoder"),
    "bert-generation": "lm_head.decoder",
    "gpt_neox_japanese": "embed_out",
    "kosmos-2": "text_model.lm_head",
    "speecht5": "text_decoder_postnet.lm_head",
    "xlnet": "lm_loss",
    "rwkv": "head",
    "git": "output",
}
# How a model names its output layer now -> how files and older modules do (GPT-NeoX).
OLD_OUTPUTS = {"lm_head": "embed_out"}
ALL_OUTPUTS = {*OLD_OUTPUTS, *OLD_OUTPUTS.values(), *OUTPUTS.values(), *BERT_OUTPUTS}
VAGUE = frozenset({"decoder", "head", "output"})  # of ALL_OUTPUTS: other layers are called so, too
# Model type -> name that a file may lack -> the name that it holds, where neither is an output.
_UDOP_BIAS = "relative_bias.biases.0.relative_attention_bias.weight"
_LUKE = {"entity_predictions.decoder.weight": "luke.entity_embeddings.entity_embeddings.weight"}
FURTHER = {
    "udop": {
        "encoder.embed_patches.proj.weight": "patch_embed.proj.weight",
        "encoder.embed_patches.proj.bias": "patch_embed.proj.bias",
        **{
            f"{side}.{_UDOP_BIAS}": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
            ".weight" for side in ("encoder", "decoder")
        },
    },
    "luke": _LUKE, "mluke": _LUKE,
}  # fmt: skip
# Model types whose configuration means tied embeddings where it does not say so.
TIED_TYPES = frozenset(
    {
        "albert", "bart", "bert", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
        "blenderbot-small", "bloom", "camembert", "cohere", "cohere2", "convbert", "ctrl",
        "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "falcon",
        "falcon_mamba", "flaubert", "funnel", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n",
        "gemma3n_text", "gpt2", "gpt_bigcode", "gpt_neo", "ibert", "layoutlm", "led", "lfm2",
        "longformer", "longt5", "m2m_100", "mamba", "marian", "mbart", "megatron-bert",
        "mobilebert", "modernbert", "moonshine", "mpnet", "mpt", "mt5", "mvp", "nllb-moe",
        "nomic_bert", "openai-gpt", "opt", "paligemma", "pegasus", "pegasus_x", "plbart", "roberta",
        "roberta-prelayernorm", "roformer", "smollm3", "speech_to_text", "speecht5", "squeezebert",
        "starcoder2", "switch_transformers", "t5", "t5gemma", "trocr", "umt5", "whisper", "xglm",
        "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "zamba", "zamba2",
    }
)  # fmt: skip
# Parts of a pretrained checkpoint that a classifier does not load.
PRETRAINING_COMPONENTS = frozenset(
    {
        "lm_head", "cls", "pooler", "lm_predictions", "mask_predictions", "predictions",
        "sop_classifier", "vocab_projector", "vocab_transform", "vocab_layer_norm", "lm_loss",
        "generator_predictions", "generator_lm_head", "discriminator_predictions", "embed_out",
        "final_logits_bias", "pred_layer", "proj_out", "quantizer", "project_q", "project_hid",
    }
)  # fmt: skip
PRETRAINING_ROOTS = ("head.", "decoder.weight", "decoder.bias")  # of ModernBERT: whole beginnings
# Parts that a class adds without a pretrained value, beside its head.
ADDED_COMPONENTS = frozenset({"pooler", "final_logits_bias", "projector", "layer_weights"})
# Model types whose class calls the linear layers of a file otherwise (transformers 5).
RENAMING = frozenset(
    {
        "audio-spectrogram-transformer", "beit", "conditional_detr", "d_fine", "deformable_detr",
        "deit", "detr", "dinov2", "dinov2_with_registers", "gte", "ijepa", "jina_embeddings_v3",
        "lw_detr", "maskformer", "nomic_bert", "pixio", "rt_detr", "rt_detr_v2", "segformer",
        "swin", "vit", "vit_mae", "vit_msn", "vivit", "yolos",
    }
)  # fmt: skip
# Experts of a mixture, which files store one by one and a live model holds in one tensor.
EXPERTS = re.compile(r"(^|\.)(experts\.\d+|block_sparse_moe)\.")
# Layers whose weight a class reads without calling the layer, and what stands beside them there.
UNCALLED = (
    ("out_proj", "in_proj_weight"),  # torch.nn.MultiheadAttention
    ("out_proj", "q_proj_weight"),  # the same, with keys or values of another width
    ("[qkv]_proj|out_proj", "gru_rel_pos_const"),  # WavLM
    ("dt_proj", "A_log"),  # Mamba, Falcon-Mamba, Jamba
    (r"tdnn\.\d+\.kernel", None),  # x-vectors of Wav2Vec2 and its kin
    (r"encoder\.rel_pos(_[xy])?_bias", None),  # LayoutLMv2, LayoutLMv3
    (r"bbox_attention\.k_(proj|linear)", None),  # segmentation of DETR and its kin
    (r"cls\.predictions\.(dense|decoder)", "dense.weight"),  # MobileBERT's output layer
    (r"mlp\.router\.classifier", "e_score_correction_bias"),  # LongCat-Flash
    ("unembedding_projection", None),  # NeoMME
)
_UNCALLED = tuple((re.compile(rf"(.*\.)?({layer})"), beside) for layer, beside in UNCALLED)


def current(name: str) -> str:
    """A stored name as transformers spells it today."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def is_ignored(name: str, info: TensorInfo, config: Mapping[str, Any]) -> bool:
    """True for what transformers does not load: buffers that it computes itself."""
    if MASKS.search(name):  # a causal mask or the value that stands for it, no bias of a layer
        scalar = name.endswith("masked_bias")
        return scalar or len(info.shape) == 4 or info.dtype not in FLOAT_DTYPES
    if BUFFERS.search(name):
        return True
    deberta = config.get("model_type") in ("deberta", "deberta-v2")
    absolute = config.get("position_biased_input", True)
    return deberta and not absolute and "position_embeddings" in name.split(".")


def is_pretraining(name: str) -> bool:
    """True for parts of a pretrained model that a class for another task does not load."""
    known = not PRETRAINING_COMPONENTS.isdisjoint(name.split("."))
    return known or name.startswith(PRETRAINING_ROOTS)


def is_added(name: str, classes: str = "") -> bool:
    """True for parts that a fine-tuned model can have without a value in its base.

    Args:
        classes: of the fine-tuned model; what CTC learns on top of a pretrained encoder is lm_head.
    """
    speech = "ForCTC" in classes and name.startswith("lm_head.")
    added = not ADDED_COMPONENTS.isdisjoint(name.split(".")) or name.startswith("head.")
    return is_head(name) or added or speech


def is_uncalled(layer: str, parameters: Container[str]) -> bool:
    """True for a layer that its class never calls: an adapter on it has no effect in a live model.

    Args:
        parameters: names of the model's parameters.
    """
    parent, dot, _ = layer.rpartition(".")
    return any(
        pattern.fullmatch(layer) and (beside is None or f"{parent}{dot}{beside}" in parameters)
        for pattern, beside in _UNCALLED
    )


def is_of_experts(layer: str, stored: Iterable[str]) -> bool:
    """True for an expert of a mixture and for its router, which are no layers of a live model."""
    parent, _, local = layer.rpartition(".")
    router = local in ("gate", "router") and any(n.startswith(f"{parent}.experts.") for n in stored)
    return router or bool(EXPERTS.search(layer))


def renames_layers(config: Mapping[str, Any]) -> bool:
    """True for a class that calls the linear layers of its files otherwise, or holds such a one."""
    inner = (value for value in config.values() if isinstance(value, Mapping))
    return config.get("model_type") in RENAMING or any(map(renames_layers, inner))


def is_table(name: str) -> bool:
    """True for the embedding of a vocabulary."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and layer.rpartition(".")[2] in TABLES


def is_output(name: str) -> bool:
    """True for the output layer of a language model."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and any(matches(layer, o) for o in ALL_OUTPUTS - VAGUE)


def is_vocabulary(name: str) -> bool:
    """True for tensors with a row for every token: embeddings, output layers and their biases."""
    layer, _, kind = name.rpartition(".")
    weight = f"{layer}.weight"
    biased = kind == "bias" and (is_output(weight) or is_output(f"{layer}.decoder.weight"))
    return is_table(name) or is_output(name) or biased or layer in VAGUE or token_axis(name) > 0


def token_axis(name: str) -> int:
    """Where the tokens are in a tensor of ``is_vocabulary``: BART's bias of the logits is a row."""
    return int(name.rpartition(".")[2] == "final_logits_bias")


def is_language_model(config: Mapping[str, Any]) -> bool:
    """True for a class that has an output layer over the vocabulary."""
    return bool(LANGUAGE_MODELS.fullmatch(class_of(config)))


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the output layer is the embedding; None where the configuration does not tell."""
    inner = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if _scales_by_tying(config):
        return True
    if isinstance(inner, Mapping):
        stated = (inner.get("tie_word_embeddings") if stated is None else stated) or None
    return stated if stated is not None else config.get("model_type") in TIED_TYPES or None


def tied_names(config: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """Name that a checkpoint may lack -> the stored name whose values it then has.

    Where both are stored, the first is a copy if the values are equal; else they are not tied.

    Args:
        stored: the checkpoint's tensors.
    """
    known = set(stored)
    roots = {n.partition(".")[0] for n in known}
    kind = str(config.get("model_type"))
    further = FURTHER.get(kind, {})
    pairs = {c: s for c, s in further.items() if s in known and c.partition(".")[0] in roots}
    for shared, name in ((n, SHARED[end]) for n in known for end in SHARED if matches(n, end)):
        sides = [".".join([*shared.split(".")[:-2], side, ""]) for side in SIDES]
        there = [side for side in sides if any(n.startswith(side) for n in known)]
        pairs |= {f"{side}{name}.weight": shared for side in there}
    tables = [n for n in known - pairs.keys() if is_table(n) and _is_decoders(n, known)]
    if tables:
        for output in _outputs(config, known):
            pairs[output] = min(tables, key=lambda n: _distance(output, n))
    layers = {*_bert_outputs(known), OUTPUTS.get(kind, "")}
    for copy in {f"{layer}.bias" for layer in layers} | known:
        if own := tied_bias(copy):
            pairs |= {copy: own} if own in known else {own: copy} if copy in known else {}
    return pairs


def _outputs(config: Mapping[str, Any], known: set[str]) -> set[str]:
    """Names of output layers that are the embedding, whether or not they are stored."""
    # decoder.transformer.wte of a model made of two: decoder.lm_head
    nested = "decoder." if class_of(config).endswith("EncoderDecoderModel") else ""
    of = config.get("decoder") if nested else config
    inner = of if isinstance(of, Mapping) else {}
    tied, found = is_tied(inner), set[str]()
    if tied is False:
        return found
    if is_language_model(config):
        found = {f"{layer}.weight" for layer in _bert_outputs(known)}
        if not found and not class_of(config).endswith("ForPreTraining"):
            output = f"{nested}{OUTPUTS.get(str(inner.get('model_type')), 'lm_head')}.weight"
            # older files of larger models: language_model.lm_head.weight is the layer, no copy
            found = set() if any(n.endswith(f".{output}") for n in known) else {output}
    # a file can hold an output layer that the class of its configuration lacks
    return found | {n for n in known if is_output(n)} if tied else found - known


def _bert_outputs(known: set[str]) -> Iterator[str]:
    for layer, sign in BERT_OUTPUTS.items():
        yield from (f"{r}{layer}" for r in ("", "decoder.", "text_decoder.") if r + sign in known)


def _is_decoders(table: str, known: set[str]) -> bool:
    """False for the embedding of an encoder beside a decoder's, or of positions and types."""
    parts = table.split(".")
    if "encoder" in parts and any("decoder" in n.split(".") for n in known):
        return False
    parent = parts[-3] if len(parts) > 2 else None
    return parts[-2] != "embeddings" or parent in (None, "backbone", "transformer", "rwkv")


def _distance(name: str, table: str) -> tuple[int, int, str]:
    """Order of candidates: in the same part of a larger model first, then as TABLES lists them."""
    pairs = zip(name.split("."), table.split("."), strict=False)
    common = next((i for i, (x, y) in enumerate(pairs) if x != y), 0)
    return -common, TABLES.index(table.split(".")[-2]), table


def class_of(config: Mapping[str, Any]) -> str:
    """The name of the model's class, empty if the configuration does not say it."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def stored_output(name: str, stored: Container[str]) -> str:
    """A parameter or layer under the name that the file has for the output layer."""
    layer, dot, rest = name.partition(".")
    old = OLD_OUTPUTS.get(layer, layer)
    renamed = f"{layer}.weight" not in stored and f"{old}.weight" in stored
    return f"{old}{dot}{rest}" if renamed else name


def resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The configuration of a model whose vocabulary has other rows."""
    nested = {k: resized(v, old, new) for k, v in config.items() if isinstance(v, dict)}
    own = {"vocab_size": new} if config.get("vocab_size") == old else {}
    return {**config, **nested, **own}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose tied weights now differ.

    T5 and its kin read ``tie_word_embeddings`` as the scale of the last layer, too, and keep it.
    Two different stored tensors are not tied on loading.
    """
    if _scales_by_tying(config):
        return dict(config)
    parts = ("decoder", "text_config")
    nested = {k: untied(config[k]) for k in parts if isinstance(config.get(k), dict)}
    return {**config, **nested, "tie_word_embeddings": False}


def _scales_by_tying(config: Mapping[str, Any]) -> bool:
    kind = str(config.get("model_type"))
    return "t5" in kind or kind in ("switch_transformers", "pop2piano", "udop")
