"""The training flags as frozen dataclasses, named as in the Hugging Face examples. No torch.

``result_fields`` are the fields that change the numbers of a run. They make up its key, together
with the content of the data, the base model and the initial module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pem_composition.config import ADAPTER_CONFIGS, ADAPTER_KINDS, Factor
from pem_composition.errors import UsageError, install, installed
from pem_composition.evaluation.load_options import LoadOptions, Shards
from pem_composition.flag_declarations import (
    GIVEN,
    check_choice,
    check_ranges,
    flag,
    refuse_idle,
    refused,
    required,
    seed_flag,
)
from pem_composition.launch import world_size
from pem_composition.record import TO_SUBTRACT
from pem_composition.tasks.data import RowFiles
from pem_composition.tasks.document_rows import SCORE_COLUMN, THRESHOLD, ScoreFilter, is_scored
from pem_composition.tasks.glue import Reading

if TYPE_CHECKING:
    from pem_composition.evaluation.load_options import LoadOptions

DEFAULT_EPOCHS = 3.0
# Those of the Trainer's names that need no package of their own.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
SCHEDULERS = ("polynomial", "linear", "cosine", "constant", "constant_with_warmup")
OBJECTIVES = ("classification", "seq2seq", "causal_lm", "instruction")
ANSWERING = OBJECTIVES[:2]  # a row has a class or a score
DECODERS = ("causal_lm", "instruction")  # objectives of a decoder
TARGETS = ("label", "next_block")
DEFAULT_BLOCK = 128  # tokens
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}  # of other names than the tracker's

NO_TRACKER = "none"


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """What a table's columns and labels mean; shared by every program that reads labelled rows."""

    text_column_names: tuple[str, ...] | None = flag(
        None,
        "column of the text, or the two of a pair; default: usual names (sentence1 sentence2, ...)",
        metavar="COLUMN",
        aliases=("text_column_name",),
        key=False,
    )
    label_column_name: str | None = flag(
        None, "column of the label; default: a usual name (label, ...)", metavar="COLUMN", key=False
    )
    labels: tuple[str, ...] | None = flag(
        None,
        "class names in the order of the outputs, for files of no known task; default: those of "
        "the module or model, else of the rows",
        metavar="NAME",
        key=False,
    )
    do_regression: bool | None = flag(
        None,
        "labels are scores, or are classes (false); default: scores where one of them is a number "
        "that is not whole",
        key=False,
    )

    def reading(self, own: tuple[str, ...] | None = None) -> Reading:
        """The same for the reader of tables.

        Args:
            own: classes that a module or model brings; none for a regression.
        """
        names = self.text_column_names or ()
        if len(names) == 1:  # the Hugging Face examples separate them by commas
            names = tuple(name for name in names[0].split(",") if name)
        return Reading(names, self.label_column_name, self.labels or (), self.do_regression, own)


@dataclass(frozen=True, kw_only=True)
class FileFlags(RowFlags):
    """Where the rows of one task lie; shared by the programs that take one model and one task."""

    task_name: str | None = flag(None, "GLUE task, e.g. rte; gives columns, label words and metric")
    validation_file: str | None = flag(
        None,
        "validation rows: .jsonl .json .csv .tsv .parquet, also packed (.gz .bz2 .xz .zip)",
        key=False,
    )
    test_file: str | None = flag(None, "test rows, in the same formats", key=False)
    data_dir: str | None = flag(
        None, "folder with train/dev files, or with one such folder per task", key=False
    )

    def row_files(self, splits: Collection[str], **limits: int | None) -> RowFiles:
        """The same for the readers of rows; limits as those of ``RowFiles``."""
        return RowFiles(
            train_file=getattr(self, "train_file", None), validation_file=self.validation_file,
            test_file=self.test_file, data_dir=self.data_dir, splits=splits, **limits,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackerFlags:
    """Where losses and scores are logged, beside the files of a run."""

    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = flag(
        NO_TRACKER, "tracker to log to; sweeps and searches: a run per point", key=False
    )

    def check_tracker(self) -> None:
        """Before the work: the tracker can be imported.

        Raises:
            UsageError: its package is not installed.
        """
        tracker = self.report_to
        if tracker != NO_TRACKER and not any(map(installed, TRACKERS.get(tracker, (tracker,)))):
            raise UsageError.build(
                f"--report_to {tracker}", f"the package {tracker} is not installed",
                do=f"{install(tracker)}, or leave --report_to out",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """How the weights of a large decoder are held; shared with the programs that write text."""

    load_in_8bit: bool = flag(
        False,
        "decoders: hold the base in 8 bits (package bitsandbytes, extra [quantized])",
        key=GIVEN,
    )
    load_in_4bit: bool = flag(False, "decoders: hold the base in 4 bits (NF4), likewise", key=GIVEN)
    model_dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "decoders: dtype of the base's weights; default: float32", key=GIVEN
    )
    device_map: str | None = flag(
        None, "decoders: spread the base over devices: auto, or a device such as cuda:1", key=False
    )

    def check_load(self) -> None:
        """One way to quantise.

        Raises:
            UsageError: two were given.
        """
        if self.load_in_8bit and self.load_in_4bit:
            raise UsageError.build("--load_in_4bit", "contradicts --load_in_8bit", do="give one")

    @property
    def load_options(self) -> LoadOptions:
        """The same for the loader."""
        bits = 8 if self.load_in_8bit else 4 if self.load_in_4bit else None
        here = "cpu" if bits and getattr(self, "use_cpu", False) else None
        return LoadOptions(bits, self.model_dtype, self.device_map or here)


@dataclass(frozen=True)
class AdapterFlags(LoadFlags, FileFlags):
    """Which model, task and adapter; shared by ``pem init`` and ``pem train``."""

    model_name_or_path: str = required("base model: a local directory or a hub name", key=False)
    output_dir: str = required(
        "directory of the trained module, its results and checkpoints", key=False
    )
    train_file: str | None = flag(
        None,
        "training rows: .jsonl .json .csv .tsv .parquet, also packed (.gz .bz2 .xz .zip)",
        key=False,
    )
    objective: Literal["classification", "seq2seq", "causal_lm", "instruction"] = flag(
        "classification",
        "what is trained: a head on the model, text to text, a decoder's next word (causal_lm), or "
        "its answers to instructions",
        of=("label", "next_block", *DECODERS),
    )
    joint_tasks: tuple[str, ...] | None = flag(
        None,
        "instead of --task_name: one module on the rows of these tasks together, and one head with "
        "a part for each; rows by --data_dir with a folder per task, or by name",
        metavar="TASK",
        key=GIVEN,
        of=("classification",),
    )
    adapter_config: str = flag(
        "lora", "kind of module; fft trains every parameter", choices=tuple(ADAPTER_CONFIGS)
    )
    lora_r: int = flag(8, "rank of the LoRA factors", of=("lora",), least=1)
    lora_alpha: float = flag(
        8.0, "LoRA scale: the update is multiplied by alpha / r", of=("lora",), above=0
    )
    lora_dropout: float = flag(
        0.0, "dropout on the input of A, a probability", of=("lora",), least=0, below=1
    )
    use_rslora: bool = flag(False, "multiply the update by alpha / sqrt(r) instead", of=("lora",))
    target_modules: tuple[str, ...] | None = flag(
        None, "layers to adapt; default: the model type's table", of=ADAPTER_KINDS
    )
    ia3_placement: Literal["peft", "reference"] = flag(
        "peft",
        "(IA)^3 in the feed-forward: second layer's input (peft), first's output (reference)",
        of=("ia3",),
    )
    init_from: str | None = flag(
        None, "start from this module's numbers and head (see pem init)", key=False
    )
    seed: int = seed_flag(
        "seed of initialisation, dropout and, without --data_seed, of the data order"
    )
    hidden_dropout_prob: float | None = flag(
        None, "dropout of the model's hidden states; default: the model's", least=0, below=1
    )
    attention_probs_dropout_prob: float | None = flag(
        None, "dropout of the model's attention weights; default: the model's", least=0, below=1
    )
    overwrite_output_dir: bool = flag(
        False,
        "start anew where the output directory holds an unfinished run with other settings or "
        "a module of another origin (a finished run is replaced when its settings change)",
        key=False,
    )

    @property
    def kinds(self) -> set[str]:
        """What the run is, of text to text by its target; ``of`` of a flag names these."""
        target = getattr(self, "target", None) or "label"
        return {target if self.objective == "seq2seq" else self.objective, self.adapter_config}

    def idle_notes(self) -> list[str]:
        """A line for each flag of other kinds of run that was given another value than its own."""
        return [
            f"note: --{spec.name} does nothing with --objective {self.objective} "
            f"--adapter_config {self.adapter_config}"
            for spec in dataclasses.fields(self)
            if getattr(self, spec.name) != spec.default
            and not self.kinds & set(spec.metadata.get("of", self.kinds))
        ]

    @property
    def base_held(self) -> LoadOptions | Shards:
        """How the weights of the base are held."""
        return self.load_options

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))
        check_choice(self, "adapter_config", tuple(ADAPTER_CONFIGS))
        check_choice(self, "objective", OBJECTIVES)
        self._check_decoder()
        self._check_joint()
        if self.adapter_config == "fft" and self.target_modules:
            raise refused(
                "target_modules",
                " ".join(self.target_modules),
                "no targets with --adapter_config fft",
            )

    def _check_joint(self) -> None:
        """Several tasks that are known by name, each with rows of its own; a module, and a head."""
        if not self.joint_tasks:
            return
        if len(set(self.joint_tasks)) < max(2, len(self.joint_tasks)):
            raise refused("joint_tasks", " ".join(self.joint_tasks), "two tasks or more, each once")
        if self.objective != "classification" or self.adapter_config == "fft":
            raise UsageError.build(
                "--joint_tasks", "trains a module with a head",
                found=f"--objective {self.objective} --adapter_config {self.adapter_config}",
                expected="--objective classification, lora or ia3", do="train each task apart",
            )  # fmt: skip
        one = ("task_name", "train_file", "validation_file", "test_file", "text_column_names")
        for name in (*one, "label_column_name", "labels", "do_regression", "do_predict"):
            if getattr(self, name, None):
                raise UsageError.build(
                    f"--{name}", "is of one task, --joint_tasks names several",
                    do="give rows by --data_dir with a folder per task, or by name",
                )  # fmt: skip

    def _check_decoder(self) -> None:
        """How weights are held is said of decoders; a quantised base is not trained itself."""
        self.check_load()
        for name in (spec.name for spec in dataclasses.fields(LoadFlags)):
            if getattr(self, name) and self.objective not in DECODERS:
                needed = " or ".join(DECODERS)
                raise UsageError.build(
                    f"--{name}", f"needs --objective {needed}", do="leave it out"
                )
        quantised = self.load_in_8bit or self.load_in_4bit
        if quantised and self.adapter_config == "fft":
            raise UsageError.build(
                "--adapter_config fft", "trains the base's weights, and quantised ones cannot be",
                do="use lora or ia3, or leave --load_in_8bit and --load_in_4bit out",
            )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(AdapterFlags, TrackerFlags):
    """Every flag of ``pem train``; sizes are in rows, tokens or steps."""

    do_train: bool = flag(True, "train; --no-do_train only evaluates what --init_from holds")
    do_eval: bool = flag(True, "evaluate on the validation rows at the end, if there are any")
    do_predict: bool = flag(
        False,
        "write the prediction for every test row (predict_results_<task>.txt, and .jsonl with "
        "probabilities), and score them where all have labels",
        key=False,
    )
    freeze: Factor | None = flag(
        None,
        "LoRA: leave this factor as it starts; modules of one initial lora_A that stay at it have "
        "the same average in both spaces (FFA-LoRA)",
        of=("lora",),
        key=GIVEN,
    )
    target: Literal["label", "next_block"] | None = flag(
        None,
        "seq2seq: write the answer of the row's label (label, the default), or a domain's text, "
        "block by block (next_block)",
        of=TARGETS,
    )
    prompt: str | None = flag(
        None,
        "seq2seq: template and answers, by name or JSON file; default: the task's own",
        key=False,
    )
    block_size: int | None = flag(
        None,
        f"next_block: tokens per block of text (default: {DEFAULT_BLOCK})",
        of=("next_block",),
        least=1,
    )
    score_column: str | None = flag(
        None,
        f"causal_lm: train on rows by their score in this column (default: {SCORE_COLUMN})",
        key=False,
    )
    score_above: float | None = flag(
        None,
        f"causal_lm: leave out rows with a score at or below this (default: {THRESHOLD}); "
        "for civil_comments even where neither flag is given",
        key=False,
    )
    truncate: bool = flag(
        True,
        "causal_lm: cut documents at --max_seq_length; --no-truncate takes them whole",
        of=("causal_lm",),
    )
    loss_on_padding: bool = flag(
        False,
        "causal_lm: pad with the end token to --max_seq_length and count it in the loss, as the "
        "reference code does",
        of=("causal_lm",),
    )
    template: str | None = flag(
        None,
        "instruction: how it is written down: sections (the default), chat (the tokenizer's chat "
        "template) or a JSON file; seq2seq on a decoder: how the prompt is asked (default: as it "
        "is)",
        key=False,
    )
    train_on_inputs: bool = flag(
        False,
        "instruction: the loss also counts the prompt, as in Alpaca-LoRA",
        of=("instruction",),
    )
    purpose: str | None = flag(
        None,
        "what the module is for, said in pem.json and its card; default: of rows chosen by score, "
        "that it exists to be subtracted",
        key=False,
    )
    max_seq_length: int = flag(
        128,
        "tokens per example; longer ones are cut",
        of=("classification", "label", *DECODERS),
        least=1,
    )
    pad_to_max_length: bool = flag(
        False,
        "pad every example to --max_seq_length instead of to its batch",
        of=("classification", "label", *DECODERS),
    )
    group_by_length: bool = flag(False, "batches of similar length: less padding, another order")
    max_train_samples: int | None = flag(
        None, "use at most N training rows, stratified by label", key=False, least=1
    )
    max_eval_samples: int | None = flag(
        None, "use at most N validation rows, stratified by label", key=False, least=1
    )
    per_device_train_batch_size: int = flag(32, "rows per step and process", least=1)
    per_device_eval_batch_size: int = flag(
        64, "rows per evaluation batch and process", key=False, least=1
    )
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", least=1)
    learning_rate: float = flag(5e-4, "peak rate, reached after warmup", above=0)
    num_train_epochs: float | None = flag(
        None, f"passes over the training rows (default: {DEFAULT_EPOCHS:g})", above=0
    )
    max_steps: int | None = flag(None, "optimizer steps, instead of --num_train_epochs", least=1)
    warmup_ratio: float = flag(0.06, "share of the steps with a rising rate", least=0, below=1)
    warmup_steps: int | None = flag(
        None, "steps with a rising rate, instead of --warmup_ratio", least=0
    )
    lr_scheduler_type: str = flag(
        "polynomial", "decay of the rate; polynomial is linear to 1e-7", choices=SCHEDULERS
    )
    weight_decay: float = flag(
        0.01, "decay of the weights, not of biases, layer norms and (IA)^3 vectors", least=0
    )
    max_grad_norm: float = flag(
        1.0, "gradients are scaled to at most this norm; 0 for no limit", least=0
    )
    optim: str | None = flag(
        None,
        "optimizer, by the Trainer's name (default: adamw_torch_fused)",
        choices=OPTIMIZERS,
        key=GIVEN,
    )
    label_smoothing_factor: float = flag(
        0.0,
        "share of the target that the loss spreads over all classes; evaluations do not",
        key=GIVEN,
        least=0,
        below=1,
    )
    adam_beta1: float = flag(0.9, "AdamW: decay of the first moment", least=0, below=1)
    adam_beta2: float = flag(0.98, "AdamW: decay of the second moment", least=0, below=1)
    adam_epsilon: float = flag(1e-6, "AdamW: added to the denominator", above=0)
    eval_strategy: Literal["no", "steps", "epoch"] | None = flag(
        None, "when to evaluate while training; default: steps with --eval_steps, else epoch"
    )
    eval_steps: int | None = flag(None, "evaluate every N steps", least=1)
    save_steps: int | None = flag(
        None, "checkpoint every N steps, besides those of the evaluations", key=False, least=1
    )
    save_total_limit: int | None = flag(
        2, "checkpoints kept, besides the best one", key=False, least=1
    )
    logging_steps: int = flag(10, "report the loss every N steps", key=False, least=1)
    load_best_model_at_end: bool = flag(
        True, "keep the evaluated step with the best metric, not the last one"
    )
    metric_for_best_model: str | None = flag(None, "what best means; default: the task's metric")
    early_stopping_patience: int | None = flag(
        None, "stop after N evaluations in a row without a better metric", key=GIVEN, least=1
    )
    early_stopping_threshold: float | None = flag(
        None, "early stopping: how much better counts as better (default: any)", key=GIVEN, least=0
    )
    data_seed: int | None = seed_flag("seed of the data order; default: --seed", None)
    bf16: bool = flag(False, "compute in bfloat16, module in float32")
    fp16: bool = flag(False, "compute in float16, module in float32 (GPU)")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    dataloader_num_workers: int = flag(0, "processes that assemble batches", key=False, least=0)
    disable_tqdm: bool = flag(False, "no progress bars", key=False)
    resume_from_checkpoint: str | None = flag(
        None,
        "a checkpoint directory; true (the default): the newest complete one, if there is one; "
        "false: none",
        key=False,
    )
    ignore_checkpoints: bool = flag(
        False, "start from the beginning although there are checkpoints", key=False
    )
    force_resume: bool = flag(
        False, "resume although flags or data differ from the checkpoint's", key=False
    )
    use_cpu: bool = flag(False, "do not use a GPU", key=False)
    fsdp: bool = flag(
        False,
        "each process of torchrun or accelerate launch holds a part of the base (FSDP2)",
        key=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.task_name or self.train_file or self.joint_tasks):
            raise UsageError.build(
                "--task_name",
                "no training data",
                expected="a task name, --joint_tasks or --train_file",
                do="add one of them",
            )
        check_choice(self, "lr_scheduler_type", SCHEDULERS)
        if self.optim is not None:
            check_choice(self, "optim", OPTIMIZERS)
        check_objective(self)
        learns = self.do_train and self.adapter_config == "lora"
        refuse_idle(self, "freeze", "--do_train and --adapter_config lora", has=learns)
        if self.freeze == "lora_B" and not self.init_from:  # B begins at zero: A has no gradient
            raise refused("freeze", self.freeze, "--init_from with a module that was trained")
        self._check_documents()
        self._check_pairs()
        self._check_shards()
        self.check_tracker()

    def _check_documents(self) -> None:
        """Flags of documents belong to --objective causal_lm, those of answers to instruction."""
        documents = self.objective == "causal_lm"
        needed, has = "--objective instruction", self.objective == "instruction"
        if self.train_on_inputs and not has:
            raise UsageError.build(
                "--train_on_inputs", f"has no effect without {needed}", do="leave the flag out"
            )
        for name in ("score_column", "score_above"):
            refuse_idle(self, name, "--objective causal_lm", has=documents)
        for name, value in (("truncate", True), ("loss_on_padding", False)):
            if getattr(self, name) is not value and not documents:
                raise UsageError.build(
                    f"--{name}" if value is False else f"--no-{name}",
                    "has no effect without --objective causal_lm",
                    do="add it or leave the flag out",
                )

    def _check_shards(self) -> None:
        """A base in its own numbers is shared out; each process takes its own device."""
        held = ("load_in_4bit", "load_in_8bit", "device_map", "use_cpu")
        for name in held if self.fsdp else ():
            if getattr(self, name):
                raise UsageError.build("--fsdp", f"contradicts --{name}", do="leave one out")
        if self.fsdp and self.adapter_config == "fft" and self.optim == "adafactor":
            raise UsageError.build(
                "--fsdp", "shares the weights out, which adafactor does not compute with",
                found="--adapter_config fft --optim adafactor",
                expected=", ".join(name for name in OPTIMIZERS if name != "adafactor"),
                do="choose another optimizer, or train a module (lora or ia3)",
            )  # fmt: skip

    @property
    def base_held(self) -> LoadOptions | Shards:
        """By this process alone, or a part by each of the launch."""
        return Shards(world_size(), self.model_dtype) if self.fsdp else self.load_options

    def _check_pairs(self) -> None:
        exclusive = [
            ("max_steps", "num_train_epochs"),
            ("bf16", "fp16"),
            ("resume_from_checkpoint", "ignore_checkpoints"),
        ]
        for a, b in exclusive:
            if getattr(self, a) and getattr(self, b):
                raise UsageError.build(
                    f"--{a}",
                    f"contradicts --{b}",
                    found=f"{getattr(self, a)} and {getattr(self, b)}",
                    expected="one of the two",
                    do=f"remove --{a} or --{b}",
                )
        if self.eval_strategy in ("no", "epoch") and self.eval_steps is not None:
            raise refused(
                "eval_steps",
                self.eval_steps,
                f"no step count with --eval_strategy {self.eval_strategy}",
            )
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise refused("eval_strategy", "steps", "--eval_steps N beside it")
        stops = self.early_stopping_patience is not None
        refuse_idle(self, "early_stopping_threshold", "--early_stopping_patience", has=stops)
        evaluated = self.load_best_model_at_end and self.eval_strategy != "no"
        refuse_idle(
            self, "early_stopping_patience", "--load_best_model_at_end and evaluations",
            has=evaluated,
        )  # fmt: skip
        if not self.do_train and not self.init_from and self.adapter_config != "fft":
            raise refused("do_train", "false", "--init_from with the module to evaluate")

    @property
    def score_filter(self) -> ScoreFilter | None:
        """Column and threshold by which documents are chosen; None takes all of them."""
        given = self.score_column is not None or self.score_above is not None
        if self.objective != "causal_lm" or not (given or is_scored(self.task_name)):
            return None
        return ScoreFilter.of(self.score_column, self.score_above)

    @property
    def stated_purpose(self) -> str | None:
        """What the module's provenance and card say that it is for."""
        if self.purpose is not None or self.score_filter is None:
            return self.purpose
        return (
            f"trained on texts with {self.score_filter}: it {TO_SUBTRACT} from a model, "
            "not to be used as it is"
        )

    @property
    def next_block(self) -> bool:
        """True where a language model of a domain is trained."""
        return self.objective == "seq2seq" and self.target == "next_block"

    @property
    def answers_labels(self) -> bool:
        """True where a row's answer is a class or a score."""
        return self.objective in ANSWERING and not self.next_block

    @property
    def block_tokens(self) -> int:
        """Tokens per block, with the default filled in."""
        return self.block_size or DEFAULT_BLOCK

    @property
    def evaluation_strategy(self) -> str:
        """no, steps or epoch, with the default filled in."""
        return self.eval_strategy or ("steps" if self.eval_steps else "epoch")

    @property
    def order_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    def result_fields(self) -> dict[str, Any]:
        """The flags that decide the trained numbers, without those of other kinds of run."""
        target, run = self.target or "label", self.kinds
        values = dataclasses.asdict(self) | {"target": target, "block_size": self.block_tokens}
        kept = {}
        for spec in dataclasses.fields(self):
            meta, value = spec.metadata, values[spec.name]
            given = meta.get("key", True) is True or (meta["key"] == GIVEN and value)
            if given and run & set(meta.get("of", run)):
                kept[spec.name] = value
        kept |= {"data_seed": self.order_seed, "eval_strategy": self.evaluation_strategy}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def check_objective(config: Any) -> None:
    """Refuse flags of another objective than the one that is trained or evaluated.

    Args:
        config: holds objective, target, prompt, template, block_size, next_block and RowFlags.

    Raises:
        UsageError: naming the flag that would make it count.
    """
    if config.target is not None:
        check_choice(config, "target", TARGETS)
    refuse_idle(config, "target", "--objective seq2seq", has=config.objective == "seq2seq")
    refuse_idle(config, "prompt", "--objective seq2seq", has=config.objective == "seq2seq")
    instructs = config.objective == "instruction"
    asked = config.objective == "seq2seq" and not config.next_block
    needed = "--objective instruction, or seq2seq on a decoder"
    refuse_idle(config, "template", needed, has=instructs or asked)
    needed = "--objective seq2seq --target next_block"
    refuse_idle(config, "block_size", needed, has=config.next_block)
    refuse_idle(config, "prompt", "--target label", has=not config.next_block)
    labelled = config.objective not in DECODERS and not config.next_block
    for name in ("labels", "label_column_name", "do_regression"):
        refuse_idle(config, name, "labelled rows, which this objective does not read", has=labelled)
    if instructs:
        refuse_idle(config, "text_column_names", "--objective causal_lm", has=False)


def fields_of(kind: str) -> tuple[str, ...]:
    """The flags that decide the numbers of one kind of module only."""
    specs = dataclasses.fields(AdapterFlags)
    return tuple(spec.name for spec in specs if kind in spec.metadata.get("of", ()))
