"""Which layers of which architecture a module adapts: the table, and how to go beyond it.

LoRA: query and value of every attention (self and cross). (IA)^3: key and value, and the
feed-forward block in one of two placements:

- ``peft``: the input of its second linear layer (the (IA)^3 paper's and PEFT's);
- ``reference``: the output of its first linear layer, before the activation (the code behind the
  paper). In a gated block that is the layer without the activation, where the two agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pem_composition.adapters.heads import head_parameter_names
from pem_composition.adapters.layer import features
from pem_composition.adapters.locate import linear_layers, linear_suffixes, matching_layers
from pem_composition.config import ADAPTER_KINDS, matches
from pem_composition.errors import PEMError, UsageError, listing

PLACEMENTS = ("peft", "reference")


@dataclass(frozen=True)
class Architecture:
    """Layer name suffixes of one architecture.

    ``first`` and ``second`` are the feed-forward block's linear layers; of several names for
    ``first`` the ones that a model has are used (plain and gated T5). ``fused`` names the one layer
    that computes query, key and value together.
    """

    query_value: tuple[str, ...]
    key_value: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    not_within: tuple[str, ...] = ()  # a layer whose name contains one of these is not meant
    fused: str | None = None


_BERT = Architecture(
    ("query", "value"),
    ("key", "value"),
    ("intermediate.dense",),
    ("output.dense",),
    not_within=("attention.output.dense",),
)
_OPT = Architecture(("q_proj", "v_proj"), ("k_proj", "v_proj"), ("fc1",), ("fc2",))
_LLAMA = Architecture(("q_proj", "v_proj"), ("k_proj", "v_proj"), ("up_proj",), ("down_proj",))
_GEMMA3 = Architecture(
    ("q_proj", "v_proj"),
    ("k_proj", "v_proj"),
    ("up_proj",),
    ("down_proj",),
    not_within=("vision_tower",),
)

TARGETS: dict[str, Architecture] = {
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "bert": _BERT,
    "distilbert": Architecture(
        ("q_lin", "v_lin"), ("k_lin", "v_lin"), ("ffn.lin1",), ("ffn.lin2",)
    ),
    "mpnet": Architecture(
        ("attn.q", "attn.v"), ("attn.k", "attn.v"), ("intermediate.dense",), ("output.dense",)
    ),
    "deberta-v2": Architecture(
        ("query_proj", "value_proj"),
        ("key_proj", "value_proj"),
        ("intermediate.dense",),
        ("output.dense",),
        not_within=("attention.output.dense",),
    ),
    "bart": _OPT,
    "t5": Architecture(("q", "v"), ("k", "v"), ("wi", "wi_1"), ("wo",)),
    "gpt2": Architecture(
        ("attn.c_attn",), ("attn.c_attn",), ("mlp.c_fc",), ("mlp.c_proj",), fused="attn.c_attn"
    ),
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _GEMMA3,
    "gemma3_text": _LLAMA,
}

# How a fused query/key/value layer orders its outputs: "thirds" q, k, v one after another;
# "heads" q, k, v of head 0, then of head 1, and so on.
FUSED_LAYOUT = {"gpt2": "thirds", "gpt_neox": "heads", "bloom": "heads"}
PARTS = "qkv"


@dataclass(frozen=True)
class Targets:
    """What to adapt: ready for LoraConfig / IA3Config, and for ``attach_fresh(blocks=...)``.

    ``blocks``: fused layer -> its parts that are trained, each on its own, e.g. ``("q", "v")``.
    """

    target_modules: tuple[str, ...]
    feedforward_modules: tuple[str, ...] = ()
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def resolve_targets(
    model: nn.Module,
    adapter: str = "lora",
    target_modules: Sequence[str] | None = None,
    placement: str = "peft",
    feedforward_modules: Sequence[str] = (),
) -> Targets:
    """Target modules of a model: those asked for, else the table's for its ``model_type``.

    A name stays a suffix (``query``) where the suffix means exactly the wanted layers; otherwise
    they are named in full: RoBERTa's ``output.dense`` also matches ``attention.output.dense``.
    GPT-2's fused ``c_attn``: (IA)^3 trains its key and value parts; LoRA trains one pair of factors
    for the whole layer with placement ``peft``, and independent query and value blocks with
    ``reference``.

    Args:
        adapter: lora or ia3.
        target_modules: names or suffixes that replace the table's.
        placement: peft or reference; see the file's docstring.
        feedforward_modules: (IA)^3 with explicit ``target_modules``: those whose input is scaled.

    Raises:
        PEMError: unknown architecture without ``target_modules``, or names that match nothing.
    """
    _check_choice("adapter", adapter, ADAPTER_KINDS)
    _check_choice("placement", placement, PLACEMENTS)
    if target_modules is not None:
        return _explicit(model, tuple(target_modules), tuple(feedforward_modules))
    row = _row(model)
    if adapter == "lora":
        blocks = {row.fused: ("q", "v")} if row.fused and placement == "reference" else {}
        return Targets(_names(model, row, row.query_value), blocks=blocks)
    attention = _names(model, row, row.key_value)
    blocks = {row.fused: ("k", "v")} if row.fused else {}
    if placement == "reference":
        return Targets(attention + _names(model, row, row.first), blocks=blocks)
    feedforward = _names(model, row, row.second)
    return Targets(attention + feedforward, feedforward, blocks)


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError.build(
            flag, "unknown choice", found=repr(value), expected=" or ".join(choices)
        )


def _explicit(model: nn.Module, targets: tuple[str, ...], feedforward: tuple[str, ...]) -> Targets:
    if not targets:
        raise UsageError.build("target_modules", "is empty", expected="at least one layer name")
    skip = {n.rpartition(".")[0] for n in head_parameter_names(model)}
    chosen = matching_layers(model, targets, skip=skip)
    stray = set(matching_layers(model, feedforward, skip=skip)) - set(chosen)
    if stray:
        raise UsageError.build(
            "feedforward_modules",
            "names layers that are no target modules",
            found=listing(sorted(stray)),
            expected=f"some of {listing(chosen)}",
        )
    return Targets(targets, feedforward)


def _row(model: nn.Module) -> Architecture:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in TARGETS:
        return TARGETS[model_type]
    raise PEMError.build(
        f"model type {model_type!r}",
        "has no default target modules",
        found=f"linear layers named {listing(linear_suffixes(linear_layers(model)))}",
        expected=f"one of {', '.join(TARGETS)}",
        do="name layers with target_modules (--target_modules)",
    )


def _names(model: nn.Module, row: Architecture, suffixes: Sequence[str]) -> tuple[str, ...]:
    linears = linear_layers(model)
    found = {s: [n for n in linears if matches(n, s)] for s in suffixes}
    present = [s for s in suffixes if found[s]] or list(suffixes[:1])
    names: list[str] = []
    for suffix in present:
        wanted = [n for n in found[suffix] if not any(part in n for part in row.not_within)]
        names += [suffix] if wanted == found[suffix] else wanted
    matching_layers(model, names)
    return tuple(names)


def fused_rows(model: nn.Module, layer: str, parts: Sequence[str]) -> list[Tensor]:
    """For each part (q, k or v) of a fused layer: which of its outputs it owns, bool (O,).

    Raises:
        PEMError: the layout of this architecture's fused layer is not known.
    """
    config = getattr(model, "config", None)
    layout = FUSED_LAYOUT.get(getattr(config, "model_type", None))
    outputs = features(linear_layers(model)[layer])[1]
    if layout is None or outputs % 3:
        raise PEMError.build(
            layer,
            "the order of query, key and value in this layer is not known",
            found=f"model type {getattr(config, 'model_type', None)!r} with {outputs} outputs",
            expected=f"one of {', '.join(FUSED_LAYOUT)}",
            do="leave the blocks out and adapt the layer as a whole",
        )
    groups = config.num_attention_heads if layout == "heads" else 1
    owner = torch.arange(3).repeat_interleave(outputs // (3 * groups)).repeat(groups)
    return [owner == PARTS.index(part) for part in parts]
