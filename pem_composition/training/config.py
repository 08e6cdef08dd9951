"""The training flags as frozen dataclasses, named as in the Hugging Face examples. No torch.

``result_fields`` are the fields that change the numbers of a run. They make up its key, together
with the content of the data, the base model and the initial module.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pem_composition.errors import UsageError
from pem_composition.tasks.glue import Reading
from pem_composition.tasks.toxicity import SCORE_COLUMN, THRESHOLD, ScoreFilter, is_scored

if TYPE_CHECKING:
    from pem_composition.evaluation.holding import Holding

T = TypeVar("T")

DEFAULT_EPOCHS = 3.0
# Those of the Trainer's names that need no package of their own.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
SCHEDULERS = ("polynomial", "linear", "cosine", "constant", "constant_with_warmup")
METHODS = ("lora", "ia3", "fft")
OBJECTIVES = ("classification", "seq2seq")  # whose modules pem evaluate and pem sweep score
TRAINED = (*OBJECTIVES, "causal_lm", "instruction")
DECODERS = ("causal_lm", "instruction")  # objectives of a decoder
TARGETS = ("label", "next_block")
DEFAULT_BLOCK = 128  # tokens

# Fields that name places or change speed, reporting and bookkeeping, but not the trained numbers;
# data and base model enter the key by their content instead.
NEUTRAL_FIELDS = frozenset(
    {
        "model_name_or_path",
        "train_file",
        "validation_file",
        "test_file",
        "data_dir",
        "init_from",
        "output_dir",
        "overwrite_output_dir",
        "do_predict",
        "per_device_eval_batch_size",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "dataloader_num_workers",
        "report_to",
        "disable_tqdm",
        "use_cpu",
        "resume_from_checkpoint",
        "ignore_checkpoints",
        "force_resume",
        "max_train_samples",
        "max_eval_samples",
        "score_column",
        "score_above",
        "purpose",
        "device_map",
        # Rows enter the key as they are read, classes of no known task by their names.
        "text_column_names",
        "label_column_name",
        "labels",
        "do_regression",
    }
)
ADAPTER_FIELDS = {
    "lora": ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    "ia3": ("target_modules", "ia3_placement"),
    "fft": (),
}
# Fields without effect on the numbers of a run, by what it trains; a prompt enters the key by its
# content.
DOCUMENT_FIELDS = ("truncate", "loss_on_padding")
INSTRUCTION_FIELDS = ("template", "train_on_inputs")
OTHER_FIELDS = (*DOCUMENT_FIELDS, *INSTRUCTION_FIELDS)
UNUSED_FIELDS = {
    "classification": ("objective", "target", "prompt", "block_size", *OTHER_FIELDS),
    "label": ("prompt", "block_size", *OTHER_FIELDS),
    "next_block": ("prompt", "max_seq_length", "pad_to_max_length", *OTHER_FIELDS),
    "causal_lm": ("target", "prompt", "block_size", *INSTRUCTION_FIELDS),
    "instruction": ("target", "prompt", "block_size", "template", *DOCUMENT_FIELDS),
}
# Fields of later releases: of no effect, and in no key, at their defaults.
LOAD_FIELDS = ("load_in_8bit", "load_in_4bit", "model_dtype")
LATER_FIELDS = (
    *LOAD_FIELDS,
    "optim",
    "label_smoothing_factor",
    "early_stopping_patience",
    "early_stopping_threshold",
)


def flag(default: T, text: str, **meta: Any) -> T:
    """A dataclass field with its help text; the flag's name is the field's."""
    return field(default=default, metadata={"help": text, **meta})  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """What a table's columns and labels mean; shared by every program that reads labelled rows."""

    text_column_names: tuple[str, ...] | None = flag(
        None,
        "column of the text, or the two of a pair; default: usual names (sentence1 sentence2, ...)",
        metavar="COLUMN",
        aliases=("text_column_name",),
    )
    label_column_name: str | None = flag(
        None, "column of the label; default: a usual name (label, ...)", metavar="COLUMN"
    )
    labels: tuple[str, ...] | None = flag(
        None,
        "class names in the order of the outputs, for files of no known task; default: those of "
        "the module or model, else of the rows",
        metavar="NAME",
    )
    do_regression: bool | None = flag(
        None,
        "labels are scores, or are classes (false); default: scores where one of them is a number "
        "that is not whole",
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
class LoadFlags:
    """How the weights of a large decoder are held; shared with the programs that write text."""

    load_in_8bit: bool = flag(
        False, "decoders: hold the base in 8 bits (package bitsandbytes, extra [quantized])"
    )
    load_in_4bit: bool = flag(False, "decoders: hold the base in 4 bits (NF4), likewise")
    model_dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "decoders: dtype of the base's weights; default: float32"
    )
    device_map: str | None = flag(
        None, "decoders: spread the base over devices: auto, or a device such as cuda:1"
    )

    def check_load(self) -> None:
        """One way to quantise.

        Raises:
            UsageError: two were given.
        """
        if self.load_in_8bit and self.load_in_4bit:
            raise UsageError.build("--load_in_4bit", "contradicts --load_in_8bit", do="give one")

    @property
    def holding(self) -> Holding:
        """The same for the loader."""
        from pem_composition.evaluation.holding import Holding

        bits = 8 if self.load_in_8bit else 4 if self.load_in_4bit else None
        here = "cpu" if bits and getattr(self, "use_cpu", False) else None
        return Holding(bits, self.model_dtype, self.device_map or here)


@dataclass(frozen=True)
class ModelFlags(LoadFlags, RowFlags):
    """Which model, task and adapter; shared by ``pem init`` and ``pem train``."""

    model_name_or_path: str = field(
        metadata={"help": "base model: a local directory or a hub name"}
    )
    output_dir: str = field(
        metadata={"help": "directory of the trained module, its results and checkpoints"}
    )
    task_name: str | None = flag(None, "GLUE task, e.g. rte; gives columns, label words and metric")
    train_file: str | None = flag(
        None, "training rows: .jsonl .json .csv .tsv .parquet, also packed (.gz .bz2 .xz .zip)"
    )
    validation_file: str | None = flag(None, "validation rows, in the same formats")
    test_file: str | None = flag(None, "test rows, scored with --do_predict")
    data_dir: str | None = flag(
        None, "folder with train/dev files, or with one such folder per task"
    )
    objective: Literal["classification", "seq2seq", "causal_lm", "instruction"] = flag(
        "classification",
        "what is trained: a head on the model, text to text, a decoder's next word (causal_lm), or "
        "its answers to instructions",
    )
    adapter_config: Literal["lora", "ia3", "fft"] = flag(
        "lora", "kind of module; fft trains every parameter"
    )
    lora_r: int = flag(8, "rank of the LoRA factors")
    lora_alpha: float = flag(8.0, "LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = flag(0.0, "dropout on the input of A, a probability")
    use_rslora: bool = flag(False, "multiply the update by alpha / sqrt(r) instead")
    target_modules: tuple[str, ...] | None = flag(
        None, "layers to adapt; default: the model type's table"
    )
    ia3_placement: Literal["peft", "reference"] = flag(
        "peft",
        "(IA)^3 in the feed-forward: second layer's input (peft), first's output (reference)",
    )
    init_from: str | None = flag(None, "start from this module's numbers and head (see pem init)")
    seed: int = flag(
        42, "seed of initialisation, dropout and, without --data_seed, of the data order"
    )
    hidden_dropout_prob: float | None = flag(
        None, "dropout of the model's hidden states; default: the model's"
    )
    attention_probs_dropout_prob: float | None = flag(
        None, "dropout of the model's attention weights; default: the model's"
    )
    overwrite_output_dir: bool = flag(
        False,
        "start anew where the output directory holds an unfinished run with other settings or "
        "a module of another origin (a finished run is replaced when its settings change)",
    )

    def __post_init__(self) -> None:
        _at_least(self, 1, "lora_r")
        _positive(self, "lora_alpha")
        _probability(self, "lora_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
        _at_least(self, 0, "seed")
        _one_of(self, "adapter_config", METHODS)
        _one_of(self, "objective", TRAINED)
        self._check_decoder()
        if self.adapter_config == "fft" and self.target_modules:
            raise _refuse(
                "target_modules",
                " ".join(self.target_modules),
                "no targets with --adapter_config fft",
            )

    def _check_decoder(self) -> None:
        """How weights are held is said of decoders; a quantised base is not trained itself."""
        self.check_load()
        for name in (*LOAD_FIELDS, "device_map"):
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
class TrainConfig(ModelFlags):
    """Every flag of ``pem train``; sizes are in rows, tokens or steps."""

    do_train: bool = flag(True, "train; --no-do_train only evaluates what --init_from holds")
    do_eval: bool = flag(True, "evaluate on the validation rows at the end, if there are any")
    do_predict: bool = flag(
        False,
        "write the prediction for every test row (predict_results_<task>.txt, and .jsonl with "
        "probabilities), and score them where all have labels",
    )
    target: Literal["label", "next_block"] | None = flag(
        None,
        "seq2seq: write the answer of the row's label (label, the default), or a domain's text, "
        "block by block (next_block)",
    )
    prompt: str | None = flag(
        None, "seq2seq: template and answers, by name or JSON file; default: the task's own"
    )
    block_size: int | None = flag(
        None, f"next_block: tokens per block of text (default: {DEFAULT_BLOCK})"
    )
    score_column: str | None = flag(
        None, f"causal_lm: train on rows by their score in this column (default: {SCORE_COLUMN})"
    )
    score_above: float | None = flag(
        None,
        f"causal_lm: leave out rows with a score at or below this (default: {THRESHOLD}); "
        "for civil_comments even where neither flag is given",
    )
    truncate: bool = flag(
        True, "causal_lm: cut documents at --max_seq_length; --no-truncate takes them whole"
    )
    loss_on_padding: bool = flag(
        False,
        "causal_lm: pad with the end token to --max_seq_length and count it in the loss, as the "
        "reference code does",
    )
    template: str | None = flag(
        None,
        "instruction: how it is written down: sections (the default), chat (the tokenizer's chat "
        "template) or a JSON file",
    )
    train_on_inputs: bool = flag(
        False, "instruction: the loss also counts the prompt, as in Alpaca-LoRA"
    )
    purpose: str | None = flag(
        None,
        "what the module is for, said in pem.json and its card; default: of rows chosen by score, "
        "that it exists to be subtracted",
    )
    max_seq_length: int = flag(128, "tokens per example; longer ones are cut")
    pad_to_max_length: bool = flag(
        False, "pad every example to --max_seq_length instead of to its batch"
    )
    group_by_length: bool = flag(False, "batches of similar length: less padding, another order")
    max_train_samples: int | None = flag(None, "use at most N training rows, stratified by label")
    max_eval_samples: int | None = flag(None, "use at most N validation rows, stratified by label")
    per_device_train_batch_size: int = flag(32, "rows per step and process")
    per_device_eval_batch_size: int = flag(64, "rows per evaluation batch and process")
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step")
    learning_rate: float = flag(5e-4, "peak rate, reached after warmup")
    num_train_epochs: float | None = flag(
        None, f"passes over the training rows (default: {DEFAULT_EPOCHS:g})"
    )
    max_steps: int | None = flag(None, "optimizer steps, instead of --num_train_epochs")
    warmup_ratio: float = flag(0.06, "share of the steps with a rising rate")
    warmup_steps: int | None = flag(None, "steps with a rising rate, instead of --warmup_ratio")
    lr_scheduler_type: str = flag(
        "polynomial", "decay of the rate; polynomial is linear to 1e-7", choices=SCHEDULERS
    )
    weight_decay: float = flag(
        0.01, "decay of the weights, not of biases, layer norms and (IA)^3 vectors"
    )
    max_grad_norm: float = flag(1.0, "gradients are scaled to at most this norm; 0 for no limit")
    optim: str | None = flag(
        None, "optimizer, by the Trainer's name (default: adamw_torch_fused)", choices=OPTIMIZERS
    )
    label_smoothing_factor: float = flag(
        0.0, "share of the target that the loss spreads over all classes; evaluations do not"
    )
    adam_beta1: float = flag(0.9, "AdamW: decay of the first moment")
    adam_beta2: float = flag(0.98, "AdamW: decay of the second moment")
    adam_epsilon: float = flag(1e-6, "AdamW: added to the denominator")
    eval_strategy: Literal["no", "steps", "epoch"] | None = flag(
        None, "when to evaluate while training; default: steps with --eval_steps, else epoch"
    )
    eval_steps: int | None = flag(None, "evaluate every N steps")
    save_steps: int | None = flag(
        None, "checkpoint every N steps, besides those of the evaluations"
    )
    save_total_limit: int | None = flag(2, "checkpoints kept, besides the best one")
    logging_steps: int = flag(10, "report the loss every N steps")
    load_best_model_at_end: bool = flag(
        True, "keep the evaluated step with the best metric, not the last one"
    )
    metric_for_best_model: str | None = flag(None, "what best means; default: the task's metric")
    early_stopping_patience: int | None = flag(
        None, "stop after N evaluations in a row without a better metric"
    )
    early_stopping_threshold: float | None = flag(
        None, "early stopping: how much better counts as better (default: any)"
    )
    data_seed: int | None = flag(None, "seed of the data order; default: --seed")
    bf16: bool = flag(False, "compute in bfloat16, module in float32")
    fp16: bool = flag(False, "compute in float16, module in float32 (GPU)")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    dataloader_num_workers: int = flag(0, "processes that assemble batches")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = flag(
        "none", "tracker to log to"
    )
    disable_tqdm: bool = flag(False, "no progress bars")
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint directory; default: the newest complete one"
    )
    ignore_checkpoints: bool = flag(
        False, "start from the beginning although there are checkpoints"
    )
    force_resume: bool = flag(False, "resume although flags or data differ from the checkpoint's")
    use_cpu: bool = flag(False, "do not use a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is None and not self.train_file:
            raise UsageError.build(
                "--task_name",
                "no training data",
                expected="a task name or --train_file",
                do="add one of them",
            )
        _positive(self, "learning_rate", "adam_epsilon", "num_train_epochs")
        _at_least(
            self,
            1,
            "max_seq_length",
            "block_size",
            "max_train_samples",
            "max_eval_samples",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "logging_steps",
            "early_stopping_patience",
        )
        _at_least(
            self,
            0,
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "dataloader_num_workers",
            "data_seed",
            "early_stopping_threshold",
        )
        _probability(self, "label_smoothing_factor", "warmup_ratio", "adam_beta1", "adam_beta2")
        _values(self, ("score_above",))
        _one_of(self, "lr_scheduler_type", SCHEDULERS)
        if self.optim is not None:
            _one_of(self, "optim", OPTIMIZERS)
        check_objective(self)
        self._check_documents()
        self._check_pairs()

    def _check_documents(self) -> None:
        """Flags of documents belong to --objective causal_lm, those of answers to instruction."""
        documents = self.objective == "causal_lm"
        needed, has = "--objective instruction", self.objective == "instruction"
        refuse_idle(self, "template", needed, has=has)
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
            raise _refuse(
                "eval_steps",
                self.eval_steps,
                f"no step count with --eval_strategy {self.eval_strategy}",
            )
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise _refuse("eval_strategy", "steps", "--eval_steps N beside it")
        stops = self.early_stopping_patience is not None
        refuse_idle(self, "early_stopping_threshold", "--early_stopping_patience", has=stops)
        evaluated = self.load_best_model_at_end and self.eval_strategy != "no"
        refuse_idle(
            self, "early_stopping_patience", "--load_best_model_at_end and evaluations",
            has=evaluated,
        )  # fmt: skip
        if not self.do_train and not self.init_from and self.adapter_config != "fft":
            raise _refuse("do_train", "false", "--init_from with the module to evaluate")

    @property
    def score_filter(self) -> ScoreFilter | None:
        """Column and threshold by which documents are chosen; None takes all of them."""
        given = self.score_column is not None or self.score_above is not None
        if self.objective != "causal_lm" or not (given or is_scored(self.task_name)):
            return None
        above = THRESHOLD if self.score_above is None else self.score_above
        return ScoreFilter(self.score_column or SCORE_COLUMN, above)

    @property
    def stated_purpose(self) -> str | None:
        """What the module's provenance and card say that it is for."""
        if self.purpose is not None or self.score_filter is None:
            return self.purpose
        return (
            f"trained on texts with {self.score_filter}: it exists to be subtracted from a model, "
            "not to be used as it is"
        )

    @property
    def next_block(self) -> bool:
        """True where a language model of a domain is trained."""
        return self.objective == "seq2seq" and self.target == "next_block"

    @property
    def answers_labels(self) -> bool:
        """True where a row's answer is a class or a score."""
        return self.objective in OBJECTIVES and not self.next_block

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
        foreign = {f for fields in ADAPTER_FIELDS.values() for f in fields} - set(
            ADAPTER_FIELDS[self.adapter_config]
        )
        target = self.target or "label"
        foreign |= set(UNUSED_FIELDS[target if self.objective == "seq2seq" else self.objective])
        values = dataclasses.asdict(self) | {"target": target, "block_size": self.block_tokens}
        foreign |= {name for name in LATER_FIELDS if not values[name]}
        kept = {k: v for k, v in values.items() if k not in NEUTRAL_FIELDS | foreign}
        kept |= {"data_seed": self.order_seed, "eval_strategy": self.evaluation_strategy}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def check_objective(config: Any) -> None:
    """Refuse flags of another objective than the one that is trained or evaluated.

    Args:
        config: holds objective, target, prompt, block_size, next_block and the RowFlags.

    Raises:
        UsageError: naming the flag that would make it count.
    """
    if config.target is not None:
        _one_of(config, "target", TARGETS)
    refuse_idle(config, "target", "--objective seq2seq", has=config.objective == "seq2seq")
    refuse_idle(config, "prompt", "--objective seq2seq", has=config.objective == "seq2seq")
    needed = "--objective seq2seq --target next_block"
    refuse_idle(config, "block_size", needed, has=config.next_block)
    refuse_idle(config, "prompt", "--target label", has=not config.next_block)
    labelled = config.objective not in DECODERS and not config.next_block
    for name in ("labels", "label_column_name", "do_regression"):
        refuse_idle(config, name, "labelled rows, which this objective does not read", has=labelled)
    if config.objective == "instruction":
        refuse_idle(config, "text_column_names", "--objective causal_lm", has=False)


def refuse_idle(config: Any, name: str, needed: str, *, has: bool) -> None:
    """Refuse a flag that was given without the one that it needs to have an effect.

    Raises:
        UsageError: naming both.
    """
    value = getattr(config, name)
    if value is not None and not has:
        raise UsageError.build(
            f"--{name}",
            f"has no effect without {needed}",
            found=value,
            do=f"add {needed} or leave it out",
        )


def _refuse(name: str, found: object, expected: str) -> UsageError:
    return UsageError.build(f"--{name}", "cannot be used", found=found, expected=expected)  # type: ignore[return-value]


def _values(config: object, names: tuple[str, ...]) -> list[tuple[str, float]]:
    """The named numbers that are set; each must be finite."""
    values = [(n, v) for n in names if (v := getattr(config, n)) is not None]
    for name, value in values:
        if not math.isfinite(value):
            raise _refuse(name, value, "a finite number")
    return values


def _at_least(config: object, least: int, *names: str) -> None:
    for name, value in _values(config, names):
        if value < least:
            raise _refuse(name, value, f"a number >= {least}")


def _positive(config: object, *names: str) -> None:
    for name, value in _values(config, names):
        if value <= 0:
            raise _refuse(name, value, "a number > 0")


def _probability(config: object, *names: str) -> None:
    for name, value in _values(config, names):
        if not 0 <= value < 1:
            raise _refuse(name, value, "a number >= 0 and < 1")


def _one_of(config: object, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise _refuse(name, getattr(config, name), ", ".join(allowed))
