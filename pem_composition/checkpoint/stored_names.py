"""What transformers makes of the names in a checkpoint: old spellings, buffers, ties, new parts.

The one table of it, since the arithmetic imports no transformers; ``tests/checkpoint`` compares it
with transformers 5: ``_keys_to_ignore_on_load_unexpected`` and ``_adjust_missing_and_unexpected_
keys`` (buffers), the mapping ``legacy`` of ``conversion_mapping`` (old names), and
``_tied_weights_keys`` with ``tie_weights`` (ties).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.config import is_head

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
# Embeddings of the vocabulary, and what can be tied to them, the first of a model in this order.
TABLES = (
    "shared", "embed_tokens", "word_embeddings", "word_embedding", "wte", "embed_in",
    "tok_embeddings", "tokens_embed", "embeddings",
)  # fmt: skip
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # always of ``shared``
OUTPUTS = (
    "lm_head.decoder.weight", "lm_head.weight", "cls.predictions.decoder.weight",
    "predictions.decoder.weight", "vocab_projector.weight", "generator_lm_head.weight",
    "lm_loss.weight", "embed_out.weight", "proj_out.weight", "pred_layer.proj.weight",
    "decoder.weight",
)  # fmt: skip
OUTPUT_BIASES = ("lm_head.bias", "cls.predictions.bias", "predictions.bias")
# Model types whose configuration means tied embeddings where it does not say so.
TIED_TYPES = frozenset(
    {
        "albert", "bart", "bert", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
        "blenderbot-small", "bloom", "camembert", "cohere", "cohere2", "convbert", "ctrl",
        "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm",
        "falcon", "falcon_mamba", "flaubert", "funnel", "gemma", "gemma2", "gemma3",
        "gemma3_text", "gemma3n", "gemma3n_text", "gpt2", "gpt_bigcode", "gpt_neo", "ibert",
        "layoutlm", "led", "lfm2", "longformer", "longt5", "luke", "m2m_100", "mamba", "marian",
        "mbart", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mpt", "mt5", "mvp",
        "nllb-moe", "nomic_bert", "openai-gpt", "opt", "paligemma", "pegasus", "pegasus_x",
        "plbart", "roberta", "roberta-prelayernorm", "roformer", "smollm3", "speech_to_text",
        "squeezebert", "starcoder2", "switch_transformers", "t5", "t5gemma", "umt5", "whisper",
        "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "zamba", "zamba2",
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


def is_table(name: str) -> bool:
    """True for the embedding of a vocabulary."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and layer.rpartition(".")[2] in TABLES


def is_output(name: str) -> bool:
    """True for the output layer of a language model."""
    return any(ends(name, output) for output in OUTPUTS)


def is_vocabulary(name: str) -> bool:
    """True for tensors with a row for every token."""
    return is_table(name) or is_output(name) or _bias_of(name) is not None


def ends(name: str, suffix: str) -> bool:
    """True if whole components at the end of a name are these."""
    return name == suffix or name.endswith("." + suffix)


def is_tied(config: Mapping[str, Any]) -> bool:
    """True if the model's output layer is its embedding, as far as its configuration says."""
    inner = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if stated is None and isinstance(inner, Mapping):
        stated = inner.get("tie_word_embeddings")
    return config.get("model_type") in TIED_TYPES if stated is None else bool(stated)


def sharing(name: str, names: Collection[str], *, tied: bool) -> list[str]:
    """Names of a model that stand for the same tensor as ``name``, the nearest first.

    Args:
        tied: the output layer is the embedding (``is_tied``).
    """
    bias = _bias_of(name)
    if bias is not None:
        return [n for n in names if n != name and _bias_of(n) == bias]

    def stands_for(other: str) -> bool:
        one, two = (is_output(name), is_table(other)), (is_table(name), is_output(other))
        return (_is_shared(name) and _is_shared(other)) or (tied and (all(one) or all(two)))

    found = [n for n in names if n != name and stands_for(n)]
    return sorted(found, key=lambda n: _distance(name, n))


def original(name: str, names: Collection[str], *, tied: bool) -> str | None:
    """The tensor of which one stored under this name as well is a copy; None if of none."""
    bias = _bias_of(name)
    if bias is not None:
        return bias if bias != name and bias in names else None
    found: list[str] = []
    if any(ends(name, copy) for copy in COPIES):
        found = [n for n in names if ends(n, "shared.weight")]
    elif tied and is_output(name):
        found = [n for n in names if is_table(n)]
    return min(found, key=lambda n: _distance(name, n), default=None)


def _is_shared(name: str) -> bool:
    """True for the embedding of an encoder-decoder and its copies in the two halves."""
    return ends(name, "shared.weight") or any(ends(name, c) for c in COPIES)


def _bias_of(name: str) -> str | None:
    """The one name of a bias that language models store under two."""
    plain = name.replace(".decoder.bias", ".bias")
    return plain if any(ends(plain, bias) for bias in OUTPUT_BIASES) else None


def _distance(name: str, other: str) -> tuple[int, int, str]:
    """Order of candidates: in the same part of a larger model first, then as TABLES lists them."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    common = next((i for i, (x, y) in enumerate(pairs) if x != y), 0)
    layer = other.rpartition(".")[0].rpartition(".")[2]
    return -common, TABLES.index(layer) if is_table(other) else len(TABLES), other
