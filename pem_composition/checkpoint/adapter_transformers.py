"""The layout of adapter-transformers and the reference implementation, read and written exactly.

adapter_config.json + pytorch_adapter.bin, and for a head head_config.json + pytorch_model_head.bin.
Its tensors are renamed, and two of its forms rewritten without any rounding:

- GPT-2's fused ``c_attn``: independent rank-r updates of q, k or v become one update of rank
  (parts * r) whose B is block-structured; alpha grows with the rank, so alpha / r stays.
- (IA)^3 (composition mode "scale") multiplies the output of a layer, before the activation: output
  scaling, no feedforward modules. A fused vector gets ones for the parts it leaves out.

Shapes: r rank per part, d_in, h width of one of q, k, v; fused d_out = 3 h.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pem_composition.arithmetic.algebra import layers_of
from pem_composition.checkpoint import provenance
from pem_composition.checkpoint.content import CONFIG, HEAD_CONFIG, HEAD_WEIGHTS, REFERENCE
from pem_composition.checkpoint.content import REFERENCE_WEIGHTS as WEIGHTS
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.header import ModuleHeader
from pem_composition.checkpoint.peft import check_factors
from pem_composition.checkpoint.peft_config import MAX_ALPHA, MAX_RANK
from pem_composition.checkpoint.pickles import TorchZipFile
from pem_composition.checkpoint.tensors import StoredTensors, check_float
from pem_composition.config import BaseIdentity, IA3Config, LoraConfig
from pem_composition.errors import CheckpointError, UnsupportedModule
from pem_composition.module import HeadInfo
from pem_composition.record import Provenance
from pem_composition.safe_files import SmallFiles, is_file, listing

if TYPE_CHECKING:
    from torch import Tensor


PARTS = ("q", "k", "v")
POSITIONS = tuple(str(i) for i in range(10))  # of layers in a head
REMEDY = "use the PEFT layout (--format peft)"


@dataclass(frozen=True)
class Family:
    """Where one model family keeps what the library adapts.

    ``attention`` maps q, k, v to the last component(s) of a layer name; None for a fused layer.
    """

    model_class: str
    attention: Mapping[str, str] | None
    intermediate: tuple[str, ...]
    output: tuple[str, ...]
    head: Mapping[str, str]  # head position in the library -> module in the Hugging Face model


_BERT_ATTENTION = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
}
_BERT_LAYERS = (_BERT_ATTENTION, ("intermediate.dense",), ("output.dense",))
_ROBERTA_HEAD = {"first": "classifier.dense", "last": "classifier.out_proj"}
FAMILIES: Mapping[str, Family] = {
    "roberta": Family("RobertaAdapterModel", *_BERT_LAYERS, _ROBERTA_HEAD),
    "xlm-roberta": Family("XLMRobertaAdapterModel", *_BERT_LAYERS, _ROBERTA_HEAD),
    # BERT's pooler is Linear + tanh on the first token: the library's two-layer head exactly.
    "bert": Family(
        "BertAdapterModel", _BERT_ATTENTION, ("intermediate.dense",), ("output.dense",),
        {"first": "bert.pooler.dense", "last": "classifier"},
    ),
    "t5": Family(
        "T5AdapterModel", {"q": "Attention.q", "k": "Attention.k", "v": "Attention.v"},
        ("DenseReluDense.wi", "DenseReluDense.wi_1"), ("DenseReluDense.wo",), {"lm": "lm_head"},
    ),
    "gpt2": Family("GPT2AdapterModel", None, ("mlp.c_fc",), ("mlp.c_proj",), {"lm": "lm_head"}),
}  # fmt: skip
FUSED = "attn.c_attn"
PLAIN_HEAD_MODULES = ("classifier", "lm_head", "score", "qa_outputs")
ADAPTER_KEYS = frozenset(
    (
        *(
            "r",
            "alpha",
            "dropout",
            "architecture",
            "attn_matrices",
            "composition_mode",
            "leave_out",
        ),
        *("init_weights", "intermediate_lora", "output_lora", "selfattn_lora", "use_gating"),
    )
)


# --- reading ------------------------------------------------------------------------------------


def read(
    small: SmallFiles, raw: Mapping[str, Any], name: str, record: provenance.Record | None
) -> ModuleHeader:
    """The header of an adapter-transformers folder, whose weights stay open for its tensors.

    Raises:
        UnsupportedModule: gating, another architecture, a head that has no exact counterpart.
        CheckpointError: a damaged or inconsistent file, naming it.
    """
    folder = small.folder
    path = folder / WEIGHTS
    if not is_file(path):
        raise CheckpointError.build(
            folder,
            "no weights",
            found=listing(folder),
            expected=WEIGHTS,
            do=f"copy the weights beside {CONFIG}",
        )
    family, settings = _settings(raw, folder / CONFIG)
    with ExitStack() as stack:
        file = stack.enter_context(TorchZipFile(path, folder))
        keys, prefix = _canonical_keys(file, settings)
        stored = {n: file.infos[k] for n, k in keys.items()}
        config = _config(stored, settings, raw["model_type"], path)
        infos = {n: _converted_info(n, i, settings) for n, i in stored.items()}
        if not infos:
            raise CheckpointError.build(
                path, "no tensors", expected="the module's tensors", do="save it again"
            )
        if isinstance(config, LoraConfig):
            check_factors(config, infos, path)
        places = {n: (file, k) for n, k in keys.items()}
        head = None
        if is_file(folder / HEAD_WEIGHTS):
            head, head_file, head_keys = _read_head(small, family, raw["model_type"])
            infos |= {n: head_file.infos[k] for n, k in head_keys.items()}
            places |= {n: (head_file, k) for n, k in head_keys.items()}
        stack.pop_all()  # the files stay open

    def form(name: str, tensor: Tensor) -> Tensor:
        return tensor if name.endswith(".head") else _converted(name, tensor, settings)

    header = _header(
        folder, raw, name, record, replace(config, extra={"origin": _origin(raw, prefix)})
    )
    return replace(header, infos=infos, head=head, tensors=StoredTensors(places, form))


def _origin(raw: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What writing the same files again needs to know; kept in pem.json."""
    words = {key: raw.get(key) for key in ("model_class", "version")}
    return {"prefix": prefix, **{k: w if isinstance(w, str) else None for k, w in words.items()}}


def _header(
    folder: Path,
    raw: Mapping[str, Any],
    name: str,
    record: provenance.Record | None,
    config: LoraConfig | IA3Config,
) -> ModuleHeader:
    size, base = raw.get("hidden_size"), raw.get("model_name")
    if base is not None and not isinstance(base, str):
        raise CheckpointError.build(
            folder / CONFIG, "model_name", found=repr(base), expected="text", do="correct it"
        )
    return ModuleHeader(
        path=folder,
        format=REFERENCE.name,
        name=name,
        config=config,
        base=BaseIdentity(
            name=base or None,
            model_type=raw["model_type"],
            hidden_size=size if type(size) is int else None,
        ),
        infos={},
        head=None,
        provenance=record.provenance if record else Provenance(),
        weights=folder / WEIGHTS,
    )


def _settings(raw: Mapping[str, Any], path: Path) -> tuple[Family, Mapping[str, Any]]:
    """Check adapter_config.json; returns the model family and the adapter's settings."""
    settings, model_type = raw.get("config"), raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModule.build(
            path,
            "model_type cannot be represented",
            found=repr(model_type),
            expected=" | ".join(FAMILIES),
        )
    if not isinstance(settings, dict):
        raise CheckpointError.build(
            path, "config", found=type(settings).__name__, expected="the adapter's settings"
        )
    expected = {
        "architecture": ("lora",),
        "use_gating": (False, None),
        "composition_mode": ("add", "scale"),
    }
    for key, allowed in expected.items():
        value = settings.get(key, False if key == "use_gating" else None)
        if value not in allowed or isinstance(value, int) != isinstance(allowed[0], int):
            raise UnsupportedModule.build(
                path,
                f"{key} cannot be represented",
                found=repr(value),
                expected=" or ".join(map(repr, allowed)),
                do="only LoRA and (IA)^3 without gates have an exact sum",
            )
    for key, value in settings.items():
        if key not in ADAPTER_KEYS and value not in (None, False, [], {}):
            raise UnsupportedModule.build(
                path, f"config.{key} is not known", found=repr(value)[:80], expected="unset"
            )
    _check_numbers(settings, path)
    return FAMILIES[model_type], settings


def _check_numbers(settings: Mapping[str, Any], path: Path) -> None:
    r, alpha, dropout = settings.get("r"), settings.get("alpha"), settings.get("dropout", 0.0)
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise CheckpointError.build(path, "config.r", found=repr(r), expected="a whole number >= 1")
    if not _is_number(alpha) or not 0 < alpha <= MAX_ALPHA:
        raise CheckpointError.build(
            path, "config.alpha", found=repr(alpha), expected="a number > 0"
        )
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise CheckpointError.build(
            path, "config.dropout", found=repr(dropout), expected="a number from 0 to below 1"
        )
    if settings["composition_mode"] == "scale" and (r != 1 or alpha != 1):
        raise UnsupportedModule.build(
            path,
            "a scaling module with r or alpha cannot be represented",
            found=f"r {r}, alpha {alpha}",
            expected="r 1, alpha 1 as in (IA)^3",
        )
    parts = settings.get("attn_matrices")
    if (
        not isinstance(parts, list)
        or any(p not in PARTS for p in parts)
        or len(set(parts)) < len(parts)
    ):
        raise CheckpointError.build(
            path, "config.attn_matrices", found=repr(parts), expected="some of q, k, v"
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _canonical_keys(file: TorchZipFile, settings: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Canonical name -> key in the file, and the prefix T5AdapterModel puts before its layers."""
    check_float(file.infos, file.path)
    role = "ia3" if settings["composition_mode"] == "scale" else None
    keys: dict[str, str] = {}
    prefixes: set[str] = set()
    for key in file.infos:
        layer, separator, rest = key.partition(".loras.")
        kind = rest.rpartition(".")[2]
        if "gate" in key:
            raise UnsupportedModule.build(
                file.path, f"tensor {key!r}: gates cannot be represented", do=REMEDY
            )
        if not separator or kind not in ("lora_A", "lora_B") or (role and kind == "lora_A"):
            raise CheckpointError.build(
                file.path,
                f"extra tensor {key!r}",
                found="not a tensor of this kind of module",
                expected="<layer>.loras.<name>.lora_B"
                if role
                else "<layer>.loras.<name>.lora_A or lora_B",
                do="save the module again",
            )
        prefix = (
            "transformer."
            if layer.startswith(("transformer.encoder.", "transformer.decoder."))
            else ""
        )
        prefixes.add(prefix)
        name = f"{layer.removeprefix(prefix)}.{role or kind}"
        if name in keys:
            raise CheckpointError.build(
                file.path,
                f"two modules in one file: {key!r}",
                found=keys[name],
                expected="one module",
                do="save each module to its own folder",
            )
        keys[name] = key
    if len(prefixes) > 1:
        raise CheckpointError.build(
            file.path, "some keys have the transformer. prefix and some have not",
            do="save it again",
        )  # fmt: skip
    return keys, "".join(prefixes)


def _parts_of(layer: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a fused layer the module adapts, in storage order; empty for a plain layer."""
    return (
        tuple(p for p in PARTS if p in settings["attn_matrices"]) if layer.endswith(FUSED) else ()
    )


def _converted_info(name: str, info: TensorInfo, settings: Mapping[str, Any]) -> TensorInfo:
    layer, _, role = name.rpartition(".")
    parts, shape = len(_parts_of(layer, settings)), info.shape
    if role == "ia3":
        return TensorInfo(info.dtype, (shape[0] // parts * 3 if parts else shape[0],))
    if role == "lora_B" and parts:
        return TensorInfo(info.dtype, (shape[0] // parts * 3, shape[1] * parts))
    return info


def _converted(name: str, tensor: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The library's tensor in canonical form; exact: values are moved, never computed with."""
    layer, _, role = name.rpartition(".")
    parts = _parts_of(layer, settings)
    if role == "ia3":
        column = tensor.reshape(-1)
        return _fill_vector(column, parts) if parts else column
    return _block(tensor, parts) if role == "lora_B" and parts else tensor


def _fill_vector(vector: Tensor, parts: tuple[str, ...]) -> Tensor:
    """(parts * h,) -> (3 h,) with ones where q, k or v is not scaled."""
    h = len(vector) // len(parts)
    out = vector.new_ones(3 * h)
    for i, part in enumerate(parts):
        at = PARTS.index(part) * h
        out[at : at + h] = vector[i * h : (i + 1) * h]
    return out


def _block(b: Tensor, parts: tuple[str, ...]) -> Tensor:
    """(parts * h, r) -> (3 h, parts * r): B of each part in its own rows and columns."""
    h, r = b.shape[0] // len(parts), b.shape[1]
    out = b.new_zeros(3 * h, len(parts) * r)
    for i, part in enumerate(parts):
        at = PARTS.index(part) * h
        out[at : at + h, i * r : (i + 1) * r] = b[i * h : (i + 1) * h]
    return out


def _config(
    stored: Mapping[str, TensorInfo], settings: Mapping[str, Any], model_type: str, path: Path
) -> LoraConfig | IA3Config:
    _check_shapes(stored, settings, path)
    layers = layers_of(stored)
    targets = _targets(layers, settings, model_type)
    fan = model_type == "gpt2"
    if settings["composition_mode"] == "scale":
        return IA3Config(targets, fan_in_fan_out=fan)
    fused = [n for n in layers if _parts_of(n, settings)]
    many = len(_parts_of(fused[0], settings)) if fused else 1
    plain = sorted({_target(n) for n in {*layers} - {*fused}}) if fused else []
    return LoraConfig(
        r=settings["r"] * many,
        alpha=settings["alpha"] * many,
        target_modules=targets,
        dropout=float(settings.get("dropout") or 0.0),
        rank_pattern=dict.fromkeys(plain, settings["r"]),
        alpha_pattern=dict.fromkeys(plain, settings["alpha"]),
        fan_in_fan_out=fan,
    )


def _check_shapes(
    stored: Mapping[str, TensorInfo], settings: Mapping[str, Any], path: Path
) -> None:
    for name, info in stored.items():
        parts = len(_parts_of(name.rpartition(".")[0], settings)) or 1
        grouped = 0 if name.endswith("lora_A") else info.shape[0] if info.shape else 0
        if (
            len(info.shape) != 2
            or grouped % parts
            or (name.endswith(".ia3") and info.shape[1] != 1)
        ):
            raise CheckpointError.build(
                path,
                f"tensor {name!r}",
                found=f"shape {info.shape}",
                expected=f"a matrix of {parts} equal parts, a column for (IA)^3",
                do="restore the file from its source",
            )


def _targets(
    layers: tuple[str, ...], settings: Mapping[str, Any], model_type: str
) -> tuple[str, ...]:
    """Suffixes, or full layer names if the module leaves out layers that a suffix would name."""
    partial = model_type == "t5" and not any("EncDecAttention" in n for n in layers)
    if partial or settings.get("leave_out"):
        return layers
    return tuple(sorted({_target(n) for n in layers}))


def _target(layer: str) -> str:
    """Shortest suffix that tells adapted layers apart: two components for a dense layer."""
    parts = layer.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("dense", "c_proj") else parts[-1]


# --- heads --------------------------------------------------------------------------------------


def _read_head(
    small: SmallFiles, family: Family, model_type: str
) -> tuple[HeadInfo, TorchZipFile, dict[str, str]]:
    """What the head predicts, its open file, and canonical name -> key in it."""
    described = small.json(HEAD_CONFIG) if is_file(small.folder / HEAD_CONFIG) else {}
    with ExitStack() as stack:
        file = stack.enter_context(TorchZipFile(small.folder / HEAD_WEIGHTS, small.folder))
        check_float(file.infos, file.path)
        keys, positions = _head_keys(file, family, described.get("config"))
        stack.pop_all()
    named = {f"{n}.head": k for n, k in keys.items()}
    return _head_info(described, positions, model_type), file, named


def _head_keys(
    file: TorchZipFile, family: Family, config: Any
) -> tuple[dict[str, str], list[int] | None]:
    """Parameter name in the Hugging Face model -> key in the file; positions in the head."""
    keys = list(file.infos)
    if not any(k.startswith("heads.") for k in keys):
        for key in keys:
            if key.split(".")[0] not in PLAIN_HEAD_MODULES:
                raise UnsupportedModule.build(
                    file.path,
                    f"head tensor {key!r} cannot be represented",
                    expected=f"heads.<name>.<n>.weight or one of {', '.join(PLAIN_HEAD_MODULES)}",
                )
        return {k: k for k in keys}, None
    split = {k: k.rsplit(".", 2) for k in keys}  # heads.<name> . position . weight|bias
    if any(
        len(p) != 3 or p[1] not in POSITIONS or not p[0].startswith("heads.")
        for p in split.values()
    ):
        raise UnsupportedModule.build(
            file.path, "head tensors cannot be represented", found=keys[:4]
        )
    positions = sorted({int(p[1]) for p in split.values()})
    modules = _head_modules(
        positions, family, config if isinstance(config, dict) else {}, file.path
    )
    return {f"{modules[int(p[1])]}.{p[2]}": k for k, p in split.items()}, positions


def _head_modules(
    positions: list[int], family: Family, config: Mapping[str, Any], path: Path
) -> dict[int, str]:
    """Which Hugging Face module computes exactly what the head's linear layers compute."""
    two_layers = positions in ([1, 4], [0, 2]) and "first" in family.head
    one_layer = len(positions) == 1 and "lm" in family.head
    exact = (
        not config.get("use_pooler")
        and not config.get("layer_norm")
        and config.get("bias", True) is not None
    )
    activation = config.get("activation_function", "tanh" if two_layers else None)
    kind = config.get("head_type", "classification" if two_layers else "lm")
    if two_layers and exact and activation == "tanh" and kind == "classification":
        return dict(zip(positions, (family.head["first"], family.head["last"]), strict=True))
    if one_layer and exact and not activation and str(kind).endswith("lm"):
        return {positions[0]: family.head["lm"]}
    raise UnsupportedModule.build(
        path,
        "the head cannot be represented exactly in a Hugging Face model",
        found=f"{kind} head, layers at {positions}, activation {activation}, "
        f"use_pooler {config.get('use_pooler')}",
        expected="a two-layer tanh classification head"
        if "first" in family.head
        else "a one-layer LM head",
        do="remove the head files to use the module without its head",
    )


def _head_info(
    described: Mapping[str, Any], positions: list[int] | None, model_type: str
) -> HeadInfo:
    config = described.get("config")
    table = config if isinstance(config, dict) else described
    ids = table.get("label2id")
    labels: tuple[str, ...] = ()
    if isinstance(ids, dict) and sorted(ids.values(), key=str) == sorted(range(len(ids)), key=str):
        labels = tuple(sorted(ids, key=lambda w: int(ids[w])))
    lm = {"t5": "seq2seq_lm", "gpt2": "causal_lm"}
    kind = str(table.get("head_type") or lm.get(model_type, "classification"))
    if kind == "classification" and table.get("num_labels") == 1:
        kind = "regression"
    origin = {"config": config, "positions": positions}
    return HeadInfo(labels, kind, {"adapter_transformers": origin})
