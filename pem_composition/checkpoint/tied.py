"""Which parameters of a checkpoint are one: the tied weights of its model class, by name.

transformers stores one of several tied names and gives the others its values on loading. Names and
files are all there is to tell by here, no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

# Word embeddings, and what stands before them.
EMBEDDING = re.compile(
    r"(?P<root>.*\.)?(?P<kind>embed_tokens|wte|word_embeddings|embeddings|tokens_embed|embed_in|"
    r"shared|word_embedding|w)\.weight"
)
BERT_EMBEDDING = re.compile(r"(.*\.)?embeddings\.(word|tok)_embeddings\.weight")
LANGUAGE_MODELS = re.compile(
    r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration|EncoderDecoderModel|DoubleHeadsModel|"
    r"ForMaskedLM|ForPreTraining|ForCausalImageModeling|ForVisionText2Text|MarianMTModel|"
    r"BertGenerationDecoder|ReformerModelWithLMHead)"
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
# Embedding of a model of two sides -> what each side calls it.
SIDES = {"shared": "embed_tokens", "prophetnet.word_embeddings.weight": "word_embeddings"}
DISCRIMINATOR = "discriminator_predictions.dense.weight"  # ELECTRA's, which has no output layer
# Model type -> its output layer, where it is not lm_head.
OUTPUTS = {
    **dict.fromkeys(("whisper", "moonshine", "moonshine_streaming", "canary"), "proj_out"),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    **dict.fromkeys(("xlm", "flaubert"), "pred_layer.proj"),
    **dict.fromkeys(("t5gemma", "t5gemma2"), "lm_head.out_proj"),
    "bert-generation": "lm_head.decoder",
    "xlnet": "lm_loss",
    "rwkv": "head",
    "git": "output",
}


# How a model names its output layer now -> how files and older modules do (GPT-NeoX).
OLD_OUTPUTS = {"lm_head": "embed_out"}


def stored_output(name: str, stored: Container[str]) -> str:
    """A parameter or layer under the name that the file has for the output layer."""
    layer, dot, rest = name.partition(".")
    old = OLD_OUTPUTS.get(layer, layer)
    renamed = f"{layer}.weight" not in stored and f"{old}.weight" in stored
    return f"{old}{dot}{rest}" if renamed else name


def is_language_model(config: Mapping[str, Any]) -> bool:
    """True for a class that has an output layer over the vocabulary."""
    return bool(LANGUAGE_MODELS.fullmatch(_class_of(config)))


def tied_names(config: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """Name that a checkpoint may lack -> the stored name whose values it then has.

    Args:
        stored: the checkpoint's tensors.
    """
    known = set(stored)
    pairs: dict[str, str] = {}
    for source in sorted(known):
        pairs |= dict.fromkeys(_copies(source, known, config), source)
    for layer, sign in BERT_OUTPUTS.items():
        stem, _, last = layer.rpartition(".")
        named = sign in known or OUTPUTS.get(str(config.get("model_type"))) == layer
        if stem and last == "decoder" and named:
            own, copy = f"{stem}.bias", f"{layer}.bias"
            pairs |= {copy: own} if own in known else {own: copy} if copy in known else {}
    return pairs


def _copies(source: str, known: set[str], config: Mapping[str, Any]) -> list[str]:
    """Names that are tied to one embedding."""
    match = EMBEDDING.fullmatch(source)
    has_output = is_language_model(config)
    if BERT_EMBEDDING.fullmatch(source):
        outputs = [layer for layer, sign in BERT_OUTPUTS.items() if sign in known and has_output]
        if outputs or DISCRIMINATOR in known:
            return [f"{layer}.weight" for layer in outputs]
    if not match:
        return []
    root, copies = match["root"] or "", []
    if name := SIDES.get(source.split(".")[-2] if match["kind"] == "shared" else source):
        sides = [f"{root}{side}." for side in ("encoder", "decoder")]
        copies = [f"{s}{name}.weight" for s in sides if any(n.startswith(s) for n in known)]
    if has_output and _is_decoders(source, known):
        # decoder.transformer.wte of a model made of two: decoder.lm_head
        of_two = _class_of(config).endswith("EncoderDecoderModel")
        nested = "decoder." if root.startswith("decoder.") and of_two else ""
        of = config.get("decoder") if nested else config
        inner = of if isinstance(of, Mapping) else {}
        if not _says_untied(inner):
            copies.append(f"{nested}{OUTPUTS.get(str(inner.get('model_type')), 'lm_head')}.weight")
    return copies


def _is_decoders(source: str, known: set[str]) -> bool:
    """False for the embedding of an encoder beside a decoder's, or of positions and types."""
    parts = source.split(".")
    if "encoder" in parts and any("decoder" in n.split(".") for n in known):
        return False
    if parts[-2] == "embeddings":
        return parts[-3:-2] in (["backbone"], ["transformer"], ["rwkv"])
    return not ("embed_tokens" in parts and any(_is_shared(n) for n in known))


def _is_shared(name: str) -> bool:
    return name.split(".")[-2:] == ["shared", "weight"]


def _class_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def is_vocabulary(name: str, shape: tuple[int, ...], rows: int) -> bool:
    """True for word embeddings, output layers and their biases, of that many rows."""
    if shape[:1] != (rows,):
        return False
    layer = name.rpartition(".")[0]
    outputs = {
        *OLD_OUTPUTS,
        *OLD_OUTPUTS.values(),
        *BERT_OUTPUTS,
        *(k.rpartition(".")[0] for k in BERT_OUTPUTS if "." in k),
    }
    return bool(EMBEDDING.fullmatch(name) or BERT_EMBEDDING.fullmatch(name)) or any(
        layer == o or layer.endswith("." + o) for o in outputs | set(OUTPUTS.values())
    )


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


def _says_untied(config: Mapping[str, Any]) -> bool:
    """True where the output layer is a tensor of its own, maybe stored under another name
    (GPT-NeoX: embed_out)."""
    own = config.get("tie_word_embeddings") is False and not _scales_by_tying(config)
    return own and not isinstance(config.get("text_config"), Mapping)


def _scales_by_tying(config: Mapping[str, Any]) -> bool:
    kind = str(config.get("model_type"))
    return "t5" in kind or kind in ("switch_transformers", "pop2piano", "udop")
