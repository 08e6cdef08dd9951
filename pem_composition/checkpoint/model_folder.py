"""A Hugging Face model folder as it is written: shards with their index, config, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pem_composition.arithmetic.head_policies import OUTPUT_MODULES
from pem_composition.checkpoint.content import CARD, HEADS, MODEL_CONFIG, RECORD
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.stream import Output, Ring, stream_safetensors
from pem_composition.config import HeadInfo
from pem_composition.errors import IncompatibleModules
from pem_composition.safe_files import is_file, open_regular, read_json, write_json

MAX_SHARD_BYTES = 5 * 10**9
# What a tokenizer, a processor or a generation is made of; no weights, code, records or results.
COMPANIONS = re.compile(
    r"(generation|tokenizer|processor|preprocessor|video_preprocessor|image_processor"
    r"|feature_extractor|audio_tokenizer)_config\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|normalizer|chat_template|tekken|emoji|byte_maps"
    r"|(\w+[-_])?vocab([-_]\w+)?)\.json"
    r"|(vocab|merges|dict)\.txt|bpe\.codes|prophetnet\.tokenizer"
    r"|.+\.(jinja|model|model\.v\d+|spm|bpe|tiktoken)"
)
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
CONFIGS_WITH_CODE = re.compile(r"(.+_)?config\.json")
# PEFT's task types, and the end of the name of the class that has such a head.
CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def is_model_file(name: str) -> bool:
    """True for files a model folder consists of (replaced, not kept, when it is overwritten)."""
    weights = name.startswith(("model.safetensors", "model-", "pytorch_model")) and name.endswith(
        (".safetensors", ".json", ".bin")
    )
    return (
        weights
        or name in (MODEL_CONFIG, RECORD, CARD, HEADS, TEMPLATES)
        or bool(COMPANIONS.fullmatch(name))
    )


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(infos):
        if shards[-1] and size + infos[name].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += infos[name].nbytes
    return shards


def write_model(
    folder: Path, outputs: Mapping[str, Output], max_shard_bytes: int | None = None
) -> dict[str, str]:
    """Write the tensors as one file or as shards with an index, in order of their names.

    Returns:
        File -> sha256.
    """
    infos = {name: output.info for name, output in outputs.items()}
    shards = _shards(infos, max_shard_bytes or MAX_SHARD_BYTES)
    table: dict[str, str] = {}
    digests: dict[str, str] = {}
    ring = Ring()
    for i, names in enumerate(shards, start=1):
        file = (
            f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        digests[file] = stream_safetensors(folder / file, {n: outputs[n] for n in names}, ring)
        table |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(i.nbytes for i in infos.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": table},
        )
    return digests


def write_companions(source: Path, folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """config.json, and copies of the files of tokenizer and processor.

    Returns:
        Notes: which code of the model's own was not copied.
    """
    write_json(folder / MODEL_CONFIG, config)
    for file in _companions(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        with open_regular(file, source) as data:
            target.write_bytes(data.read())
    code = sorted({name for name in _code(source) if is_file(source / name)})
    if not code:
        return ()
    do = "copy it from there yourself if you trust it"
    return (f"code named by auto_map is not copied from {source}: {', '.join(code)}; {do}",)


def _code(source: Path) -> Iterable[str]:
    """Files of code that a configuration of the folder names, for models that are no class of
    transformers: ``{"AutoModel": "modeling_x.Class", "AutoTokenizer": [slow, fast]}``."""
    for file in sorted(source.iterdir()):
        if CONFIGS_WITH_CODE.fullmatch(file.name) and is_file(file):
            table = read_json(file, source).get("auto_map")
            for value in table.values() if isinstance(table, dict) else ():
                for word in value if isinstance(value, list) else [value]:
                    if isinstance(word, str) and re.fullmatch(r"\w+\.\w+", word):
                        yield word.partition(".")[0] + ".py"


def with_head(
    config: Mapping[str, Any],
    head: Mapping[str, tuple[int, ...]],
    info: HeadInfo | None,
    end: str | None,
    stored: Container[str],
) -> dict[str, Any]:
    """The configuration of a model whose head comes from a module: its class, and its labels.

    The class stays where the base has these parameters itself; else the module says it.
    Labels that nobody recorded are the base's where their number fits.

    Args:
        head: the head's parameters and their shapes.
        end: of the class's name (``class_end``), if the module says it.
        stored: the base's parameters.

    Raises:
        IncompatibleModules: recorded labels that are not as many as the head's outputs.
    """
    config = dict(config)
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        if any(n not in stored for n in head):
            stem = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", names[0])
            config["architectures"] = [stem + (end or _class_of_head(config, head))]
        if "Classification" not in config["architectures"][0]:
            return config
    outputs = [s[0] for n, s in head.items() if n.split(".")[-2] in OUTPUT_MODULES and len(s) == 2]
    if len(outputs) != 1:
        return config
    return _with_labels(config, outputs[0], info.labels if info else ())


def class_end(extra: Mapping[str, Any]) -> str | None:
    """How the name of the class of a module's model ends, from its task type or config.json."""
    names = (extra.get("config") or {}).get("architectures")
    own = re.search(r"For[A-Z]\w*$", str(names[0])) if isinstance(names, list) and names else None
    return own[0] if own else CLASSES.get(str(extra.get("task_type")))


def task_type_of(name: str) -> str | None:
    """PEFT's task type of a class with a head; None for one that PEFT has no word for."""
    return next((task for task, end in CLASSES.items() if name.endswith(end)), None)


def _class_of_head(config: Mapping[str, Any], head: Iterable[str]) -> str:
    if any("qa_outputs" in n.split(".") for n in head):
        return "ForQuestionAnswering"
    images = "image_size" in config or "num_channels" in config
    return "ForImageClassification" if images else "ForSequenceClassification"


def _with_labels(config: dict[str, Any], rows: int, labels: Sequence[str]) -> dict[str, Any]:
    """The configuration of a classifier with this number of outputs; one is a regression."""
    known = config.get("id2label")
    if labels and len(labels) != rows:
        raise IncompatibleModules.build(
            "head",
            "its labels do not fit its output layer",
            found=f"{len(labels)} labels, {rows} rows",
            expected="a label per row",
            do="leave the head out (--head none), or correct the labels in the module's pem.json",
        )
    if not labels and (len(known) if isinstance(known, dict) else 2) != rows:
        labels = tuple(f"LABEL_{i}" for i in range(rows))
    if rows == 1:
        config["problem_type"] = "regression"
    elif config.get("problem_type") == "regression":
        config["problem_type"] = None
    if labels:
        config["id2label"] = {str(i): w for i, w in enumerate(labels)}
        config["label2id"] = {w: i for i, w in enumerate(labels)}
    return config


def with_dtype(config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A configuration that names the written torch dtype (None: float32)."""
    name = str(dtype or "torch.float32").removeprefix("torch.")
    return {**config, ("torch_dtype" if "torch_dtype" in config else "dtype"): name}


def _companions(source: Path) -> Iterable[Path]:
    own = [f for f in sorted(source.iterdir()) if COMPANIONS.fullmatch(f.name) and is_file(f)]
    return own + [f for f in sorted((source / TEMPLATES).glob("*.jinja")) if is_file(f)]
