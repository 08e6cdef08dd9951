"""Writing the adapter-transformers layout: the inverse of reading it, or a refusal by name."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.compatible import check_linear
from pem_composition.arithmetic.updates import save_dtype
from pem_composition.checkpoint.adapter_transformers import (
    FAMILIES,
    FUSED,
    PARTS,
    REMEDY,
    Family,
)
from pem_composition.checkpoint.content import CONFIG, HEAD_CONFIG, HEAD_WEIGHTS
from pem_composition.checkpoint.content import REFERENCE_WEIGHTS as WEIGHTS
from pem_composition.checkpoint.tensors import cast
from pem_composition.config import IA3Config, LoraConfig, alpha_for
from pem_composition.errors import UnsupportedModule
from pem_composition.record import record
from pem_composition.safe_files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

LIBRARY_VERSION = "3.2.1"


def write(pem: PEM, folder: Path, name: str, *, dtype: str | None) -> None:
    """Write the reference layout into an existing folder, under an adapter name.

    Raises:
        UnsupportedModule: the module has no exact form in this layout; the reason is named.
    """
    if pem.heads:
        raise _no_form(pem, f"heads kept beside it ({', '.join(pem.heads)})", "one head")
    model_type = _model_type(pem)
    family, label = FAMILIES[model_type], name.replace(".", "_")
    plain = {n: t for n, t in pem.tensors.items() if not n.endswith(".head")}
    settings, tensors = _unconverted(pem, plain, family)
    prefix = (pem.config.extra.get("origin") or {}).get("prefix")
    if prefix is None:
        prefix = "transformer." if model_type == "t5" else ""
    target = save_dtype(dtype)
    state = {}
    for full, tensor in tensors.items():
        layer, _, role = full.rpartition(".")
        key = f"{prefix}{layer}.loras.{label}.{'lora_B' if role == 'ia3' else role}"
        state[key] = cast(tensor, full, target, pem.name)
    common = _common(pem, family, model_type, label)
    identity = hashlib.sha1(
        json.dumps({k: v for k, v in settings.items() if v}, sort_keys=True).encode()
    )
    write_json(
        folder / CONFIG, {"config": settings, "config_id": identity.hexdigest()[:16], **common}
    )
    _write_state(state, folder / WEIGHTS)
    if pem.head_names:
        config, heads = _unconverted_head(pem, family, label)
        saved = {k: cast(t, k, target, pem.name) for k, t in heads.items()}
        head_label = {"name": label} if config.get("config") else {"name": None}
        write_json(folder / HEAD_CONFIG, {**common, **config, **head_label})
        _write_state(saved, folder / HEAD_WEIGHTS)


def as_reference(module: PEM) -> PEM:
    """Name a T5 module's keys as the reference's analogy program does.

    It saves from T5ForConditionalGeneration (no ``transformer.`` prefix, a static LM head), while
    the modules that go in were saved from T5AdapterModel.
    """
    if module.base.model_type != "t5":
        return module
    origin = {"model_class": "T5ForConditionalGeneration", "prefix": ""}
    written = {**module.config.extra.get("origin", {}), **origin}
    head = module.head and replace(
        module.head, extra={"adapter_transformers": {"config": None, "positions": None}}
    )
    config = replace(module.config, extra={**module.config.extra, "origin": written})
    provenance = replace(module.provenance, recipe=record("as_reference", [module]))
    return replace(module, config=config, head=head, provenance=provenance)


def _write_state(state: Mapping[str, Tensor], path: Path) -> None:
    """A plain dict as torch.save writes it; in memory first, so that a full disk is an OSError."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path.write_bytes(buffer.getbuffer())


def _common(pem: PEM, family: Family, model_type: str, label: str) -> dict[str, Any]:
    origin = pem.config.extra.get("origin") or {}
    return {
        "hidden_size": pem.base.hidden_size or _hidden_size(pem),
        "model_class": origin.get("model_class") or family.model_class,
        "model_name": pem.base.name,
        "model_type": model_type,
        "name": label,
        "version": origin.get("version") or LIBRARY_VERSION,
    }


def _hidden_size(pem: PEM) -> int | None:
    """Width of the model: input of an attention factor, or length of an attention vector."""
    for name, tensor in sorted(pem.tensors.items()):
        if name.endswith(".lora_A") and ("ttention" in name or "c_attn" in name):
            return int(tensor.shape[1])
        if name.endswith(".ia3") and "ttention" in name:
            return int(tensor.shape[0])
        if name.endswith("c_attn.ia3"):
            return int(tensor.shape[0]) // 3
    return None


def _model_type(pem: PEM) -> str:
    layers = pem.layers
    guesses = {
        "roberta": "roberta.",
        "bert": "bert.",
        "gpt2": "transformer.h.",
        "t5": "encoder.block.",
    }
    guess = next(
        (m for m, start in guesses.items() if layers and layers[-1].startswith(start)), None
    )
    if guess is None and layers and layers[0].startswith("decoder.block."):
        guess = "t5"
    found = pem.base.model_type or guess
    if found is None or found not in FAMILIES:
        raise UnsupportedModule.build(
            pem.name,
            "the adapter-transformers layout does not cover this model",
            found=f"model type {found}",
            expected=" | ".join(FAMILIES),
            do=REMEDY,
        )
    return found


def _unconverted(
    pem: PEM, tensors: Mapping[str, Tensor], family: Family
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors in the library's form, or a refusal that names what has none."""
    if not isinstance(pem.config, LoraConfig | IA3Config):
        raise _no_form(pem, "a full module", "lora or ia3")
    places = _places(pem, family)
    _check_blocks(pem)
    scale = isinstance(pem.config, IA3Config)
    if isinstance(pem.config, IA3Config):
        inputs = [n for n in pem.layers if pem.config.scales_input(n)]
        if inputs:
            raise _no_form(
                pem,
                f"a vector on the input of {inputs[0]!r}",
                "output scaling before the activation",
            )
        parts, out = _split_vectors(pem, tensors)
        r, alpha, dropout = 1, 1.0, 0.0
    else:
        parts, out, r, alpha = _split_factors(pem, pem.config, tensors)
        dropout = pem.config.dropout
    attention = [p for p in PARTS if p in (places | set(parts))]
    settings = {
        "alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "architecture": "lora",
        "attn_matrices": attention,
        "composition_mode": "scale" if scale else "add",
        "dropout": dropout,
        "init_weights": "ia3" if scale else "lora",
        "intermediate_lora": "intermediate" in places,
        "output_lora": "output" in places,
        "r": r,
        "selfattn_lora": bool(attention),
        "use_gating": False,
    }
    return settings, out


def _no_form(pem: PEM, found: str, expected: str) -> UnsupportedModule:
    error = UnsupportedModule.build(
        pem.name,
        "the adapter-transformers layout cannot represent this module",
        found=found,
        expected=expected,
        do=REMEDY,
    )
    assert isinstance(error, UnsupportedModule)
    return error


def _places(pem: PEM, family: Family) -> set[str]:
    """Which of q, k, v, intermediate and output the layers are; every place in every block."""
    layers_of: dict[str, int] = {}
    for layer in pem.layers:
        place = _place(layer, family)
        if place is None:
            raise _no_form(pem, f"layer {layer!r}", "attention q, k, v and feed-forward layers")
        layers_of[place] = layers_of.get(place, 0) + 1
    attention = {p: n for p, n in layers_of.items() if p in PARTS}
    if len(set(attention.values())) > 1:
        raise _no_form(
            pem, f"{attention} adapted layers", "the same attention layers for each of q, k, v"
        )
    return set(layers_of) - {"fused"}


def _check_blocks(pem: PEM) -> None:
    """Refuse a block without a layer that other blocks have: the library adapts all of a kind."""
    blocks: dict[str, dict[str, set[int]]] = {}  # stack -> layer within a block -> block numbers
    for layer in pem.layers:
        parts = layer.split(".")
        at = next((i for i, p in enumerate(parts) if p.isdecimal() and len(p) < 10), None)
        if at is not None:
            stack = blocks.setdefault(".".join(parts[:at]), {})
            stack.setdefault(".".join(parts[at + 1 :]), set()).add(int(parts[at]))
    for stack in blocks.values():
        every = set(range(max(map(max, stack.values())) + 1))
        if any(numbers != every for numbers in stack.values()):
            raise _no_form(pem, "layers left out", "every layer of a kind")


def _place(layer: str, family: Family) -> str | None:
    if family.attention is None and layer.endswith("." + FUSED):
        return "fused"
    for part, suffix in (family.attention or {}).items():
        if layer.endswith(suffix):
            return part
    if ".attention.output." in layer:
        return None
    for place, suffixes in (("intermediate", family.intermediate), ("output", family.output)):
        if layer.endswith(tuple("." + s for s in suffixes)):
            return place
    return None


def _split_vectors(
    pem: PEM, tensors: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Vectors as columns; a fused vector without the parts that are 1 in every layer."""
    fused = {n: t.reshape(3, -1) for n, t in tensors.items() if n.endswith(f"{FUSED}.ia3")}
    # a sum of ones may be off by one rounding; anything more is a scaling that would be lost
    used = [
        p for i, p in enumerate(PARTS) if any((t[i] - 1).abs().max() > 1e-6 for t in fused.values())
    ]
    if fused and not used:
        used = ["k", "v"]
    out = {}
    for name, tensor in tensors.items():
        kept = fused[name][[PARTS.index(p) for p in used]] if name in fused else tensor
        out[name] = kept.reshape(-1, 1)
    return tuple(used), out


def _split_factors(
    pem: PEM, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], dict[str, Tensor], int, float]:
    """Factors in the library's form: parts of fused layers, tensors, one rank, one alpha."""
    check_linear(pem)
    out = dict(tensors)
    fused = [n for n in pem.layers if n.endswith("." + FUSED)]
    columns = {n: _column_parts(pem, n, tensors[f"{n}.lora_B"]) for n in fused}
    parts = tuple(p for p in PARTS if any(p in c for c in columns.values())) or (
        ("q", "v") if fused else ()
    )
    ranks = {config.rank(n) for n in pem.layers if n not in fused}
    widths = {max(c.count(p) for p in parts) for c in columns.values()} | {
        -(-len(c) // len(parts)) for c in columns.values()
    }
    r = max(widths | ranks)
    if (ranks and ranks != {r}) or (widths - {r} and ranks):
        raise _no_form(pem, f"ranks {sorted(ranks | widths)}", "one rank for all layers")
    for layer in fused:
        a, b = _unblock(
            tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"], columns[layer], parts, r
        )
        out[f"{layer}.lora_A"], out[f"{layer}.lora_B"] = a, b
    scalings = {config.scaling(n) for n in pem.layers}
    if len(scalings) > 1:
        raise _no_form(pem, f"scalings {sorted(scalings)}", "one scaling for all layers")
    return parts, out, r, _alpha(pem, scalings.pop(), r)


def _alpha(pem: PEM, scaling: float, r: int) -> float:
    """The alpha for which alpha / r is the scaling, bit for bit."""
    alpha = alpha_for(scaling, r)
    if alpha is None:
        expected = "a scaling that is a quotient alpha / r"
        raise _no_form(pem, f"scaling {scaling!r} at rank {r}", expected)
    return alpha


def _column_parts(pem: PEM, layer: str, b: Tensor) -> list[str | None]:
    """For each column of a fused B (3 h, R) the part it changes, None for a zero column."""
    rows = (b.reshape(3, -1, b.shape[1]) != 0).any(dim=1)  # (3, R)
    if bool((rows.sum(dim=0) > 1).any()):
        raise _no_form(
            pem,
            f"an update of {layer!r} that mixes q, k and v",
            "each column of B in one of q, k, v",
        )
    return [
        next((p for p, used in zip(PARTS, column, strict=True) if used), None)
        for column in rows.T.tolist()
    ]


def _unblock(
    a: Tensor, b: Tensor, columns: list[str | None], parts: tuple[str, ...], r: int
) -> tuple[Tensor, Tensor]:
    """Sort by part, fill up with zeros: (R, d_in), (3 h, R) -> (parts r, d_in), (parts h, r)."""
    h = b.shape[0] // 3
    new_a, new_b = a.new_zeros(len(parts) * r, a.shape[1]), b.new_zeros(len(parts) * h, r)
    for i, part in enumerate(parts):
        own = _members(columns, part, i, parts, r)
        at = PARTS.index(part) * h
        new_a[i * r : i * r + len(own)] = a[own]
        new_b[i * h : (i + 1) * h, : len(own)] = b[at : at + h][:, own]
    return new_a, new_b


def _members(
    columns: list[str | None], part: str, i: int, parts: tuple[str, ...], r: int
) -> list[int]:
    """Columns of a part; a block in its natural place keeps its zero columns, and so its A."""
    natural = list(range(i * r, (i + 1) * r))
    blocks = [columns[j * r : (j + 1) * r] for j in range(len(parts))]
    if len(columns) == len(parts) * r and all(
        set(b) <= {p, None} for b, p in zip(blocks, parts, strict=True)
    ):
        return natural
    return [j for j, p in enumerate(columns) if p == part]


def _unconverted_head(
    pem: PEM, family: Family, label: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Head config and tensors under the library's names (a static model class has its own)."""
    heads = pem.head_tensors()
    origin = (pem.head.extra if pem.head else {}).get("adapter_transformers")
    origin = origin if isinstance(origin, dict) else {}
    modules = list(dict.fromkeys(n.rpartition(".")[0] for n in heads))
    labels = {word: i for i, word in enumerate(pem.head.labels)} if pem.head else {}
    if origin and origin.get("positions") is None:
        return {
            "config": None,
            **({"label2id": labels} if labels else {}),
            "num_labels": len(labels) or 2,
        }, heads
    lm = "lm" in family.head
    positions = origin.get("positions")
    if not isinstance(positions, list) or len(positions) != len(family.head):
        positions = [0] if lm else [1, 4]
    places = dict(zip(family.head.values(), positions, strict=True))
    if set(modules) != set(places):
        raise _no_form(pem, f"head modules {modules}", f"{list(places)}")
    renamed = {}
    for name, tensor in heads.items():
        module, _, kind = name.rpartition(".")
        renamed[f"heads.{label}.{places[module]}.{kind}"] = tensor
    rows = next(t.shape[0] for n, t in heads.items() if n == f"{list(places)[-1]}.weight")
    return {
        "config": origin.get("config") or _head_config(family, labels, int(rows), heads)
    }, renamed


def _head_config(
    family: Family, labels: Mapping[str, int], rows: int, heads: Iterable[str]
) -> dict[str, Any]:
    if "lm" not in family.head:
        words = labels if len(labels) == rows else {f"LABEL_{i}": i for i in range(rows)}
        return {
            "activation_function": "tanh",
            "bias": True,
            "head_type": "classification",
            "label2id": dict(words),
            "layers": 2,
            "num_labels": rows,
            "use_pooler": False,
        }
    causal = family.model_class.startswith("GPT2")
    return {
        "activation_function": None,
        "bias": any(n.endswith(".bias") for n in heads),
        "head_type": "causal_lm" if causal else "seq2seq_lm",
        "label2id": None,
        "layer_norm": False,
        "layers": 1,
        "shift_labels": causal,
        "vocab_size": rows,
    }
