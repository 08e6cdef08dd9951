"""One module, one meaning: tiny models, modules as PEFT makes them, and every way through here.

A cell is a model, a request to PEFT and a way through the project; its result is compared with the
live PEFT model that wrote the module. ``cells`` yields them, ``verdict`` judges one.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from support.copies import Mould
from torch import Tensor, nn

import pem_composition as pem
from pem_composition.checkpoint import fold_checkpoint, load
from pem_composition.checkpoint.extraction import extract_lora
from pem_composition.errors import PEMError
from pem_composition.safe_files import read_json

V, D, F, H, N = 56, 16, 24, 4, 3  # vocabulary, width, feed-forward, heads, classes
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2,
    "num_attention_heads": H, "max_position_embeddings": 40,
}  # fmt: skip
DECODER = {**ENCODER, **SPECIAL, "num_key_value_heads": 2, "head_dim": 8}
TOLERANCE = 3e-5  # of the largest logit; float32 through two layers


# --- models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A tiny model and the names of its parts that requests are made of."""

    name: str
    build: Callable[[], nn.Module]
    auto: Any  # the class that opens its folder
    attention: tuple[str, ...]
    forward: tuple[str, ...]  # linear layers of the feed-forward block, the last one second
    stack: str  # the list of layers
    norm: str | None = None
    embedding: str | None = None
    output: str | None = None  # output embeddings
    head: str | None = None  # what a task adds
    task: str | None = None
    inputs: str = "text"
    more: dict[str, dict[str, Any]] = field(default_factory=dict)  # requests of its own


def _bert(kind: str, task: str, **options: Any) -> Callable[[], nn.Module]:
    config = getattr(hf, f"{kind}Config")
    model = getattr(hf, f"{kind}{task}")
    return lambda: model(config(**{**ENCODER, **SPECIAL, **options}))


def _causal(kind: str, task: str = "ForCausalLM", **options: Any) -> Callable[[], nn.Module]:
    config = getattr(hf, f"{kind}Config")
    model = getattr(hf, f"{kind}{task}")
    return lambda: model(config(**{**DECODER, **options}))


def _distilbert() -> nn.Module:
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=V, dim=D, n_layers=2, n_heads=H, hidden_dim=F, num_labels=N,
            max_position_embeddings=40,
        )
    )  # fmt: skip


def _gpt2(task: str, **options: Any) -> nn.Module:
    sizes = {"vocab_size": V, "n_positions": 40, "n_embd": D, "n_layer": 2, "n_head": H}
    return getattr(hf, f"GPT2{task}")(hf.GPT2Config(**{**sizes, **SPECIAL, **options}))


def _t5(**options: Any) -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=V, d_model=D, d_kv=4, d_ff=F, num_layers=2, num_heads=H,
            decoder_start_token_id=0, **options,
        )
    )  # fmt: skip


def _bart(task: str, **options: Any) -> nn.Module:
    return getattr(hf, f"Bart{task}")(
        hf.BartConfig(
            vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=H,
            decoder_attention_heads=H, encoder_ffn_dim=F, decoder_ffn_dim=F,
            max_position_embeddings=40, forced_eos_token_id=2, **SPECIAL, **options,
        )
    )  # fmt: skip


def _gpt2_decoder() -> hf.GPT2Config:
    return hf.GPT2Config(
        vocab_size=V, n_positions=40, n_embd=D, n_layer=2, n_head=H, is_decoder=True,
        add_cross_attention=True,
    )  # fmt: skip


def _encoder_decoder() -> nn.Module:
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        hf.BertConfig(**{**ENCODER, "num_hidden_layers": 1}), _gpt2_decoder()
    )
    return hf.EncoderDecoderModel(config=config)


def _vit_config() -> hf.ViTConfig:
    return hf.ViTConfig(
        hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=H,
        image_size=8, patch_size=4, num_labels=N,
    )  # fmt: skip


def _vision_encoder_decoder() -> nn.Module:
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        _vit_config(), _gpt2_decoder()
    )
    return hf.VisionEncoderDecoderModel(config=config)


def _lfm2() -> nn.Module:
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    sizes = {**DECODER, "num_hidden_layers": 5, "block_multiple_of": 8}
    sizes.pop("head_dim")
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**sizes, layer_types=kinds))


def _modernbert(task: str) -> nn.Module:
    config = hf.ModernBertConfig(
        **ENCODER, **SPECIAL, cls_token_id=3, sep_token_id=4, num_labels=N,
        reference_compile=False, attn_implementation="eager",
    )  # fmt: skip
    return getattr(hf, f"ModernBert{task}")(config)


def _mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=2, time_step_rank=2,
            **SPECIAL,
        )
    )  # fmt: skip


def _gpt_oss() -> nn.Module:
    sizes = {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**sizes))


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)
    )


BERT_LIKE = {
    "attention": ("query", "value"), "forward": ("intermediate.dense", "output.dense"),
    "stack": "layer", "norm": "LayerNorm", "embedding": "word_embeddings",
}  # fmt: skip
LLAMA_LIKE = {
    "attention": ("q_proj", "v_proj"), "forward": ("up_proj", "down_proj"), "stack": "layers",
    "norm": "input_layernorm", "embedding": "embed_tokens", "output": "lm_head",
}  # fmt: skip
GPT2_LIKE = {
    "attention": ("c_attn",), "forward": ("c_fc", "mlp.c_proj"), "stack": "h", "norm": "ln_1",
    "embedding": "wte", "output": "lm_head",
}  # fmt: skip
BART_LIKE = {
    "attention": ("q_proj", "v_proj"), "forward": ("fc1", "fc2"), "stack": "layers",
    "norm": "final_layer_norm", "embedding": "shared",
}  # fmt: skip
T5_LIKE = {
    "attention": ("q", "v"), "stack": "block", "norm": "final_layer_norm", "embedding": "shared",
    "output": "lm_head", "task": "SEQ_2_SEQ_LM", "inputs": "pair",
}  # fmt: skip
CLS, LM = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM
MLM, S2S = hf.AutoModelForMaskedLM, hf.AutoModelForSeq2SeqLM

EXPERTS = {
    "one stack": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "two stacks": {
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {r".*\.1\..*gate_up_proj": 7},
        "use_rslora": True,
    },
}  # fmt: skip

MODELS = [
    Model("roberta", _bert("Roberta", "ForSequenceClassification", num_labels=N), CLS,
          head="classifier", task="SEQ_CLS", **BERT_LIKE),
    Model("roberta binary", _bert("Roberta", "ForSequenceClassification"), CLS,
          head="classifier", task="SEQ_CLS", **BERT_LIKE),
    Model("roberta mlm", _bert("Roberta", "ForMaskedLM"), MLM, output="lm_head.decoder",
          head="lm_head", more={"part of the head": {"modules_to_save": ["lm_head.dense"]}},
          **BERT_LIKE),
    Model("roberta choice", _bert("Roberta", "ForMultipleChoice"),
          hf.AutoModelForMultipleChoice, head="classifier", inputs="choices", **BERT_LIKE),
    Model("roberta tokens", _bert("Roberta", "ForTokenClassification", num_labels=N),
          hf.AutoModelForTokenClassification, head="classifier", task="TOKEN_CLS", **BERT_LIKE),
    Model("roberta bare", _bert("Roberta", "Model"), hf.AutoModel, head="pooler", **BERT_LIKE),
    Model("bert", _bert("Bert", "ForSequenceClassification", num_labels=N), CLS,
          head="classifier", task="SEQ_CLS", **BERT_LIKE),
    Model("bert regression", _bert("Bert", "ForSequenceClassification", num_labels=1), CLS,
          head="classifier", task="SEQ_CLS", **BERT_LIKE),
    Model("bert mlm", _bert("Bert", "ForMaskedLM"), MLM, output="cls.predictions.decoder",
          head="cls", more={"part of the head": {"modules_to_save": ["predictions.transform"]}},
          **BERT_LIKE),
    Model("bert answers", _bert("Bert", "ForQuestionAnswering"), hf.AutoModelForQuestionAnswering,
          head="qa_outputs", task="QUESTION_ANS", **BERT_LIKE),
    Model("distilbert", _distilbert, CLS, ("q_lin", "v_lin"), ("lin1", "lin2"), "layer",
          "sa_layer_norm", "word_embeddings", head="classifier", task="SEQ_CLS",
          more={"both heads": {"modules_to_save": ["pre_classifier", "classifier"]}}),
    Model("gpt2", lambda: _gpt2("LMHeadModel"), LM, task="CAUSAL_LM", **GPT2_LIKE),
    Model("gpt2 untied", lambda: _gpt2("LMHeadModel", tie_word_embeddings=False), LM,
          task="CAUSAL_LM", **GPT2_LIKE),
    Model("gpt2 classifier", lambda: _gpt2("ForSequenceClassification", num_labels=N), CLS,
          head="score", task="SEQ_CLS", **{**GPT2_LIKE, "output": None}),
    Model("llama", _causal("Llama"), LM, task="CAUSAL_LM", **LLAMA_LIKE),
    Model("llama tied", _causal("Llama", tie_word_embeddings=True), LM, task="CAUSAL_LM",
          **LLAMA_LIKE),
    Model("llama classifier", _causal("Llama", "ForSequenceClassification", num_labels=N), CLS,
          head="score", task="SEQ_CLS", **{**LLAMA_LIKE, "output": None}),
    Model("qwen2", _causal("Qwen2", tie_word_embeddings=True), LM, task="CAUSAL_LM", **LLAMA_LIKE),
    Model("gemma", _causal("Gemma"), LM, task="CAUSAL_LM", **LLAMA_LIKE),
    Model("gpt neox", _bert("GPTNeoX", "ForCausalLM"), LM, ("query_key_value",),
          ("dense_h_to_4h", "dense_4h_to_h"), "layers", "input_layernorm", "embed_in", "lm_head",
          task="CAUSAL_LM"),
    Model("t5", _t5, S2S, forward=("wi", "wo"), **T5_LIKE),
    Model("t5 untied", lambda: _t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"), S2S,
          forward=("wi_1", "wo"), **T5_LIKE),
    Model("bart", lambda: _bart("ForConditionalGeneration"), S2S, output="lm_head",
          task="SEQ_2_SEQ_LM", inputs="pair", **BART_LIKE),
    Model("bart classifier", lambda: _bart("ForSequenceClassification", num_labels=N), CLS,
          head="classification_head", task="SEQ_CLS", inputs="ends", **BART_LIKE),
    Model("bert to gpt2", _encoder_decoder, hf.EncoderDecoderModel, ("query", "c_attn"),
          ("c_fc", "mlp.c_proj"), "h", "ln_1", "wte", "decoder.lm_head", inputs="pair"),
    Model("vit to gpt2", _vision_encoder_decoder, hf.VisionEncoderDecoderModel,
          ("q_proj", "q_attn"), ("c_fc", "mlp.c_proj"), "h", "ln_1", "wte", "decoder.lm_head",
          inputs="image pair"),
    Model("mixtral", _mixtral, LM, ("q_proj", "v_proj"), ("k_proj", "o_proj"), "layers",
          "input_layernorm", "embed_tokens", "lm_head", task="CAUSAL_LM", more=EXPERTS),
    Model("gpt oss", _gpt_oss, LM, ("q_proj", "v_proj"), ("k_proj", "o_proj"), "layers",
          "input_layernorm", "embed_tokens", "lm_head", task="CAUSAL_LM", more=EXPERTS),
    Model("lfm2", _lfm2, LM, ("q_proj", "v_proj"), ("w1", "w2"), "layers", "operator_norm",
          "embed_tokens", "lm_head", task="CAUSAL_LM",
          more={"convolution": {"target_modules": ["q_proj", "in_proj"]},
                "shared name": {"target_modules": ["q_proj", "out_proj"]}}),
    Model("modernbert", lambda: _modernbert("ForSequenceClassification"), CLS, ("Wqkv",),
          ("Wi", "mlp.Wo"), "layers", "mlp_norm", "tok_embeddings", head="classifier",
          task="SEQ_CLS", more={"both heads": {"modules_to_save": ["head", "classifier"]}}),
    Model("modernbert mlm", lambda: _modernbert("ForMaskedLM"), MLM, ("Wqkv",), ("Wi", "mlp.Wo"),
          "layers", "mlp_norm", "tok_embeddings", "decoder", head="head"),
    Model("vit", lambda: hf.ViTForImageClassification(_vit_config()),
          hf.AutoModelForImageClassification, ("q_proj", "v_proj"), ("fc1", "fc2"), "layer",
          "layernorm_before", head="classifier", inputs="image",
          more={"patches": {"target_modules": ["q_proj", "projection"]}}),
    Model("mamba", _mamba, LM, ("in_proj",), ("x_proj", "out_proj"), "layers", "norm",
          "embeddings", "lm_head", task="CAUSAL_LM"),
]  # fmt: skip
BY_NAME = {m.name: m for m in MODELS}


@functools.cache
def built(name: str) -> nn.Module:
    """The model, its weights spread so that every one matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BY_NAME[name].build()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def inputs(kind: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(5, V, (2, 7), generator=g)
    image = torch.randn(2, 3, 8, 8, generator=g)
    if kind == "ends":
        ids[:, -1] = 2
    return {
        "choices": {"input_ids": torch.stack([ids, ids.flip(1)], 1)},
        "text": {"input_ids": ids}, "ends": {"input_ids": ids}, "image": {"pixel_values": image},
        "pair": {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
        "image pair": {"pixel_values": image, "decoder_input_ids": ids[:, :4]},
    }[kind]  # fmt: skip


@torch.no_grad()
def output(model: Any, kind: str) -> Tensor:
    """Everything the model says, as one vector."""
    found = model(**inputs(kind))
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return torch.cat([t.flatten() for n in names if (t := found.get(n)) is not None])


# --- requests -----------------------------------------------------------------------------------


def requests(m: Model) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> lora or ia3, and what PEFT is asked for."""
    first, every = list(m.attention[:1]), [*m.attention, *m.forward]
    escaped = "|".join(re.escape(n) for n in every)
    saved = {
        "norm": [m.norm], "embedding": [m.embedding], "output": [m.output], "head": [m.head],
        "both": [m.embedding, m.output], "head and norm": [m.head, m.norm],
        "head and embedding": [m.head, m.embedding],
    }  # fmt: skip
    saved = {k: v for k, v in saved.items() if all(v) and (k != "both" or m.output)}
    lora: dict[str, dict[str, Any]] = {
        "one name": {"target_modules": first},
        "names": {"target_modules": every},
        "task": {"target_modules": first, "task_type": m.task},
        "pattern": {"target_modules": rf".*\.1\..*({escaped})"},
        "one layer": {"target_modules": every, "layers_to_transform": [1]},
        "one layer of a stack": {
            "target_modules": every, "layers_to_transform": 1, "layers_pattern": m.stack,
        },
        "all linear": {"target_modules": "all-linear"},
        "all linear, task": {"target_modules": "all-linear", "task_type": m.task},
        "excluded": {"target_modules": every, "exclude_modules": list(m.forward[:1])},
        "fan_in_fan_out": {"target_modules": every, "fan_in_fan_out": True},
        "rslora": {"target_modules": every, "use_rslora": True},
        "patterns": {
            "target_modules": every, "rank_pattern": {every[0]: 3}, "alpha_pattern": {every[-1]: 7},
        },
        "patterns by expression": {
            "target_modules": every,
            "rank_pattern": {rf".*\.0\..*{re.escape(every[0])}": 3},
            "alpha_pattern": {rf"{m.stack}\.\d+\..*{re.escape(every[-1])}": 7},
        },
        "bias": {"target_modules": every, "bias": "lora_only"},
        "dora": {"target_modules": every, "use_dora": True},
    }  # fmt: skip
    lora |= {
        f"saved {k}": {"target_modules": first, "modules_to_save": v} for k, v in saved.items()
    }
    if m.output:
        lora["on the output"] = {"target_modules": [*first, m.output]}
        lora["on the output alone"] = {"target_modules": [m.output]}
    if m.embedding:
        lora["on the embedding"] = {"target_modules": [*first, m.embedding]}
    if m.head:
        lora["on the head"] = {"target_modules": "all-linear", "modules_to_save": [m.head]}
    lora |= {k: {"target_modules": first, **v} for k, v in m.more.items()}
    ia3: dict[str, dict[str, Any]] = {
        "outputs": {"target_modules": first, "feedforward_modules": []},
        "both sides": {"target_modules": every, "feedforward_modules": list(m.forward[-1:])},
        "task": {
            "target_modules": every, "feedforward_modules": list(m.forward[-1:]),
            "task_type": m.task,
        },
        "pattern": {
            "target_modules": rf".*\.1\..*({escaped})",
            "feedforward_modules": rf".*{re.escape(m.forward[-1])}",
        },
    }  # fmt: skip
    ia3 |= {
        f"saved {k}": {"target_modules": first, "feedforward_modules": [], "modules_to_save": v}
        for k, v in saved.items()
    }
    out = {k: ("lora", v) for k, v in lora.items() if "task" not in k or m.task}
    out |= {f"ia3 {k}": ("ia3", v) for k, v in ia3.items() if k != "task" or m.task}
    twice = full_suffix(built(m.name), first[0])
    if twice:
        out["named twice"] = ("lora", {"target_modules": [first[0], twice]})
    return out


def full_suffix(model: nn.Module, name: str) -> str | None:
    """A longer name of the same layers."""
    hits = [n for n, _ in model.named_modules() if n.endswith("." + name)]
    return ".".join(hits[0].split(".")[-name.count(".") - 2 :]) if hits else None


# --- the oracle ---------------------------------------------------------------------------------


@dataclass
class Made:
    """A module that PEFT wrote, its base's folder, and what the live model says."""

    model: Model
    kind: str
    base: Path
    module: Path
    before: Tensor
    want: Tensor
    task: str | None
    reloads: bool = True  # PEFT opens what it wrote

    def fresh(self) -> Any:
        return fresh(self.model, self.base)

    def peft(self, folder: Path) -> Tensor:
        """What PEFT says with a folder; what it cannot open of its own is attached here."""
        import peft

        if folder.name in ("saved", "one", "delta", "sum"):  # the task is PEFT's, or none
            task = read_json(folder / "adapter_config.json", folder)
            if self.task is None or task["modules_to_save"]:  # without a head it is left out
                assert task["task_type"] == self.task, task["task_type"]
        if not self.reloads:
            model = self.fresh()
            with pem.attach(model, load(folder)):
                return output(model, self.model.inputs)
        with quiet():
            model = peft.PeftModel.from_pretrained(self.fresh(), folder)
        return output(model.eval(), self.model.inputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def opened(m: Model, folder: Path, **options: Any) -> Any:
    with quiet():
        return m.auto.from_pretrained(folder, **options)


@functools.lru_cache(maxsize=1)
def _opened_base(name: str, folder: Path) -> tuple[Mould[Any], Tensor]:
    """The model that a folder holds, and what it says."""
    m = BY_NAME[name]
    model = opened(m, folder).eval()
    return Mould(model), output(model, m.inputs)


def fresh(m: Model, folder: Path) -> Any:
    """A copy of the base as its folder opens, which is quicker than opening it again."""
    return _opened_base(m.name, folder)[0]()


def base_folder(m: Model, root: Path) -> Path:
    folder = root / "bases" / m.name.replace(" ", "-")
    if not folder.exists():
        built(m.name).save_pretrained(folder)
    return folder


def made(m: Model, kind: str, options: dict[str, Any], base: Path, folder: Path) -> Made:
    """Let PEFT make a module, give every trained number a value of its own, and save it."""
    import peft

    model, before = fresh(m, base), _opened_base(m.name, base)[1]
    options = {k: v for k, v in options.items() if v is not None}
    config: Any
    if kind == "lora":
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    else:
        config = peft.IA3Config(**options)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        adapted = peft.get_peft_model(model, config).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad:
                size = 0.3 if "lora_" in name or "ia3" in name else 0.15
                p.add_(size * torch.randn(p.shape, generator=g))
    want = output(adapted, m.inputs)
    with quiet():
        adapted.save_pretrained(folder)
    return Made(m, kind, base, folder, before, want, options.get("task_type"))


# --- ways ---------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Every number of a model, and which parameters are one."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    names: dict[int, str] = {}
    pairs = []
    for n, p in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(p), n)
        if first != n:
            pairs.append((first, n))
    return state, sorted(pairs)


def same_model(model: nn.Module, before: Any) -> None:
    state, pairs = snapshot(model)
    assert state.keys() == before[0].keys() and pairs == before[1], "the model is another"
    assert all(torch.equal(t, before[0][n]) for n, t in state.items()), "numbers are others"


def way_attach(c: Made, work: Path) -> Tensor:
    model = c.fresh()
    before = snapshot(model)
    try:
        with pem.attach(model, load(c.module)):
            return output(model, c.model.inputs)
    finally:
        same_model(model, before)


def way_live_fold(c: Made, work: Path) -> Tensor:
    model = c.fresh()
    before = snapshot(model)
    folded = None
    try:
        folded = pem.fold(model, load(c.module))
        return output(model, c.model.inputs)
    finally:
        if folded:
            folded.restore()
        same_model(model, before)


def folded(c: Made, work: Path) -> Path:
    out = work / "folded"
    if not out.exists():
        fold_checkpoint("a", {"a": c.module}, c.base, out)
    return out


def way_fold(c: Made, work: Path) -> Tensor:
    model, info = opened(c.model, folded(c, work), output_loading_info=True)
    for what, names in info.items():
        assert not names, f"{what}: {sorted(names)[:3]}"
    return output(model.eval(), c.model.inputs)


def way_fold_auto(c: Made, work: Path) -> Tensor:
    """The folder says its own class."""
    folder = folded(c, work)
    name = read_json(folder / "config.json", folder)["architectures"][0]
    with quiet():
        model = getattr(hf, name).from_pretrained(folder)
    return output(model.eval(), c.model.inputs)


def way_saved(c: Made, work: Path) -> Tensor:
    load(c.module).save(work / "saved")
    return c.peft(work / "saved")


def way_parameter(c: Made, work: Path) -> Tensor:
    pem.combine([load(c.module)], [1.0], space="parameter").save(work / "one")
    return c.peft(work / "one")


def way_delta(c: Made, work: Path) -> Tensor:
    pem.combine([load(c.module)], [1.0], space="delta").save(work / "delta")
    return c.peft(work / "delta")


def way_rank(c: Made, work: Path) -> Tensor | None:
    """Cut to the rank that it has."""
    module = load(c.module)
    if module.kind != "lora":
        return None
    rank = max(module.config.rank(layer) for layer in module.layers)
    pem.combine([module], [1.0], space="delta", rank=rank).save(work / "cut")
    return c.peft(work / "cut")


def way_negations(c: Made, work: Path) -> Tensor:
    pem.negate(pem.negate(load(c.module), 2.0), 0.5).save(work / "twice")
    return c.peft(work / "twice")


def way_sum(c: Made, work: Path) -> Tensor:
    """Another module is added and taken away again; the first one's saved parts stay."""
    a = load(c.module)
    b = replace(a, tensors={n: t.flip(0) + 0.1 for n, t in a.tensors.items()}, operands=())
    options: dict[str, Any] = {"space": "delta", "head": "first"}
    pem.combine([pem.combine([a, b], [1.0, -0.5], **options), b], [1.0, 0.5], **options).save(
        work / "sum"
    )
    return c.peft(work / "sum")


def way_average(c: Made, work: Path) -> Tensor:
    """Averaged with itself, whatever the coefficients that sum to 1."""
    a = load(c.module)
    pem.combine([a, a], [0.25, 0.75], space="delta").save(work / "average")
    return c.peft(work / "average")


def way_convert(c: Made, work: Path) -> Tensor:
    load(c.module).save(work / "there", format="adapter-transformers")
    load(work / "there").save(work / "back")
    return c.peft(work / "back")


def way_extract(c: Made, work: Path) -> Tensor | None:
    if c.kind == "ia3":
        return None
    module = extract_lora(c.base, folded(c, work), rank=F, strict=True)
    model = c.fresh()
    with pem.attach(model, module):
        return output(model, c.model.inputs)


WAYS: dict[str, Callable[[Made, Path], Tensor | None]] = {
    "attach": way_attach,
    "fold live": way_live_fold,
    "fold": way_fold,
    "fold, its own class": way_fold_auto,
    "save": way_saved,
    "parameter space": way_parameter,
    "delta space": way_delta,
    "rank": way_rank,
    "negations": way_negations,
    "sum and difference": way_sum,
    "average": way_average,
    "convert": way_convert,
    "extract": way_extract,
}


# --- verdicts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """right, refused (with the sentence) or wrong (with what happened)."""

    model: str
    request: str
    way: str
    word: str
    said: str = ""


def difference(found: Tensor, want: Tensor) -> float:
    if found.shape != want.shape:
        return float("inf")
    return float((found - want).abs().max() / want.abs().max())


def verdicts(
    root: Path,
    models: list[str] | None = None,
    wanted: Callable[[str, str], Collection[str]] = lambda model, request: WAYS,
) -> Iterator[Verdict]:
    """Every cell, or the wanted ways of each request; a request that PEFT refuses is none."""
    for name in models or list(BY_NAME):
        m = BY_NAME[name]
        base = base_folder(m, root)
        for request, (kind, options) in requests(m).items():
            ways = wanted(name, request)
            if not ways:
                continue
            work = root / "work"
            shutil.rmtree(work, ignore_errors=True)
            try:
                c = made(m, kind, options, base, work / "module")
            except Exception as error:
                yield Verdict(name, request, "peft", "peft refuses", repr(error)[:200])
                continue
            moved = difference(c.before, c.want)
            if moved < 100 * TOLERANCE:
                yield Verdict(name, request, "peft", "no case", f"moves the output by {moved:.1e}")
                continue
            try:
                again = difference(c.peft(c.module), c.want)
            except Exception as error:
                c.reloads = False
                yield Verdict(name, request, "peft", "peft cannot reload", repr(error)[:200])
            else:
                if again > TOLERANCE:
                    said = f"{again:.1e} of {moved:.1e}"
                    yield Verdict(name, request, "peft", "peft differs", said)
            for way in ways:
                verdict = verdict_of(c, way, WAYS[way], work, moved)
                if verdict:
                    yield Verdict(name, request, way, *verdict)


def verdict_of(
    c: Made, way: str, run: Callable[[Made, Path], Tensor | None], work: Path, moved: float
) -> tuple[str, str] | None:
    try:
        found = run(c, work)
    except PEMError as error:
        return "refused", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    if found is None:
        return None
    error = difference(found, c.want)
    return ("right", "") if error <= TOLERANCE else ("wrong", f"{error:.1e} of {moved:.1e}")
