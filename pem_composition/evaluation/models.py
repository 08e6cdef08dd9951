"""Base models for training and evaluation: loaded in float32, complete, or refused in one line.

transformers 5 loads in the dtype of the file and fills missing weights at random with a warning;
both change results silently, so neither is left to it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from pem_composition import network, offline
from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.full import Weights, head_info
from pem_composition.checkpoint.model_folder import write_model
from pem_composition.checkpoint.stream import whole
from pem_composition.checkpoint.tensors import info_of
from pem_composition.config import HeadInfo
from pem_composition.errors import CheckpointError, PEMError, UsageError, install, installed
from pem_composition.evaluation import sharding
from pem_composition.evaluation.keys import check_unchanged
from pem_composition.evaluation.load_options import AS_IT_IS, LoadOptions, Shards
from pem_composition.evaluation.model_names import local_config, resolve
from pem_composition.launch import local_rank
from pem_composition.safe_files import read_json, write_json
from pem_composition.tasks.glue import Task

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
REPACKS = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' 4-bit layers
UNSAFE_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

VOCABULARIES = r"tokenizer\.json|vocab\.(json|txt|bpe)|.*\.(model|tiktoken)|tekken\.json"


class LoadedBase(NamedTuple):
    """A model ready for training or evaluation.

    ``loading_info`` is in the form of ``from_pretrained(output_loading_info=True)``: under
    ``missing_keys`` the parameters of head and pooler that are newly initialised, under
    ``unexpected_keys`` the tensors the model has no place for (a language model's head).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    loading_info: dict[str, Any]


def load_base(
    model_name_or_path: str | Path,
    task: Task | None = None,
    *,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    load_options: LoadOptions | Shards = AS_IT_IS,
    **config_overrides: float,
) -> LoadedBase:
    """A sequence classification model for the task, its tokenizer, and what the checkpoint lacked.

    The head of a base model is newly initialised (from torch's global random state) and named in
    ``missing_keys``; the rest must be complete.

    Args:
        model_name_or_path: a directory, a hub name, or a name that ``pem offline list`` shows
            (``minilm`` or ``offline:minilm``).
        num_labels: outputs, where no task says so.
        dtype: torch.float32 if None, whatever the file holds.
        load_options: how the weights are held; its dtype is used where ``dtype`` is None.
        config_overrides: values of the model's configuration, such as ``hidden_dropout_prob``.

    Raises:
        CheckpointError: no such directory or hub name; not a model; another architecture; weights
            missing outside the head; a head of another size or with other classes.
    """
    source = resolve(model_name_or_path)
    config = _config(source, task, num_labels, config_overrides)
    _check_classifier(source, config)
    model, info = _load_model(
        AutoModelForSequenceClassification, source, config, dtype, load_options
    )
    tokenizer = _tokenizer_of(model, source)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    _check_complete(source, model, missing)
    if task is not None and not any(_in_head(model, key) for key in missing):
        _check_labels(source, task, head_info(stored_config(source)))
    if model.config.pad_token_id is None or decodes(model.config):
        # Decoders pool the last token that is not this one, so it is the one that rows are padded
        # with, whatever config.json says.
        model.config.pad_token_id = tokenizer.pad_token_id
    return LoadedBase(model, tokenizer, {"missing_keys": missing, "unexpected_keys": unexpected})


def load_seq2seq(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    load_options: LoadOptions | Shards = AS_IT_IS,
    **config_overrides: float,
) -> LoadedBase:
    """An encoder-decoder model with its output embeddings, and its tokenizer; nothing is new in it.

    Arguments as those of ``load_base``.

    Raises:
        CheckpointError: no such directory or hub name; no encoder-decoder model; weights missing;
            output embeddings that were stored apart from the input's but would be tied to them.
    """
    source = resolve(model_name_or_path)
    config = _config(source, None, None, config_overrides)
    _check_writes(source, config)
    return _load_writer(AutoModelForSeq2SeqLM, source, config, dtype, load_options)


def load_text_to_text(
    model_name_or_path: str | Path,
    *,
    alone: bool = False,
    load_options: LoadOptions | Shards = AS_IT_IS,
    **config_overrides: float,
) -> LoadedBase:
    """A model that answers in words: an encoder-decoder, or a decoder alone.

    Args:
        alone: a decoder is needed.

    Raises:
        CheckpointError: see ``load_seq2seq`` and ``load_causal``.
    """
    config = config_of(resolve(model_name_or_path))
    load = load_causal if alone or decodes(config) else load_seq2seq
    return load(model_name_or_path, load_options=load_options, **config_overrides)


def load_causal(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    load_options: LoadOptions | Shards = AS_IT_IS,
    **config_overrides: float,
) -> LoadedBase:
    """A decoder with its output embeddings (GPT-2, Llama), and its tokenizer; nothing is new in it.

    Arguments as those of ``load_base``.

    Raises:
        UsageError: quantisation without its package.
        CheckpointError: no such directory or hub name; a model with an encoder; weights missing; no
            end token; output embeddings that would be tied though they were stored apart.
    """
    source = resolve(model_name_or_path)
    config = _config(source, None, None, config_overrides)
    _check_decodes(source, config)
    loaded = _load_writer(AutoModelForCausalLM, source, config, dtype, load_options)
    _keep_gradients(loaded.model)
    if loaded.tokenizer.eos_token_id is None:
        raise CheckpointError.build(
            source, "the tokenizer has no end token", do="name one in tokenizer_config.json"
        )
    return loaded


def _load_writer(
    factory: Any,
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    load_options: LoadOptions | Shards = AS_IT_IS,
) -> LoadedBase:
    """A model with output embeddings, complete."""
    model, info = _load_model(factory, source, config, dtype, load_options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise _incomplete(source, model, missing, len(model.state_dict()), "every weight")
    _check_ties(source, model)
    unexpected = sorted(info["unexpected_keys"])
    return LoadedBase(
        model, _tokenizer_of(model, source), {"missing_keys": [], "unexpected_keys": unexpected}
    )


def _tokenizer_of(model: PreTrainedModel, source: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, whose padding token has a row in the embeddings.

    Tokenizers of decoders often had one added while the embeddings were left as they were; the end
    token takes its place there, as where a tokenizer has none.

    Raises:
        CheckpointError: the end token has no row either.
    """
    tokenizer, rows = load_tokenizer(source), model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= rows:
            raise CheckpointError.build(
                source, "the tokenizer pads with a token that the model does not know",
                found=f"token {tokenizer.pad_token_id}", expected=f"below {rows}",
                do="resize the embeddings, or name another padding token in tokenizer_config.json",
            )  # fmt: skip
        tokenizer.pad_token = tokenizer.eos_token
        if (model.config.pad_token_id or 0) >= rows:
            model.config.pad_token_id = tokenizer.pad_token_id
        return tokenizer
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise CheckpointError.build(
            source, "the tokenizer has tokens that the model does not know",
            found=f"token {largest}", expected=f"below {rows}, the rows of the embeddings",
            do="give the tokenizer that belongs to the model, or resize the embeddings",
        )  # fmt: skip
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configuration; two embedding tensors are declared as two.

    transformers 5 writes ``tie_word_embeddings`` true for every T5. Readers that believe it (its
    earlier releases do) would overwrite the output embeddings with the input's.
    """
    if sharding.is_sharded(model):
        _write_parts(model, folder)
    else:
        model.save_pretrained(folder)
    config, out = read_json(folder / MODEL_CONFIG), model.get_output_embeddings()
    apart = out is not None and out.weight is not model.get_input_embeddings().weight
    if apart and config.get("tie_word_embeddings"):
        write_json(folder / MODEL_CONFIG, config | {"tie_word_embeddings": False})


def _write_parts(model: PreTrainedModel, folder: Path) -> None:
    """What ``save_pretrained`` writes, each tensor gathered when it is written."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [unsharded_class(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tensors, names = sharding.stored_tensors(model), names_in_file(model)

    def write(fetch: Callable[[str], Tensor]) -> None:
        values = {n: whole(partial(fetch, own), info_of(tensors[own])) for n, own in names.items()}
        write_model(folder, values)

    sharding.by_one(model, write)


def names_in_file(model: PreTrainedModel) -> dict[str, str]:
    """Name in the file -> name in the model, of every tensor that is saved.

    Raises:
        CheckpointError: some are stored otherwise than they are held (experts one by one, mostly).
    """
    ignored = model._keys_to_ignore_on_save or ()
    held = {n: t for n, t in sharding.stored_tensors(model).items() if n not in ignored}
    shapes = {n: torch.empty(t.shape, device="meta") for n, t in held.items()}
    own = {id(tensor): name for name, tensor in shapes.items()}
    found = revert_weight_conversion(model, shapes)
    other = [name for name, tensor in found.items() if id(tensor) not in own]
    if other:
        raise CheckpointError.build(
            "--fsdp", f"{model.config.model_type} stores weights otherwise than it holds them",
            found=_some(other), expected="tensors that are written as they are",
            do="train a module (lora or ia3), or leave --fsdp out",
        )  # fmt: skip
    return {name: own[id(tensor)] for name, tensor in found.items()}


def unsharded_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The architecture of a model, of which FSDP2 makes a class of its own."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


@torch.no_grad()
def copy_model(folder: Path, model: PreTrainedModel) -> None:
    """Put the numbers of a saved model into one of its kind; of a sharded one each its part."""
    sharded = sharding.is_sharded(model)
    how = {"distributed_config": model.config.distributed_config} if sharded else {}
    saved = _load(unsharded_class(model), str(folder), dtype=model.dtype, **how)
    values = sharding.stored_tensors(saved)
    for name, tensor in sharding.stored_tensors(model).items():
        tensor.copy_(values[name])


def _load_model(
    factory: Any,
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    load_options: LoadOptions | Shards = AS_IT_IS,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what its checkpoint lacked; tensors of another shape are refused."""
    check_unchanged(source)
    model, info = _load(
        factory,
        source,
        config=config,
        dtype=dtype or load_options.dtype or "float32",
        **_weights_keywords(load_options, factory, config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with both sizes
        use_safetensors=_safetensors(source),
    )
    _check_sizes(source, info["mismatched_keys"])
    _check_depth(source, model, info["unexpected_keys"])
    _fuse_gelu(model)
    return model, info


def _weights_keywords(
    options: LoadOptions | Shards, factory: Any, config: PretrainedConfig
) -> dict[str, Any]:
    """Keywords for ``from_pretrained``, the dtype aside.

    A quantised model cannot be moved: each process of a launch loads it onto its own GPU.

    Raises:
        UsageError: quantisation without bitsandbytes.
    """
    if isinstance(options, Shards):
        return sharding.keywords(factory, config, options.processes)
    placed: dict[str, Any] = {"device_map": options.device_map} if options.device_map else {}
    if options.bits is None:
        return placed
    if not placed and torch.cuda.is_available():
        placed = {"device_map": {"": local_rank()}}
    if not installed("bitsandbytes"):
        raise UsageError.build(
            f"--load_in_{options.bits}bit", "the package bitsandbytes is not installed",
            do=install("bitsandbytes"),
        )  # fmt: skip
    if options.bits == 8:
        return {**placed, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options.dtype or "float32",
    )
    return {**placed, "quantization_config": four}


def _keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights at the first pass without gradients.

    With AVX512-BF16 bitsandbytes (0.50) does so for a kernel that has no gradient, and never turns
    back: training went on after an evaluation, and changed nothing.
    """
    for layer in model.modules():
        if hasattr(layer, REPACKS):
            setattr(layer, REPACKS, False)


def _fuse_gelu(model: PreTrainedModel) -> None:
    """x/2 (1 + tanh(sqrt(2/pi) (x + .044715 x^3))) in one kernel, for T5's and GPT-2's eight.

    The same function, up to rounding; transformers keeps the eight to repeat older numbers bit for
    bit.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _check_classifier(source: str, config: PretrainedConfig) -> None:
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        writes = config.is_encoder_decoder
        raise CheckpointError.build(
            source, f"{config.model_type} models have no classification head",
            expected="a model with one",
            do="train it text to text (--objective seq2seq)" if writes else "give another model",
        )  # fmt: skip


def _check_writes(source: str, config: PretrainedConfig) -> None:
    if not config.is_encoder_decoder or type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise CheckpointError.build(
            source, "--objective seq2seq needs a model that writes",
            found=f"a {config.model_type} model", expected="T5, BART, GPT-2, Llama or their like",
            do="give such a model, or train a head (--objective classification)",
        )  # fmt: skip


def decodes(config: PretrainedConfig) -> bool:
    """True for a decoder alone; BERT's kind reads both ways unless it is told otherwise."""
    one_way = getattr(config, "is_decoder", False) or (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    )
    return not config.is_encoder_decoder and one_way and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _check_decodes(source: str, config: PretrainedConfig) -> None:
    """Refuse what is no decoder alone."""
    if not decodes(config):
        writes = config.is_encoder_decoder
        do = "train it text to text (--objective seq2seq)" if writes else "give a decoder"
        raise CheckpointError.build(
            source, "a causal language model is needed",
            found=f"a {config.model_type} model, which is no decoder alone",
            expected="GPT-2, Llama or another decoder", do=do,
        )  # fmt: skip


def _check_ties(source: str, model: PreTrainedModel) -> None:
    """Output embeddings share the input's tensor only where the checkpoint means them to.

    transformers 5 sets ``tie_word_embeddings`` for every T5, although the newer ones (1.1, Flan)
    have two tensors; a file without the second one would silently get another model's logits.
    """
    folder, out = Path(source), model.get_output_embeddings()
    if not folder.is_dir() or out.weight is not model.get_input_embeddings().weight:
        return
    name = next(n for n, m in model.named_modules() if m is out) + ".weight"
    with Weights(folder, codes=True) as stored:
        apart = name in stored.infos and _differs(out.weight.detach(), stored.raw(name))
        lost = name not in stored.infos and (
            read_json(folder / MODEL_CONFIG).get("tie_word_embeddings") is False
        )
    if apart or lost:
        raise CheckpointError.build(
            source, f"{name} is not the input embeddings, but would be loaded as them",
            found="another tensor in the file" if apart else "no such tensor in the file",
            expected="two tensors (tie_word_embeddings false)",
            do="convert the model again" if lost else "use another release of transformers",
        )  # fmt: skip


def _differs(live: Tensor, stored: Tensor) -> bool:
    return not torch.equal(sharding.whole(live).cpu(), stored.to(live.dtype))


def _config(
    source: str, task: Task | None, num_labels: int | None, overrides: dict[str, float]
) -> PretrainedConfig:
    """The model's configuration for the task."""
    config = config_of(source)
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise CheckpointError.build(
                f"--{name}", f"{config.model_type} models have no such setting", do="leave it out"
            )
        setattr(config, name, value)
    if task is not None or num_labels is not None:
        config.num_labels = task.num_labels if task else num_labels
    if task is not None:
        config.problem_type = task.problem_type
        if not task.regression:
            config.id2label = task.id2label
            config.label2id = {word: i for i, word in task.id2label.items()}
    return config


def config_of(source: str) -> PretrainedConfig:
    """The configuration as transformers reads it.

    Raises:
        CheckpointError: no such model.
    """
    found: PretrainedConfig = _load(AutoConfig, source)
    return found


def stored_config(source: str) -> dict[str, Any]:
    """The config.json of a folder, or of a hub name as transformers reads it.

    Raises:
        CheckpointError: no such model, or no JSON.
    """
    found = local_config(source)
    return found or dict(json.loads(config_of(source).to_json_string(use_diff=False)))


def load_tokenizer(model_name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token (the end token where a decoder has none).

    Raises:
        CheckpointError: no such model, or one without tokenizer files.
    """
    source = resolve(model_name_or_path)
    tokenizer = _load(AutoTokenizer, source)
    _check_vocabulary(source, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _check_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers makes up an empty tokenizer where a folder has none; bytes need no file."""
    folder, names = Path(source), set(tokenizer.vocab_files_names.values())
    if not folder.is_dir() or not names or any((folder / name).is_file() for name in names):
        return
    if not any(re.fullmatch(VOCABULARIES, file.name) for file in folder.iterdir()):
        raise CheckpointError.build(
            folder, "a model without its tokenizer", found="no vocabulary",
            expected=", ".join(sorted(names)), do="copy the tokenizer's files into the folder",
        )  # fmt: skip


def _safetensors(source: str) -> bool | None:
    """True where the folder has safetensors; False for pickles only, read by the restricted loader.

    Raises:
        CheckpointError: no weights, or pickles while the environment turns the restriction off.
    """
    path = Path(source)
    if not path.is_dir():
        return None
    if any((path / name).is_file() for name in WEIGHTS):
        return True
    if not any((path / name).is_file() for name in PICKLES):
        raise CheckpointError.build(
            source, "no weights in the directory", found=_some(p.name for p in path.iterdir()),
            expected=WEIGHTS[0],
        )  # fmt: skip
    if os.environ.get(UNSAFE_SWITCH):
        raise CheckpointError.build(
            source, f"{PICKLES[0]} could run code while {UNSAFE_SWITCH} is set", do="unset it"
        )
    return False


def _load(factory: Any, source: str, **keywords: Any) -> Any:
    """``factory.from_pretrained``, quietly, with every failure as one line."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with network.session():
            return factory.from_pretrained(source, trust_remote_code=False, **keywords)
    except Exception as error:  # the library raises a dozen kinds for a file that is not a model
        raise _explained(source, error) from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _explained(source: str, error: Exception) -> PEMError:
    kind = type(error).__name__
    reason = str(error).strip().partition("\n")[0][:300] or kind
    named_in_utf8 = source.encode(errors="ignore").decode() == source
    if Path(source).is_dir():
        return CheckpointError.build(
            source, f"cannot be loaded ({kind}: {reason})",
            do="check that the files are complete and belong together" if named_in_utf8
            else "link the folder under a name in UTF-8",
        )  # fmt: skip
    models = ", ".join(offline.names("model"))
    return CheckpointError.build(
        f"--model_name_or_path {source}", f"neither in the cache nor from the hub ({reason})",
        do=f"give a model directory, or one of {models}",
    )  # fmt: skip


def _in_head(model: PreTrainedModel, key: str) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.")


def _incomplete(
    source: str, model: PreTrainedModel, absent: Sequence[str], total: int, expected: str
) -> PEMError:
    return CheckpointError.build(
        source, f"not a complete {type(model).__name__}",
        found=f"{len(absent)} of {total} weights missing: {_some(absent)}",
        expected=expected, do="check the architecture in config.json",
    )  # fmt: skip


def _check_complete(source: str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Only the head and the pooler may be new; a body that is partly random is another model."""
    absent = [key for key in missing if not _in_head(model, key) and ".pooler." not in key]
    if absent:
        total = sum(not _in_head(model, key) for key in model.state_dict())
        raise _incomplete(source, model, absent, total, "every weight outside the head")


def _check_sizes(source: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    for name, found, expected in sorted(mismatched):
        raise CheckpointError.build(
            source, f"'{name}' has another shape than the model for this task",
            found=tuple(found), expected=tuple(expected),
            do="give the base model, or the model trained for this task",
        )  # fmt: skip


def _check_depth(source: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """A layer that the file has and the model has not would be left out: a shallower model."""

    def kind(key: str) -> str:
        body = key.removeprefix(f"{model.base_model_prefix}.")
        return ".".join("#" if part.isdecimal() else part for part in body.split("."))

    kinds = {kind(key) for key in model.state_dict()}
    left = sorted(key for key in unexpected if "#" in kind(key) and kind(key) in kinds)
    if left:
        raise CheckpointError.build(
            source, "holds layers that config.json leaves out",
            found=f"{len(left)} more weights: {_some(left)}",
            expected=f"those of a {type(model).__name__} as configured",
            do="correct the number of layers in config.json",
        )  # fmt: skip


def _check_labels(source: str, task: Task, stored: HeadInfo) -> None:
    """A checkpoint that brings its head must mean the same classes in the same order."""
    if not task.regression and not stored.fits(task.labels):
        raise CheckpointError.build(
            source, f"its head was trained for other classes than {task.name}'s",
            found=", ".join(stored.labels), expected=", ".join(task.labels),
            do="give the base model, or the model trained for this task",
        )  # fmt: skip


def _some(names: Iterable[str], limit: int = 3) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
