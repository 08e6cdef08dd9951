"""PEFT's adapter_config.json: read strictly, so that nothing that changes the meaning is ignored.

PEFT fills absent keys with defaults and drops unknown ones with a warning; here an absent
``lora_alpha``, a misspelt key or an option this library cannot represent is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pem_composition.checkpoint.files import MAX_TENSORS, TensorInfo
from pem_composition.checkpoint.regular import RegularExpression
from pem_composition.config import (
    AdapterConfig,
    IA3Config,
    LoraConfig,
    expert_of,
    pattern_keys,
    plain_name,
)
from pem_composition.errors import CheckpointError, UnsupportedModule, nearest

PEFT_TYPES = {"LORA": "lora", "IA3": "ia3"}
CONFIG_KEYS = {
    "lora": (
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
        "alpha_pattern", "init_lora_weights", "target_parameters",
    ),
    "ia3": ("feedforward_modules", "init_ia3_weights"),
}  # fmt: skip
COMMON_KEYS = (
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "fan_in_fan_out", "base_model_name_or_path", "task_type", "revision",
)  # fmt: skip
# Say nothing about the numbers; dropped on reading.
HARMLESS_KEYS = (
    "auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "merge_weights",
)  # fmt: skip
REFUSED_KEYS: Mapping[str, str] = {
    "lora_bias": "lora_bias (biases of lora_B)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication (it changes the base model)",
    "megatron_config": "Megatron parallel layers",
    "loftq_config": "LoftQ (it changes the base model)",
    "corda_config": "CorDA (it changes the base model)",
    "lora_ga_config": "LoRA-GA (it changes the base model)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "enable_lora": "merged linear layers of early PEFT (enable_lora)",
    "ensure_weight_tying": "ensure_weight_tying",
}
SAFE_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
# A config with one of these was written by a PEFT that also writes use_rslora (and use_dora).
LATER_KEYS = frozenset(
    (
        *("peft_version", "use_dora", "layer_replication", "runtime_config", "lora_bias"),
        *("eva_config", "corda_config", "exclude_modules", "trainable_token_indices"),
        *("target_parameters", "qalora_group_size", "ensure_weight_tying"),
    )
)
MAX_RANK = 1_000_000
MAX_ALPHA = 1e30  # far above any use; its square and that of the update's norm are doubles
MAX_SAVED = 100  # modules_to_save


def parse(raw: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The adapter config of a PEFT adapter_config.json, before it is compared with the tensors.

    modules_to_save, task_type and revision stay in ``extra``.

    Raises:
        UnsupportedModule: an option that cannot be represented, by name.
        CheckpointError: a key that is missing, misspelt or of the wrong type.
    """
    kind = _kind(raw, path)
    _refuse_options(raw, path)
    _refuse_unknown(raw, kind, path)
    check = _Checker(raw, path)
    extra = {"task_type": raw.get("task_type") or None}
    if raw.get("revision"):
        extra["revision"] = raw["revision"]
    if saved := check.names("modules_to_save", at_most=MAX_SAVED):
        extra["modules_to_save"] = saved
    if parameters := check.names("target_parameters"):
        extra["target_parameters"] = parameters
    check.text("task_type")
    check.text("revision")
    check.text("base_model_name_or_path")
    fan = check.boolean("fan_in_fan_out")
    targets = check.names("target_modules", regex=True)
    if kind == "ia3":
        check.required("target_modules", "feedforward_modules")
        return IA3Config(targets, check.names("feedforward_modules", regex=True), fan, extra)
    return LoraConfig(
        r=check.rank("r", raw.get("r")),
        alpha=check.alpha("lora_alpha", raw.get("lora_alpha")),
        target_modules=targets,
        use_rslora=_use_rslora(raw, check, path),
        dropout=check.dropout(),
        rank_pattern=check.pattern("rank_pattern", check.rank),
        alpha_pattern=check.pattern("alpha_pattern", check.alpha),
        fan_in_fan_out=fan,
        use_dora=check.boolean("use_dora"),
        extra=extra,
    )


def targets_from_tensors(raw: Mapping[str, Any]) -> bool:
    """True if the config chooses layers by more than a list of names: a regular expression (never
    run), layer numbers or exclusions. The tensors then say which layers there are."""
    return not isinstance(raw.get("target_modules"), list) or bool(
        raw.get("exclude_modules") or raw.get("layers_to_transform") is not None
    )


def settled_patterns(config: LoraConfig, infos: Mapping[str, TensorInfo], path: Path) -> LoraConfig:
    """The config with patterns that name layers, where PEFT's are regular expressions.

    Where expressions give ranks, those of the tensors are written down.

    Raises:
        UnsupportedModule: an expression of ``alpha_pattern`` that is not followed here.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    sizes = {
        n.removesuffix(".lora_A"): i.shape[0] for n, i in infos.items() if n.endswith(".lora_A")
    }
    ranks = {expert[0] if (expert := expert_of(n)) else n: r for n, r in sizes.items()}
    layers = list(ranks)
    key_of = pattern_keys(layers)
    alphas = values(config.alpha_pattern, config.alpha, layers, path)
    if alphas != {n: config.alpha_of(n) for n in layers} or _expressions(config.alpha_pattern):
        pattern = {key_of[n]: a for n, a in alphas.items() if a != config.alpha}
        config = replace(config, alpha_pattern=pattern)
    named = {n: config.rank(n) for n in layers}
    if _expressions(config.rank_pattern) or (
        ranks != named and ranks == values(config.rank_pattern, config.r, layers, path)
    ):
        pattern = {key_of[n]: r for n, r in ranks.items() if r != config.r}
        config = replace(config, rank_pattern=pattern)
    return config


def values(
    pattern: Mapping[str, Any], default: Any, layers: Sequence[str], path: Path
) -> dict[str, Any]:
    keys = _first_keys(pattern, layers, path)
    return {n: pattern[keys[n]] if n in keys else default for n in layers}


def _expressions(pattern: Iterable[str]) -> bool:
    return any(map(_is_expression, pattern))


def _is_expression(key: str) -> bool:
    """True unless the key can be read as the end of a layer's name, ``^`` before a whole one."""
    layer = key.removeprefix("^")
    return not all(layer.split(".")) or not all(c.isalnum() or c in "_.-" for c in layer)


def _first_keys(pattern: Mapping[str, object], layers: Sequence[str], path: Path) -> dict[str, str]:
    """Layer -> the first key that PEFT finds in it."""
    ends: dict[int, list[tuple[str, str]]] = defaultdict(list)  # by length: end of a layer, layer
    for layer in layers if pattern else ():
        parts = layer.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            ends[len(end)].append((end, layer))
    found: dict[str, str] = {}
    for key in pattern:
        if _is_expression(key):
            hits = _matched(key, [n for n in layers if n not in found], path)
        else:
            plain, whole = key.removeprefix("^"), key.startswith("^")
            # A dot stands for any character.
            hits = [
                layer
                for end, layer in ends[len(plain)]
                if (end == layer or not whole)
                and (end == plain or all(a in (b, ".") for a, b in zip(plain, end, strict=True)))
            ]
        for layer in hits:
            found.setdefault(layer, key)
    return found


def _matched(key: str, layers: Iterable[str], path: Path) -> list[str]:
    try:
        expression = RegularExpression(key)
        return [layer for layer in layers if expression.ends(layer)]
    except ValueError as error:
        raise UnsupportedModule.build(
            path,
            f"alpha_pattern: a regular expression that is not followed ({error})",
            found=repr(key)[:100],
            expected="characters, classes, groups, alternatives and repetitions",
            do="list the layers by name",
        ) from None


def _kind(raw: Mapping[str, Any], path: Path) -> str:
    if "peft_type" not in raw:
        raise CheckpointError.build(
            path, "peft_type is missing", expected="LORA or IA3", do="restore the config"
        )
    found = raw["peft_type"]
    if not isinstance(found, str) or found not in PEFT_TYPES:
        raise UnsupportedModule.build(
            path,
            "peft_type cannot be represented",
            found=repr(found),
            expected=" or ".join(PEFT_TYPES),
        )
    return PEFT_TYPES[found]


def _neutral(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _refuse_options(raw: Mapping[str, Any], path: Path) -> None:
    for key, what in REFUSED_KEYS.items():
        if not _neutral(raw.get(key)):
            raise UnsupportedModule.build(
                path,
                f"{key}: {what} cannot be represented",
                found=raw[key],
                expected="unset",
                do="train the module without it",
            )
    if raw.get("bias", "none") != "none":
        raise UnsupportedModule.build(
            path,
            "bias: trained biases cannot be represented",
            found=repr(raw["bias"]),
            expected="'none'",
            do="train the module with bias='none'",
        )
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in SAFE_INITS:
        raise UnsupportedModule.build(
            path,
            "init_lora_weights: an initialisation that changes the base cannot be represented",
            found=repr(init),
            expected="true, false, gaussian, orthogonal or eva",
            do="convert the module to a plain LoRA with the method's own tool",
        )


def _refuse_unknown(raw: Mapping[str, Any], kind: str, path: Path) -> None:
    known = (*COMMON_KEYS, *CONFIG_KEYS[kind], *HARMLESS_KEYS, *REFUSED_KEYS, "bias")
    for key, value in raw.items():
        if key in known or _neutral(value):
            continue
        close = nearest(key[:100], known)
        raise CheckpointError.build(
            path,
            f"unknown key {key!r}",
            found=repr(value),
            expected=f"{close!r}" if close else "a key of a plain LoRA or (IA)^3 config",
            do="rename it" if close else "remove it if it does not change what the module computes",
        )


def _use_rslora(raw: Mapping[str, Any], check: _Checker, path: Path) -> bool:
    for key, later in (("use_rslora", LATER_KEYS), ("use_dora", LATER_KEYS - {"use_dora"})):
        signs = sorted(later & raw.keys())
        if key not in raw and signs:
            raise CheckpointError.build(
                path,
                f"{key} is missing although {signs[0]} is there, so it was removed or lost",
                expected="true or false",
                do=f"add {key} as the module was trained",
            )
    return check.boolean("use_rslora")


class _Checker:
    """Typed access to one config; every error names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw, self._path = raw, path

    def _wrong(self, key: str, expected: str, found: object = None) -> CheckpointError:
        value = self._raw.get(key) if found is None else found
        error = CheckpointError.build(
            self._path, key, found=repr(value), expected=expected, do="correct the config"
        )
        assert isinstance(error, CheckpointError)
        return error

    def required(self, *keys: str) -> None:
        for key in keys:
            if self._raw.get(key) is None:
                raise CheckpointError.build(
                    self._path,
                    f"{key} is missing",
                    expected="a value; defaults differ between versions",
                    do=f"add {key} as the module was trained",
                )

    def boolean(self, key: str) -> bool:
        value = self._raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return bool(value)

    def text(self, key: str) -> None:
        value = self._raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text")

    def names(
        self, key: str, *, regex: bool = False, at_most: int = MAX_TENSORS
    ) -> tuple[str, ...]:
        value = self._raw.get(key)
        if value is None or (regex and isinstance(value, str)):
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self._wrong(key, "a list of names")
        if len(value) > at_most:
            raise self._wrong(key, f"at most {at_most} names", f"{len(value)} names")
        return tuple(dict.fromkeys(map(plain_name, value)))

    def rank(self, key: str, value: Any) -> int:
        if value is None:
            self.required(key)
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._wrong(key, f"a whole number from 1 to {MAX_RANK}", value)
        return value

    def alpha(self, key: str, value: Any) -> float:
        if value is None:
            self.required(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= MAX_ALPHA
        ):
            raise self._wrong(key, "a number > 0", value)
        return value

    def dropout(self) -> float:
        value = self._raw.get("lora_dropout", 0.0)
        value = 0.0 if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self._wrong("lora_dropout", "a number from 0 to below 1")
        return float(value)

    def pattern(self, key: str, convert: Any) -> dict[str, Any]:
        """A table of layer names, ``^`` before a whole one, or of regular expressions."""
        table = self._raw.get(key) or {}
        if not isinstance(table, dict):
            raise self._wrong(key, "a table of layer names")
        result = {}
        for pattern, value in table.items():
            name = pattern.removesuffix("$")
            plain = not _is_expression(name)
            result[plain_name(name) if plain else pattern] = convert(f"{key}[{pattern!r}]", value)
        return result
