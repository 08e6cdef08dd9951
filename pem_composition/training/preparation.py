"""What training starts from: the base model with a fresh module, or that of ``--init_from``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pem_composition import checkpoint
from pem_composition.adapters.fresh import fresh_module
from pem_composition.adapters.heads import head_info, head_parameter_names
from pem_composition.adapters.inject import Attachment, attach
from pem_composition.adapters.targets import Targets, resolve_targets
from pem_composition.checkpoint import peft
from pem_composition.checkpoint import provenance as records
from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.config import BaseIdentity, Factor, FullConfig, IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules
from pem_composition.evaluation.joint_task import JointTask
from pem_composition.evaluation.model_names import resolve
from pem_composition.evaluation.models import (
    LoadedBase,
    copy_model,
    load_base,
    load_causal,
    load_text_to_text,
    names_in_file,
    save_model,
)
from pem_composition.evaluation.sharding import is_sharded, lend, redraw, replicate, whole
from pem_composition.module import PEM
from pem_composition.record import Provenance, Source, initialisation_fingerprint
from pem_composition.tasks.glue import Task
from pem_composition.training import shards
from pem_composition.training.training_flags import DECODERS, AdapterFlags

OBJECTIVE_OF_TASK = {peft.SEQ2SEQ_TASK: "seq2seq", peft.CAUSAL_TASK: "causal_lm"}


@dataclass(frozen=True)
class ModuleWeights:
    """The module attached to a frozen base; checkpoints are PEFT directories."""

    attachment: Attachment
    initial: PEM  # whose config, base and head labels the trained module has

    in_parts = False  # every process holds it whole

    def write(self, path: Path) -> None:
        """Save the module as a new directory."""
        checkpoint.save(self.attachment.extract(), path)

    def read(self, path: Path) -> None:
        """Put a saved module's numbers into the model."""
        self.attachment.swap(checkpoint.load(path))

    def lend(self) -> None:
        """Nothing: the first process publishes what it holds."""

    def publish(self, folder: Path, name: str, provenance: Provenance) -> None:
        """Write the module with its provenance into an existing directory."""
        tensors = self.attachment.extract().tensors
        module = replace(self.initial, tensors=tensors, name=name, provenance=provenance)
        peft.write(module, folder, dtype=None)
        records.write(module, folder)


@dataclass(frozen=True)
class WholeModel:
    """Every parameter of the model; checkpoints are Hugging Face model directories.

    Those of a model that is shared out are its parts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: BaseIdentity

    @property
    def in_parts(self) -> bool:
        """True where each process holds, reads and writes its own."""
        return is_sharded(self.model)

    def write(self, path: Path) -> None:
        """Save the model."""
        if self.in_parts:
            shards.write_model(self.model, path)
        else:
            self._write_folder(path)

    def read(self, path: Path) -> None:
        """Put a saved model's numbers into this one."""
        if shards.hold(path):
            shards.read_model(self.model, path)
        else:
            copy_model(path, self.model)

    def lend(self) -> None:
        """What the other processes do while the first one publishes."""
        if self.in_parts:
            lend(self.model)

    def publish(self, folder: Path, name: str, provenance: Provenance) -> None:
        """Write the model with its provenance into an existing directory."""
        self._write_folder(folder)
        names = head_parameter_names(self.model)
        record = PEM({}, FullConfig(), self.base, name, head_info(self.model, names), provenance)
        records.write(record, folder)

    def _write_folder(self, path: Path) -> None:
        save_model(self.model, path)
        self.tokenizer.save_pretrained(path)


@dataclass(frozen=True)
class Start:
    """A model ready to train, and what it starts from.

    Attributes:
        init: fingerprint of the initial module and head.
        parents: the trained module that ``--init_from`` names; none where it is an initial one.
        notes: what that module's provenance says, such as what it is for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: ModuleWeights | WholeModel
    init: str
    parents: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(flags: AdapterFlags, task: Task | None, frozen: Factor | None = None) -> Start:
    """Load the base, attach the initial module, freeze the rest, and the module's frozen factor.

    The head and A are drawn from ``seed`` alone, so equal flags give an equal start. A model that
    writes has no head: its module is the same whatever the task.

    Raises:
        IncompatibleModules: ``--init_from`` holds another kind, rank, scale, targets or head.
        PEMError: the base model cannot be loaded, or has no layer of the given names.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(flags.seed)
    base = checkpoint.base_identity(resolve(flags.model_name_or_path))
    model, tokenizer, missing = load(flags, task, base)
    if flags.adapter_config == "fft":
        if is_sharded(model):
            names_in_file(model)  # or they could not be written in the end
            redraw(model, missing["missing_keys"], flags.seed)
        return _whole(model, tokenizer, base)
    head = head_parameter_names(model, missing)
    replicate(model, head, missing["missing_keys"], flags.seed)
    module, targets = initial_module(flags, model, base, head)
    if isinstance(task, JointTask):
        module = replace(module, head=task.head)
    attachment = attach(model, module, trainable=True, blocks=targets.blocks, frozen=frozen)
    init = initialisation_fingerprint(module.tensors)
    given = module.provenance
    trained = flags.init_from is not None and given.init != init
    return Start(
        model,
        tokenizer,
        ModuleWeights(attachment, module),
        init,
        given.sources if trained else (),
        given.notes,
    )


def load(flags: AdapterFlags, task: Task | None, base: BaseIdentity) -> LoadedBase:
    """The model of the objective, with the dropout of the flags."""
    where = source(flags, base)
    settings: dict[str, Any] = {"load_options": flags.base_held, **dropout_settings(flags)}
    if flags.objective == "seq2seq":
        return load_text_to_text(where, **settings)
    if flags.objective in DECODERS:
        return load_causal(where, **settings)
    return load_base(where, task, **settings)


def source(flags: AdapterFlags, base: BaseIdentity) -> str:
    """Where the model's weights come from: the base, or for ``fft`` the model of ``--init_from``.

    Raises:
        IncompatibleModules: ``fft`` starts from something that is no whole model, or another one.
    """
    if flags.adapter_config != "fft" or flags.init_from is None:
        return flags.model_name_or_path
    if not (Path(flags.init_from) / MODEL_CONFIG).is_file():
        raise IncompatibleModules.build(
            f"--init_from {flags.init_from}",
            "does not fit --adapter_config fft",
            found="no config.json",
            expected="a whole model",
            do="make one with pem init --adapter_config fft",
        )
    given = checkpoint.base_identity(flags.init_from)
    if (given.model_type, given.hidden_size) != (base.model_type, base.hidden_size):
        raise IncompatibleModules.build(
            f"--init_from {flags.init_from}",
            "does not fit --model_name_or_path",
            found=f"{given.model_type} of width {given.hidden_size}",
            expected=f"{base.model_type} of width {base.hidden_size}",
            do="start from a model of the same architecture",
        )
    return flags.init_from


def dropout_settings(flags: AdapterFlags) -> dict[str, float]:
    """Dropout probabilities of the base model that the flags set."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {n: getattr(flags, n) for n in names if getattr(flags, n) is not None}


def initial_module(
    flags: AdapterFlags, model: PreTrainedModel, base: BaseIdentity, head: tuple[str, ...]
) -> tuple[PEM, Targets]:
    """The module that training starts from, fresh or from ``--init_from``, and its layers.

    LoRA in a language model adapts query and value of a fused layer (GPT-2's c_attn) each on its
    own, as the reference does; ``--target_modules c_attn`` adapts the layer as a whole.
    """
    kind = flags.adapter_config
    decodes = flags.objective != "classification" and not model.config.is_encoder_decoder
    apart = kind == "lora" and decodes
    placement = "reference" if apart else flags.ia3_placement
    targets = resolve_targets(model, kind, flags.target_modules, placement)
    fresh = fresh_module(
        model,
        adapter_config(flags, targets, task_type_of(flags, model)),
        seed=flags.seed,
        blocks=targets.blocks,
        head_names=head,
        base=base,
    )
    if flags.init_from is None:
        init = initialisation_fingerprint(fresh.tensors)
        return replace(fresh, provenance=Provenance(init=init)), targets
    given = checkpoint.load(flags.init_from)
    check_same_kind(flags.init_from, given, fresh)
    return replace(fresh, tensors=given.tensors, provenance=given.provenance), targets


def task_type_of(flags: AdapterFlags, model: PreTrainedModel) -> str | None:
    """PEFT's word for what a module without a head was made for; None of one with a head."""
    if flags.objective == "classification":
        return None
    return peft.SEQ2SEQ_TASK if model.config.is_encoder_decoder else peft.CAUSAL_TASK


def adapter_config(
    flags: AdapterFlags, targets: Targets, task_type: str | None
) -> LoraConfig | IA3Config:
    """The flags as a module config; one without a head says what it was made for."""
    extra = {"task_type": task_type} if task_type else {}
    if flags.adapter_config == "ia3":
        return IA3Config(targets.target_modules, targets.feedforward_modules, extra=extra)
    return LoraConfig(
        r=flags.lora_r,
        alpha=flags.lora_alpha,
        target_modules=targets.target_modules,
        use_rslora=flags.use_rslora,
        dropout=flags.lora_dropout,
        extra=extra,
    )


def _classes(given: PEM, wanted: PEM) -> list[tuple[str, object, object]]:
    """The heads' classes where they differ."""
    if given.head is None or wanted.head is None or given.head.fits(wanted.head.labels):
        return []
    return [("the task's classes", given.head.labels, wanted.head.labels)]


def check_same_kind(where: str, given: PEM, wanted: PEM) -> None:
    """Refuse an initial module that the flags do not describe, with both values.

    Raises:
        IncompatibleModules: kind, rank, scale, layers, base or head differ.
    """
    objective = _objective(wanted, "classification")
    facts = [
        ("--adapter_config", given.kind, wanted.kind),
        ("--model_name_or_path", *_fingerprints(given.base, wanted.base)),
        ("--objective", _objective(given, objective), objective),
    ]
    if isinstance(given.config, LoraConfig) and isinstance(wanted.config, LoraConfig):
        facts += [
            ("--lora_r", given.config.r, wanted.config.r),
            ("--lora_alpha", float(given.config.alpha), float(wanted.config.alpha)),
            ("--use_rslora", given.config.use_rslora, wanted.config.use_rslora),
        ]
    facts += [
        ("--target_modules", ", ".join(given.layers), ", ".join(wanted.layers)),
        ("head", _shapes(given.head_tensors()), _shapes(wanted.head_tensors())),
        *_classes(given, wanted),
        ("tensors", _shapes(given.tensors), _shapes(wanted.tensors)),
    ]
    for name, found, expected in facts:
        if found != expected:
            raise IncompatibleModules.build(
                f"--init_from {where}",
                f"does not fit {name}",
                found=found,
                expected=expected,
                do="train with the flags the initial module was made with",
            )


def _objective(module: PEM, otherwise: str) -> str:
    """What a module was made for: only a classifier brings a head, others say it."""
    if module.head_names:
        return "classification"
    return OBJECTIVE_OF_TASK.get(str(module.config.extra.get("task_type")), otherwise)


def _fingerprints(a: BaseIdentity, b: BaseIdentity) -> tuple[str | None, str | None]:
    """Both fingerprints where both are known; an unknown one cannot contradict."""
    return (a.fingerprint, b.fingerprint) if a.fingerprint and b.fingerprint else (None, None)


def _shapes(tensors: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(tensors.items())) or "none"


def _whole(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseIdentity,
) -> Start:
    """Full fine-tuning; the initial module is the head alone (every delta is zero)."""
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    init = initialisation_fingerprint(
        {f"{n}.head": whole(parameters[n].detach()) for n in head_parameter_names(model)}
    )
    return Start(model, tokenizer, WholeModel(model, tokenizer, base), init)
