"""PEFT's layout: adapter_config.json + adapter_model.safetensors (or .bin), read strictly.

A key ``base_model.model.<layer>.lora_A.weight`` is the tensor ``<layer>.lora_A`` here; what is not
an adapter tensor must belong to ``modules_to_save`` and becomes ``<parameter>.head``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import layers_of
from pem_composition.arithmetic.updates import save_dtype
from pem_composition.checkpoint import experts, peft_config, provenance
from pem_composition.checkpoint.content import CONFIG, PEFT
from pem_composition.checkpoint.content import PEFT_WEIGHTS as WEIGHTS
from pem_composition.checkpoint.content import PEFT_WEIGHTS_BIN as WEIGHTS_BIN
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.header import ModuleHeader
from pem_composition.checkpoint.tensors import (
    StoredTensors,
    TensorFile,
    cast,
    check_float,
    open_tensors,
    write_tensors,
)
from pem_composition.config import (
    CLASSIFIERS,
    IN_BASE,
    AdapterConfig,
    BaseIdentity,
    IA3Config,
    LoraConfig,
    expert_of,
    is_head,
    plain_name,
    targets_of,
    whole_layers,
)
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule
from pem_composition.module import HeadInfo
from pem_composition.record import Provenance
from pem_composition.safe_files import is_file, listing, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, one number per output
SUFFIXES = {
    ".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B", MAGNITUDE: "lora_magnitude",
    ".ia3_l": "ia3",
}  # fmt: skip
COPIES = ("modules_to_save", "original_module")  # in the keys of PEFT's wrapper of a saved part
REFUSED_PARTS: Mapping[str, str] = {
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "token_adapter": "trainable tokens",
    "trainable_tokens_delta": "trainable tokens",
    **dict.fromkeys(COPIES, "keys of a live model"),
}
# What PEFT adds to modules_to_save by itself, whether the model has it or not.
TASK_HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
SEQ2SEQ_TASK = "SEQ_2_SEQ_LM"
CAUSAL_TASK = "CAUSAL_LM"
HEAD_MODULES = (
    "classifier",
    "score",
    "lm_head",
    "qa_outputs",
    "pre_classifier",
    "classification_head",
)
# Input and output embeddings, which PEFT stores beside an adapter on one of them, or if resized;
# it loads them into the base's own parameter, where modules_to_save has a copy.
EMBEDDINGS = frozenset(
    (
        *("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"),
        *("lm_head", "embed_out", "decoder"),
    )
)
SUM_REMEDY = "save the module again with the library that made it"
NESTED_REMEDY = "; if modules_to_save names parts in each other, train with the outer ones alone"


def read(
    folder: Path,
    raw: Mapping[str, Any],
    name: str,
    record: provenance.Record | None,
) -> ModuleHeader:
    """The header of a PEFT folder, whose weights stay open for its tensors.

    Raises:
        UnsupportedModule: something this library cannot represent, by name.
        CheckpointError: a damaged or inconsistent file, naming it.
    """
    path, notes = _weights_file(folder)
    config = peft_config.parse(raw, folder / CONFIG)
    file = open_tensors(path, folder)
    with ExitStack() as stack:
        stack.callback(file.close)
        keys, in_base = _canonical_keys(file.infos, path, config)
        _refuse_nested(keys, config, path)
        if in_base:
            config = replace(config, extra={**config.extra, IN_BASE: in_base})
        infos = {n: _canonical_info(n, file.infos[k]) for n, k in keys.items()}
        stacks = None
        if isinstance(config, LoraConfig) and experts.TARGETS in config.extra:
            stacks = experts.Stacks(config, raw, path)
            keys, infos = stacks.split(keys, infos)
            extra = {k: v for k, v in config.extra.items() if k != experts.TARGETS}
            config = replace(config, extra=extra)
        config = _settle_targets(config, raw, infos, file, keys, path)
        if isinstance(config, LoraConfig):
            config = peft_config.settled_patterns(config, infos, folder / CONFIG)
        listed = not peft_config.targets_from_tensors(raw)
        notes += _check_tensors(config, infos, path, name, listed=listed)
        stack.pop_all()  # the file stays open

    def form(name: str, tensor: Tensor) -> Tensor:
        own = stacks.form(name, tensor) if stacks else None
        return tensor.reshape(infos[name].shape) if own is None else own

    if record and record.origin:
        config = replace(config, extra={**config.extra, "origin": dict(record.origin)})
    return ModuleHeader(
        path=folder,
        format=PEFT.name,
        name=name,
        config=config,
        base=BaseIdentity(name=raw.get("base_model_name_or_path") or None),
        infos=infos,
        head=_head_info(infos, config, record),
        provenance=record.provenance if record else Provenance(),
        weights=path,
        notes=notes,
        tensors=StoredTensors({n: (file, k) for n, k in keys.items()}, form),
    )


def _weights_file(folder: Path) -> tuple[Path, tuple[str, ...]]:
    safe, pickled = folder / WEIGHTS, folder / WEIGHTS_BIN
    if is_file(safe) or safe.is_dir():
        if is_file(pickled):
            return safe, (f"{folder.name}: {WEIGHTS} was read, {WEIGHTS_BIN} beside it was not",)
        return safe, ()
    if is_file(pickled):
        return pickled, ()
    raise CheckpointError.build(
        folder,
        "no weights",
        found=listing(folder),
        expected=f"{WEIGHTS} (or {WEIGHTS_BIN})",
        do="copy the weights beside adapter_config.json",
    )


# --- names --------------------------------------------------------------------------------------


def _canonical_keys(
    infos: Mapping[str, TensorInfo], path: Path, config: AdapterConfig
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Canonical name -> key in the file, and the parameters that belong into the base itself.

    Every key must be understood.
    """
    if not infos:
        raise CheckpointError.build(
            path, "no tensors", expected="the module's tensors", do=SUM_REMEDY
        )
    check_float(infos, path)
    keys: dict[str, str] = {}
    in_base = []
    for key, info in infos.items():
        # PEFT writes beside a saved embedding of another size, and does not read, the saved module
        # and the base's once more, under names of its wrapper.
        if any(key.replace(f".{c}.", ".") in infos for c in COPIES if f".{c}." in key):
            continue
        named = plain_name(key)
        if not named.startswith(PREFIX):
            raise CheckpointError.build(
                path,
                f"tensor {key!r} lacks PEFT's prefix",
                found=key.split(".")[0],
                expected=PREFIX,
                do=f"rename the tensors to {PREFIX}<name>, or save the module with save_pretrained",
            )
        rest = plain_name(named.removeprefix(PREFIX))
        _refuse_key(key, rest, info, path)
        suffix = next((s for s in SUFFIXES if rest.endswith(s)), None)
        if suffix is None:
            parameter = rest.replace(".base_layer.", ".")
            if not _in_saved(rest, config.extra.get("modules_to_save") or ()):
                _check_embedding(key, parameter, path, config)
                in_base.append(parameter)
            name = f"{parameter}.head"
        else:
            role = SUFFIXES[suffix]
            if (role == "ia3") != (config.kind == "ia3"):
                raise CheckpointError.build(
                    path,
                    f"tensor {key!r} does not fit the config",
                    found=f"an {role} tensor",
                    expected=f"tensors of kind {config.kind}",
                    do="restore the config that belongs to these weights",
                )
            name = f"{rest.removesuffix(suffix)}.{role}"
        if name in keys:
            raise CheckpointError.build(
                path,
                f"two tensors are {name.rpartition('.')[0]!r}",
                found=f"{keys[name]} and {key}",
                expected="one",
                do="remove the one that does not belong to the module",
            )
        keys[name] = key
    return keys, tuple(sorted(in_base))


def _refuse_nested(names: Iterable[str], config: AdapterConfig, path: Path) -> None:
    """Refuse a part saved whole right inside another one: PEFT then stores of the inner one a copy
    that its own model does not use, and cannot load it.

    Raises:
        UnsupportedModule: naming both.
    """
    saved = tuple(config.extra.get("modules_to_save") or ())
    for name in sorted(n for n in names if saved and n.endswith(".head")):
        parts = name.split(".")[:-2]
        outer = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        hits = [module.endswith(saved) for module in outer]
        for i, inner in enumerate(outer[1:], start=1):
            if hits[i] and hits[i - 1]:
                raise UnsupportedModule.build(
                    path,
                    f"modules_to_save names {inner} and {outer[i - 1]}, which holds it",
                    found="of the inner one a copy that PEFT's own model did not use",
                    expected="parts that do not lie in each other",
                    do=f"train the module again with {outer[i - 1]} alone in modules_to_save",
                )


def _refuse_key(key: str, rest: str, info: TensorInfo, path: Path) -> None:
    parts = rest.split(".")
    for part, what in REFUSED_PARTS.items():
        if part in parts:
            embedding = "train the module on linear layers, or the embedding in modules_to_save"
            do = SUM_REMEDY + NESTED_REMEDY * (part in COPIES)
            do = embedding if "embedding" in part else do
            raise UnsupportedModule.build(
                path, f"tensor {key!r}: {what} cannot be represented", do=do
            )
    if any(p in ("lora_A", "lora_B") for p in parts) and not rest.endswith(
        (".lora_A.weight", ".lora_B.weight")
    ):
        what = "a bias of a LoRA factor" if parts[-1] == "bias" else "a key of a live model"
        raise UnsupportedModule.build(
            path,
            f"tensor {key!r}: {what} cannot be represented",
            expected="...lora_A.weight, ...lora_B.weight",
            do=SUM_REMEDY,
        )
    dimensions = 1 if rest.endswith(MAGNITUDE) else 2
    if rest.endswith(tuple(SUFFIXES)) and len(info.shape) != dimensions:
        raise UnsupportedModule.build(
            path,
            f"tensor {key!r}: convolution layers cannot be represented",
            found=f"shape {info.shape}",
            expected="a matrix",
            do="train the module on linear layers",
        )


def _check_embedding(key: str, parameter: str, path: Path, config: AdapterConfig) -> None:
    """Refuse a parameter that PEFT stores neither for modules_to_save nor with an embedding."""
    if parameter.split(".")[-2:-1] == [] or parameter.split(".")[-2] not in EMBEDDINGS:
        saved = list(config.extra.get("modules_to_save") or ())
        raise CheckpointError.build(
            path,
            f"extra tensor {key!r}",
            found="neither an adapter tensor nor in modules_to_save",
            expected=f"modules_to_save {saved}",
            do="add its module to modules_to_save, or remove the tensor",
        )


def _in_saved(parameter: str, saved: Iterable[str]) -> bool:
    """True for parameters of modules whose names end as PEFT asks, in the middle of a word too."""
    return any(f"{module}." in parameter for module in saved)


def _canonical_info(name: str, info: TensorInfo) -> TensorInfo:
    """(IA)^3 vectors are stored as columns or rows and held as vectors."""
    if not name.endswith(".ia3"):
        return info
    return TensorInfo(info.dtype, (max(info.shape),) if 1 in info.shape else info.shape)


# --- config against tensors ---------------------------------------------------------------------


def _settle_targets(
    config: AdapterConfig,
    raw: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    file: TensorFile,
    keys: Mapping[str, str],
    path: Path,
) -> AdapterConfig:
    """Fill in what a regular expression would have chosen: full layer names, from the tensors."""
    layers = layers_of(infos)
    if peft_config.targets_from_tensors(raw):
        config = replace(config, target_modules=whole_layers(layers))  # type: ignore[arg-type]
    if not isinstance(config, IA3Config):
        return config
    inputs = {n for n in layers if file.infos[keys[f"{n}.ia3"]].shape[0] == 1}
    outputs = {n for n in layers if file.infos[keys[f"{n}.ia3"]].shape[1] == 1}
    if not isinstance(raw["feedforward_modules"], list):
        config = replace(config, feedforward_modules=tuple(sorted(inputs - outputs)))
    else:
        ended = _ended(layers, config.feedforward_modules)
        if ended != tuple(n for n in layers if config.scales_input(n)):
            config = replace(config, feedforward_modules=ended)
    for layer in layers:
        allowed = inputs if config.scales_input(layer) else outputs
        if layer not in allowed:
            shape = file.infos[keys[f"{layer}.ia3"]].shape
            raise CheckpointError.build(
                path,
                f"vector of {layer!r}",
                found=f"shape {shape}",
                expected="(1, d) for feedforward_modules (input), (d, 1) otherwise (output)",
                do="correct feedforward_modules",
            )
    return config


def _check_tensors(
    config: AdapterConfig, infos: Mapping[str, TensorInfo], path: Path, name: str, *, listed: bool
) -> tuple[str, ...]:
    """Compare the tensors with the config; what has to be said about them."""
    layers = layers_of(infos)
    if not layers:
        raise CheckpointError.build(
            path, "no adapter tensors", expected=f"{config.kind} tensors", do=SUM_REMEDY
        )
    assert isinstance(config, LoraConfig | IA3Config)
    if isinstance(config, LoraConfig):
        check_factors(config, infos, path)
    unused = [_unsaved(config, infos, path)]
    if listed:
        saved = {n.removesuffix(".head").rpartition(".")[0] for n in infos if n.endswith(".head")}
        unused.append(unused_targets(config.target_modules, whole_layers(layers), path, saved))
    asked = ("modules_to_save", "target_modules")
    return tuple(
        f"{name}: {key} names {', '.join(map(repr, words[:8]))}{', ...' * (len(words) > 8)}, "
        "for which there is no tensor"
        for key, words in zip(asked, unused, strict=False)
        if words
    )


def check_factors(config: LoraConfig, infos: Mapping[str, TensorInfo], where: object) -> None:
    """Both factors of every layer are there, with the rank the config says."""
    for layer in layers_of(infos):
        for role, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if f"{layer}.{role}" not in infos:
                raise CheckpointError.build(
                    where,
                    f"missing tensor: {layer}.{role}",
                    found=f"{other} only",
                    expected="both factors",
                    do="restore the file from its source",
                )
        a, b, r = infos[f"{layer}.lora_A"].shape, infos[f"{layer}.lora_B"].shape, config.rank(layer)
        magnitude = infos.get(f"{layer}.lora_magnitude")
        if (magnitude is not None) != config.use_dora or (magnitude and magnitude.shape != b[:1]):
            raise CheckpointError.build(
                where,
                f"DoRA magnitudes of {layer!r} do not fit use_dora",
                found=f"magnitudes {magnitude.shape}" if magnitude else "no magnitude vector",
                expected=f"shape {b[:1]}" if config.use_dora else "none, as use_dora is false",
                do="restore the config and the weights that belong together",
            )
        if (a[0], b[1]) != (r, r):
            raise CheckpointError.build(
                where,
                f"rank of layer {layer!r} differs from the config",
                found=f"lora_A {a}, lora_B {b}",
                expected=f"rank {r}",
                do="correct r or rank_pattern",
            )


def unused_targets(
    targets: Iterable[str], layers: Iterable[str], where: object, saved: Iterable[str] = ()
) -> list[str]:
    """Targets without a tensor, which PEFT takes: a model need not have every layer of a list.

    Args:
        saved: modules that are stored whole, on which PEFT puts no adapter.

    Raises:
        CheckpointError: a layer that no target names.
    """
    targets, used = list(targets), set()
    known = frozenset(targets)
    for layer in layers:
        hits = targets_of(layer, known)
        if not hits:
            raise CheckpointError.build(
                where,
                f"extra tensors for layer {layer!r}",
                found="a layer target_modules does not name",
                expected=f"target_modules {targets[:8]}",
                do="correct target_modules",
            )
        used |= set(hits)
    for module in saved:
        used |= set(targets_of(module, known))
    return [target for target in targets if target not in used]


def _unsaved(
    config: LoraConfig | IA3Config, infos: Mapping[str, TensorInfo], path: Path
) -> list[str]:
    """Modules of modules_to_save without a tensor, which PEFT takes if there are others.

    What PEFT lists for a task by itself need not be there.

    Raises:
        CheckpointError: no tensor for any of them.
    """
    saved = config.extra.get("modules_to_save") or ()
    heads = [n for n in infos if n.endswith(".head")]
    absent = [m for m in saved if not any(_in_saved(n, [m]) for n in heads)]
    own: Collection[str] = TASK_HEADS.get(config.extra.get("task_type"), ())
    if not set(own) <= set(saved):  # then PEFT has not written the list
        own = ()
    if len(absent) == len(saved) and set(absent) - set(own):
        raise CheckpointError.build(
            path,
            f"missing tensors: modules_to_save names {absent[0]!r}",
            found=f"{len(heads)} head tensors",
            expected=f"tensors of {absent[0]}",
            do="restore the file, or remove it from modules_to_save",
        )
    return absent if len(absent) == len(saved) else [m for m in absent if m not in own]


def _head_info(
    infos: Mapping[str, TensorInfo], config: AdapterConfig, record: provenance.Record | None
) -> HeadInfo | None:
    saved = {n: i for n, i in infos.items() if n.endswith(".head")}
    if not saved:
        return None
    if record and record.head:
        return record.head
    task, heads = config.extra.get("task_type"), {n: i for n, i in saved.items() if is_head(n)}
    if task in (CAUSAL_TASK, SEQ2SEQ_TASK):
        return HeadInfo(problem={CAUSAL_TASK: "causal_lm", SEQ2SEQ_TASK: "seq2seq_lm"}[task])
    if not heads or task == "QUESTION_ANS":
        return HeadInfo() if heads else None
    rows = [
        i.shape[0]
        for n, i in heads.items()
        if n.endswith((".out_proj.weight.head", "classifier.weight.head", "score.weight.head"))
    ]
    return HeadInfo(problem="regression" if rows == [1] else "classification")


# --- writing ------------------------------------------------------------------------------------


def write(pem: PEM, folder: Path, *, dtype: str | None) -> None:
    """Write the module's config and weights into an existing folder, so that plain PEFT opens it.

    Raises:
        PEMError: a kind PEFT has no layout for, or tensors that do not fit the config.
    """
    if not isinstance(pem.config, LoraConfig | IA3Config):
        raise PEMError.build(
            pem.name,
            "a full module has no PEFT layout",
            found="kind full",
            expected="lora or ia3",
            do="save it with its base as a model folder",
        )
    config = _settled_config(pem, pem.config)
    _check_apart(pem)
    target = save_dtype(dtype)
    tensors, adapted = {}, frozenset(pem.layers)
    rest = {n: t for n, t in pem.tensors.items() if not expert_of(n.rpartition(".")[0])}
    if isinstance(config, LoraConfig) and len(rest) < len(pem.tensors):
        stacks, config = experts.joined(pem.layers, pem.tensors.__getitem__, config, pem.name)
        rest |= stacks
    for name, tensor in sorted(rest.items()):
        key, shape = _file_key(name, tuple(tensor.shape), config, adapted)
        tensors[key] = cast(tensor, name, target, pem.name).reshape(shape)
    write_json(folder / CONFIG, config_json(pem, config))
    write_tensors(folder / WEIGHTS, tensors)


def _check_apart(pem: PEM) -> None:
    """PEFT adapts no layer inside a copy (modules_to_save), as a sum of two modules may ask."""
    for module in _saved(pem):
        inside = [n for n in pem.layers if f"{n}.".startswith(f"{module}.")]
        if inside:
            raise PEMError.build(
                pem.name, "PEFT has no layout for a layer that is both saved whole and adapted",
                found=f"{module} saved whole, an update of {inside[0]} on top",
                expected="one of the two",
                do="save no part whole (--head none), or fold the sum (pem fold --space delta)",
            )  # fmt: skip


def _saved(pem: PEM) -> dict[str, str]:
    """The modules that are saved whole, of which PEFT keeps a copy: full name -> its word in
    modules_to_save."""
    in_base = pem.config.extra.get(IN_BASE) or ()
    listed = pem.config.extra.get("modules_to_save") or ()
    return _saved_by([n for n in pem.head_names if n not in in_base], listed)


def _file_key(
    name: str, shape: tuple[int, ...], config: LoraConfig | IA3Config, adapted: Container[str]
) -> tuple[str, tuple[int, ...]]:
    layer, _, role = name.rpartition(".")
    if role == "head":
        module, _, parameter = layer.rpartition(".")
        inside = f"{module}.base_layer.{parameter}" if module in adapted else layer
        return PREFIX + inside, shape
    if role == "lora_magnitude":
        return f"{PREFIX}{layer}{MAGNITUDE}", shape
    if role != "ia3":
        return f"{PREFIX}{layer}.{role}.weight", shape
    assert isinstance(config, IA3Config)
    return f"{PREFIX}{layer}.ia3_l", (1, -1) if config.scales_input(layer) else (-1, 1)


def _settled_config(pem: PEM, config: LoraConfig | IA3Config) -> LoraConfig | IA3Config:
    """Check tensors against the config; full layer names where the targets name others."""
    infos = {n: TensorInfo("F32", tuple(t.shape)) for n, t in pem.tensors.items()}
    layers = layers_of(infos)
    if not layers:
        raise PEMError.build(
            pem.name, "nothing to save", found="no adapter tensors", expected="a module"
        )
    if isinstance(config, LoraConfig):
        check_factors(config, infos, pem.name)
    layers = whole_layers(layers)
    targets = frozenset(config.target_modules)
    hits = [targets_of(n, targets) for n in layers]
    named = all(hits) and targets == set().union(*hits)
    if isinstance(config, IA3Config) and named:
        inputs = frozenset(_feedforward(config))
        named = all(bool(targets_of(n, inputs)) == config.scales_input(n) for n in layers)
    if named:
        return config
    config = replace(config, target_modules=layers)
    if isinstance(config, IA3Config):
        config = replace(
            config, feedforward_modules=tuple(n for n in layers if config.scales_input(n))
        )
    return config


def config_json(pem: PEM, config: LoraConfig | IA3Config) -> dict[str, Any]:
    """The adapter_config.json of a module: every key that carries meaning is written out."""
    saved = list(dict.fromkeys(_saved(pem).values()))
    layers = whole_layers(pem.layers)
    targets: list[str] | str = list(config.target_modules)
    if _names_others(config, layers):
        targets = _expression(layers)
    common: dict[str, Any] = {
        "base_model_name_or_path": pem.base.name,
        "revision": config.extra.get("revision"),
        "task_type": _task_type(pem),
        "inference_mode": True,
        "target_modules": targets,
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": config.fan_in_fan_out,
    }
    extra = {k: v for k, v in config.extra.items() if k not in ("origin", IN_BASE, *common)}
    own: dict[str, Any]
    if isinstance(config, IA3Config):
        inputs: list[str] | str = _feedforward(config)
        scaled = tuple(n for n in layers if config.scales_input(n))
        if inputs and (isinstance(targets, str) or scaled != _ended(layers, inputs)):
            inputs = _expression(scaled)
        own = {"feedforward_modules": inputs, "init_ia3_weights": True}
        return {"peft_type": "IA3", **common, **own, **extra}
    own = {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": False,
        "bias": "none",
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None,
        "init_lora_weights": True,
    }
    return {"peft_type": "LORA", **common, **own, **extra}


def _names_others(config: LoraConfig | IA3Config, layers: Sequence[str]) -> bool:
    """True if PEFT, for which a target names every module whose name ends so, can find others: a
    module that holds a layer, or any where each target is a whole name, one of them without a dot.
    """
    targets, known = frozenset(config.target_modules), frozenset(layers)
    if experts.TARGETS in config.extra:  # their reader knows layers from stacks by the list
        return False
    if targets <= known and any("." not in target for target in targets):
        return True
    parts = (n.split(".") for n in layers)
    holders = {".".join(p[:i]) for p in parts for i in range(1, len(p))} - known
    return any(targets_of(holder, targets) for holder in holders)


def _ended(layers: Iterable[str], inputs: Iterable[str]) -> tuple[str, ...]:
    """The layers that feedforward_modules name for PEFT, in the middle of a word, too."""
    return tuple(n for n in layers if n.endswith(tuple(inputs)))


def _expression(layers: Iterable[str]) -> str:
    """The regular expression of these names and no others."""
    return "|".join(map(re.escape, layers))


def _feedforward(config: IA3Config) -> list[str]:
    """PEFT wants feedforward_modules to be a subset of target_modules."""
    return [t for t in config.target_modules if config.scales_input(t)]


def _saved_by(parameters: Collection[str], listed: Collection[str]) -> dict[str, str]:
    """Full name of a saved module -> how modules_to_save names it: of each parameter the outermost
    module that is listed, by PEFT's rule of name endings, else the one that holds the parameter;
    none that lies in another one."""
    modules: dict[str, str] = {}
    for name in sorted(parameters):
        parts = name.split(".")
        outer = [".".join(parts[:i]) for i in range(1, len(parts))]
        hits = ((m, word) for m in outer for word in listed if m.endswith(word))
        holder = _holder(name)
        module, word = next(hits, (holder, holder))
        modules.setdefault(module, word)
    outermost = {
        module: word
        for module, word in modules.items()
        if not any(module.startswith(f"{other}.") for other in modules)
    }
    # PEFT would copy a module inside another one, too, where a word names both.
    words = tuple(outermost.values())
    inside = {".".join(n.split(".")[:i]) for n in parameters for i in range(n.count(".") + 1)}
    inside = {n for n in inside if any(n.startswith(f"{module}.") for module in outermost)}
    nested = any(n.endswith(words) for n in inside)
    return {module: module for module in outermost} if nested else outermost


def _holder(parameter: str) -> str:
    """The module that a head's parameter belongs to."""
    parts = parameter.split(".")
    known = next((i for i, p in enumerate(parts) if p in HEAD_MODULES), None)
    if parameter.startswith("bert.pooler.") or ".pooler.dense." in parameter:
        return parameter[: parameter.index("pooler") + len("pooler")]
    return ".".join(parts[: known + 1]) if known is not None else parameter.rpartition(".")[0]


def _task_type(pem: PEM) -> str | None:
    """The task type kept from the source, none if it has none; else what the head says.

    A type for which PEFT looks for a head is left out where there is none, and one of language
    models where there is a classifier.
    """
    kept = pem.config.extra.get("task_type")
    if kept is None and "task_type" in pem.config.extra:
        return None
    saved = _saved(pem)
    heads = [m for m in saved if m.endswith(TASK_HEADS["SEQ_CLS"])]
    if kept in TASK_HEADS:
        return kept if any(m.endswith(TASK_HEADS[kept]) for m in saved) else None
    if kept and not (heads and kept in (CAUSAL_TASK, SEQ2SEQ_TASK)):
        return str(kept)
    problem = pem.head.problem if pem.head else None
    if problem in CLASSIFIERS and heads:
        return "SEQ_CLS"
    return {"causal_lm": CAUSAL_TASK, "seq2seq_lm": SEQ2SEQ_TASK}.get(problem or "")
