"""Two-layer models of every supported architecture, and modules for them: seeded, no network.

Hidden size 32, 4 heads, feed-forward 48, vocabulary 96, in eval mode. Weights are spread wider
than a fresh initialisation so that each layer matters to the logits, and biases are not zero.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.copies import Mould
from torch import Tensor, nn

from pem_composition.adapters import fresh_module, resolve_targets
from pem_composition.config import IA3Config, LoraConfig
from pem_composition.module import PEM

VOCABULARY, HIDDEN, FORWARD, HEADS, LABELS = 96, 32, 48, 4, 3

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": FORWARD,
    "max_position_embeddings": 66,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def _sequence(name: str, config: type, **options: object) -> Callable[[], nn.Module]:
    model = getattr(transformers, f"{name}ForSequenceClassification")
    return lambda: model(config(**{**_ENCODER, **_SPECIAL, "num_labels": LABELS, **options}))


def _causal(name: str, **options: object) -> Callable[[], nn.Module]:
    model = getattr(transformers, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
    return lambda: model(config(**{**_DECODER, **_SPECIAL, **options}))


def _t5(**options: object) -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=FORWARD, num_layers=2,
            num_heads=HEADS, decoder_start_token_id=0, **options,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=FORWARD,
            decoder_ffn_dim=FORWARD, max_position_embeddings=66, forced_eos_token_id=2, **_SPECIAL,
        )
    )  # fmt: skip


def _distilbert() -> nn.Module:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=HIDDEN, n_layers=2, n_heads=HEADS, hidden_dim=FORWARD,
            max_position_embeddings=66, num_labels=LABELS,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=66,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=HEADS,
            **_SPECIAL,
        )
    )


def _opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, ffn_dim=FORWARD,
            num_attention_heads=HEADS, max_position_embeddings=66, word_embed_proj_dim=HIDDEN,
            **_SPECIAL,
        )
    )  # fmt: skip


_DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "roberta": _sequence("Roberta", transformers.RobertaConfig),
    "xlm-roberta": _sequence("XLMRoberta", transformers.XLMRobertaConfig),
    "bert": _sequence("Bert", transformers.BertConfig),
    "distilbert": _distilbert,
    "mpnet": _sequence("MPNet", transformers.MPNetConfig),
    "deberta-v2": _sequence("DebertaV2", transformers.DebertaV2Config),
    "deberta-v3": _sequence("DebertaV2", transformers.DebertaV2Config, **_DEBERTA),
    "bart": _bart,
    "t5": _t5,
    "t5-gated": lambda: _t5(feed_forward_proj="gated-gelu"),
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3"),
    "gemma": _causal("Gemma"),
    "gemma2": _causal("Gemma2"),
    "gemma3": _causal("Gemma3"),
}
NAMES = tuple(BUILDERS)
# One of a kind; with all of them a law takes seconds.
QUICK = ("roberta", "deberta-v3", "bart", "t5-gated", "gpt2", "llama", "gemma3")
EACH = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]


def tiny(name: str, *, seed: int = 0) -> nn.Module:
    """The model of that name, in float32 and eval mode; equal seeds give equal weights."""
    return _built(name, seed, torch.get_default_dtype())()


@functools.lru_cache(maxsize=64)
def _built(name: str, seed: int, dtype: torch.dtype) -> Mould[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Mould(model.eval())


def write_text_to_text(
    folder: Path, texts: Iterable[str], *, dropout: float = 0.0, seed: int = 0
) -> Path:
    """A Flan-like T5 on disk: gated, output embeddings of its own, a tokenizer learned from texts.

    As in the published files, ``tie_word_embeddings`` is false, which transformers 5 overrides.
    """
    save_text_tokenizer(folder, texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _t5(feed_forward_proj="gated-gelu", dropout_rate=dropout, tie_word_embeddings=False)
        own = torch.randn(VOCABULARY, HIDDEN)
        model.all_tied_weights_keys.pop("lm_head.weight")
        model.lm_head.weight = nn.Parameter(own)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def write_causal(
    folder: Path, name: str, texts: Iterable[str], *, dropout: float = 0.0, seed: int = 0
) -> Path:
    """A GPT-2 or Llama on disk, with a tokenizer that has no padding token.

    As with the published ones, Llama's texts begin with <s>, and GPT-2's start and end token are
    one and nothing is added.
    """
    from tokenizers import processors

    core = _byte_pairs(texts, ["<s>", "<unk>", "</s>"])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "</s>"}
    if name == "llama":
        names["bos_token"] = "<s>"
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    model = tiny(name, seed=seed)
    for setting in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(model.config, setting):
            setattr(model.config, setting, dropout)
    model.save_pretrained(folder)
    return folder


def save_text_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Byte pairs in T5's manner: <pad> 0, </s> 1 at the end of every text, <unk> 2."""
    from tokenizers import processors

    core = _byte_pairs(texts, ["<pad>", "</s>", "<unk>"])
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def _byte_pairs(texts: Iterable[str], special: list[str]) -> Any:
    """A tokenizer of at most VOCABULARY pieces, learned from texts; special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return core


def inputs_for(
    model: nn.Module, *, rows: int = 2, length: int = 9, seed: int = 0
) -> dict[str, Tensor]:
    """A batch of random token ids without special tokens, and decoder ids where needed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :4]
    return batch


def logits_of(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """The model's logits on a batch (default ``inputs_for(model)``), with gradients if enabled."""
    return model(**(batch or inputs_for(model))).logits


def random_module(
    model: nn.Module,
    kind: str = "lora",
    *,
    seed: int = 0,
    placement: str = "peft",
    head_seed: int | None = None,
    **options: object,
) -> PEM:
    """A module with every tensor random, on the model's default targets.

    ``options`` go to LoraConfig (r=4, alpha=6 unless given); ``head_seed`` also draws a new head.
    """
    targets = resolve_targets(model, kind, placement=placement)
    if kind == "lora":
        config = LoraConfig(
            **{"r": 4, "alpha": 6, "target_modules": targets.target_modules, **options}
        )
    else:
        config = IA3Config(targets.target_modules, targets.feedforward_modules)
    module = fresh_module(model, config, seed=seed, blocks=targets.blocks)
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = dict(module.tensors)
    for name, tensor in module.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        role = name.rpartition(".")[2]
        if role == "lora_B":
            tensors[name] = 0.3 * noise
        elif role == "ia3":
            tensors[name] = 1 + 0.3 * noise
        elif role == "head" and head_seed is not None:
            own = torch.Generator().manual_seed(head_seed)
            tensors[name] = 0.3 * torch.randn(tensor.shape, generator=own)
    return replace(module, tensors=tensors, name=f"{kind}{seed}")


def moved(model: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """The model after a random step of every parameter, in place, as if it had been tuned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def write_modules(root: Path, name: str, models: Mapping[str, int]) -> Path:
    """a, b, c: LoRA; wide: LoRA of rank 6; i, j: (IA)^3; all with heads. And models by seed."""
    model = tiny(name)
    for seed, label in enumerate("abc", start=1):
        random_module(model, seed=seed, head_seed=seed).save(root / label)
    random_module(model, seed=4, r=6, head_seed=4).save(root / "wide")
    for seed, label in enumerate("ij", start=5):
        random_module(model, "ia3", seed=seed, head_seed=seed).save(root / label)
    for label, seed in models.items():
        tiny(name, seed=seed).save_pretrained(root / label)
    return root


def equal(found: PEM, expected: PEM) -> bool:
    """Equal tensors but for what float32 rounds."""
    return found.tensors.keys() == expected.tensors.keys() and all(
        torch.allclose(found.tensors[n], expected.tensors[n], rtol=0, atol=1e-6)
        for n in found.tensors
    )
