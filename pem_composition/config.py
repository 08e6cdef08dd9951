"""What a module is: its kind, hyperparameters and base model. No torch, no files.

A layer is named by its dotted path in the model (``roberta.encoder.layer.0.attention.self.query``);
a target is a layer name or a suffix of one (``query``), as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_KINDS = ("lora", "ia3")  # beside the base's own weights
KINDS = (*ADAPTER_KINDS, "full")  # of modules
Factor = Literal["lora_A", "lora_B"]  # of a LoRA update B A
ADAPTER_CONFIGS = {"lora": "lora", "ia3": "ia3", "fft": "full"}  # a flag's word -> kind
DTYPES = ("float32", "float16", "bfloat16", "float64")  # in which tensors are written
TOKEN_POLICIES = ("error", "first", "largest")  # of whole models whose embeddings differ in rows


# Modules of a task's head, which the base does not have.
HEAD_COMPONENTS = frozenset(
    (
        *("classifier", "score", "heads", "qa_outputs", "pre_classifier", "classification_head"),
        *("logits_proj", "sequence_summary", "multiple_choice_head"),
        *("start_logits", "end_logits", "answer_class"),
    )
)
# Problems of heads that tell classes apart, or give one number.
CLASSIFIERS = ("classification", "regression")
# In a config's extra: parameters that PEFT loads into the base's own, not into a copy.
IN_BASE = "saved_in_base"
# What FSDP, activation checkpointing, torch.compile and Fabric put into the names of a model.
WRAPPERS = frozenset(
    (
        *("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod"),
        "_forward_module",
    )
)


def alpha_for(scaling: float, r: float) -> float | None:
    """The alpha for which alpha / r is the scaling, bit for bit; None where there is none.

    For rsLoRA r is the square root of the rank.

    >>> alpha_for(2.0, 8), alpha_for(0.1, 7)
    (16, 0.7000000000000001)
    """
    guess = scaling * r
    for alpha in (round(guess), guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0.0)):
        if alpha / r == scaling:
            return alpha
    return None


def is_head(parameter: str) -> bool:
    """True for parameters of a task head; a language model's head is part of the base.

    So is what is called like one within a numbered block: the routers of Switch Transformers and
    NLLB-MoE are classifiers of experts.

    >>> is_head("classifier.dense.weight"), is_head("heads.sst2.1.weight")
    (True, True)
    >>> is_head("encoder.block.1.layer.1.mlp.router.classifier.weight")
    False
    """
    for place, part in enumerate(parts := parameter.split(".")):
        if part in HEAD_COMPONENTS:
            return not any(map(str.isdecimal, parts[1:place]))
    return False


def tied_bias(name: str) -> str | None:
    """The other name of the bias of BERT's output layer and of its kin; None for other names.

    >>> tied_bias("lm_head.decoder.bias")
    'lm_head.bias'
    """
    known = name.endswith(("lm_head.decoder.bias", "predictions.decoder.bias"))
    return name.removesuffix("decoder.bias") + "bias" if known else None


def plain_name(name: str) -> str:
    """The name in the model itself: without wrappers, and without the ``module.`` of DDP."""
    parts = [p for p in name.split(".") if p not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def matches(layer: str, target: str) -> bool:
    """True if ``target`` is the layer's name or a suffix of it at a dot: PEFT's rule for lists."""
    return layer == target or layer.endswith("." + target)


def targets_of(layer: str, targets: Container[str]) -> list[str]:
    """The targets that match the layer, longest first; quick where ``targets`` is a set."""
    parts = layer.split(".")
    suffixes = (".".join(parts[i:]) for i in range(len(parts)))
    return [suffix for suffix in suffixes if suffix in targets]


def pattern_keys(layers: Iterable[str]) -> dict[str, str]:
    """Layer -> the key of a pattern that names it alone: ``^fc`` where there is a ``block.fc``."""
    layers = list(layers)
    suffixes = {".".join(n.split(".")[i:]) for n in layers for i in range(1, n.count(".") + 1)}
    return {n: f"^{n}" if n in suffixes else n for n in layers}


def expert_layer(parameter: str, index: int) -> str:
    """The layer of one expert of a stack, a parameter (E, ., .)."""
    return f"{parameter}[{index}]"


def expert_of(layer: str) -> tuple[str, int] | None:
    """The stack and the place in it of an expert's layer; None for a layer with a weight.

    >>> expert_of("mlp.experts.down_proj[3]")
    ('mlp.experts.down_proj', 3)
    """
    if not layer.endswith("]"):
        return None
    parameter, _, index = layer[:-1].rpartition("[")
    return (parameter, int(index)) if parameter and index.isdecimal() else None


def weight_of(layer: str) -> str:
    """The parameter that a layer's update is added to."""
    expert = expert_of(layer)
    return expert[0] if expert else f"{layer}.weight"


def whole_layers(layers: Iterable[str]) -> tuple[str, ...]:
    """The layers that are no experts, those that targets name."""
    return tuple(n for n in layers if not expert_of(n))


class Patterns(dict[str, Any]):
    """PEFT's rank and alpha patterns: the first entry that names a layer gives its value.

    A key is a layer's name or a suffix of one; after ``^`` it is the whole name.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._place = {target: i for i, target in enumerate(values)}

    def value(self, layer: str, default: Any) -> Any:
        """The layer's value, else that of the stack it is an expert of, else the default."""
        expert = expert_of(layer)
        if expert and layer not in self and f"^{layer}" not in self:
            layer = expert[0]
        hits = targets_of(layer, self)
        if f"^{layer}" in self:
            hits.append(f"^{layer}")
        return self[min(hits, key=self._place.__getitem__)] if hits else default


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: dW = scaling * B A, scaling = alpha / r, or alpha / sqrt(r) with rsLoRA.

    Source: Hu et al. 2021 (arXiv:2106.09685); rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732);
    DoRA: Liu et al. 2024 (arXiv:2402.09353).
    """

    kind: ClassVar[str] = "lora"

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_dora: bool = False  # then W becomes m (W + dW) / norm(W + dW), norms of its rows
    extra: Mapping[str, Any] = field(default_factory=dict)

    def rank(self, layer: str) -> int:
        """Rank of the layer's factors."""
        return int(self._ranks.value(layer, self.r))

    def alpha_of(self, layer: str) -> float:
        """The layer's alpha."""
        return float(self._alphas.value(layer, self.alpha))

    def scaling(self, layer: str) -> float:
        """Factor in front of B A."""
        alpha, r = self.alpha_of(layer), self.rank(layer)
        return alpha / r**0.5 if self.use_rslora else alpha / r

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)


@dataclass(frozen=True)
class IA3Config:
    """(IA)^3: a vector l scales a linear layer's output, or its input for ``feedforward_modules``.

    Source: Liu et al. 2022 (arXiv:2205.05638); the two placements are PEFT's.
    """

    kind: ClassVar[str] = "ia3"

    target_modules: tuple[str, ...]
    feedforward_modules: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def scales_input(self, layer: str) -> bool:
        """True where the vector multiplies the layer's input instead of its output."""
        return bool(targets_of(layer, self._inputs))

    @cached_property
    def _inputs(self) -> frozenset[str]:
        return frozenset(self.feedforward_modules)


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: the module is the difference to the base, delta = theta - theta_0."""

    kind: ClassVar[str] = "full"

    extra: Mapping[str, Any] = field(default_factory=dict)


AdapterConfig = LoraConfig | IA3Config | FullConfig


@dataclass(frozen=True)
class BaseIdentity:
    """The model a module belongs to. Unknown parts are None and compare as 'cannot tell'."""

    name: str | None = None
    fingerprint: str | None = (
        None  # sha256 over the base checkpoint's tensors, see checkpoint/provenance.py
    )
    model_type: str | None = None
    hidden_size: int | None = None

    def completed(self, *others: BaseIdentity) -> BaseIdentity:
        """What it leaves open, from the first of the others that knows it.

        >>> BaseIdentity("gpt2").completed(BaseIdentity(hidden_size=768)).hidden_size
        768
        """
        known: dict[str, Any] = {}
        for base in (self, *others):
            known = {k: v for k, v in vars(base).items() if v is not None} | known
        return BaseIdentity(**known)


@dataclass(frozen=True)
class HeadInfo:
    """What a head predicts: label names by index (classification) or nothing (regression, LM)."""

    labels: tuple[str, ...] = ()
    problem: str | None = None  # classification | regression | causal_lm | seq2seq_lm
    extra: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, labels: Sequence[str]) -> bool:
        """True unless the head says other classes, or another order of them; case is no difference
        where no two classes differ by it alone.

        Numbered ones (LABEL_0, ...), which transformers gives where nobody names them, say nothing.
        """
        named = [word.lower() for word in self.labels]
        alike = named == [word.lower() for word in labels] and len(set(named)) == len(named)
        return self.numbered or alike or tuple(labels) == self.labels

    @property
    def numbered(self) -> bool:
        """True if nobody named the classes."""
        return all(word.lower() == f"label_{i}" for i, word in enumerate(self.labels))


@dataclass(frozen=True, eq=False)
class Head:
    """A head kept beside a module: its parameters by their name in the model."""

    tensors: Mapping[str, Tensor]
    info: HeadInfo
