"""The Hugging Face Trainer with whole checkpoints and exact resume; it ends a run that diverges."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import DefaultFlowCallback

from pem_composition.errors import CheckpointError, RunFailed, UsageError
from pem_composition.evaluation.metrics import greater_is_better
from pem_composition.evaluation.sharding import reshard, whole
from pem_composition.safe_files import read_json, write_json
from pem_composition.signals import StopRequest
from pem_composition.training import checkpointing, shards
from pem_composition.training.batches import EpochLoader
from pem_composition.training.training_flags import TrainConfig

STATE_FILE = "trainer_state.json"
SCHEDULER = "scheduler.json"  # of a checkpoint in parts
T = TypeVar("T")


@contextmanager
def _tensors_only(checkpoint: str | None) -> Iterator[None]:
    """torch's refusal of a state that holds more than tensors, as one line."""
    try:
        yield
    except UnpicklingError as error:
        # torch's own first line advises to load it without the restriction
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError.build(
            checkpoint,
            "cannot be resumed from",
            found=named[1] if named else "a damaged state",
            expected="a state of tensors",
            do="remove it to resume from an older checkpoint",
        ) from None


class TrainedWeights(Protocol):
    """What a checkpoint holds of the model: a module, or every parameter.

    Where it is ``in_parts``, every process writes; else the first one does.
    """

    @property
    def in_parts(self) -> bool:
        """True where every process holds a part."""

    def write(self, path: Path) -> None:
        """Write a new directory."""

    def read(self, path: Path) -> None:
        """Put a directory's numbers into the model."""


SAME_NAME = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "bf16", "fp16",
    "dataloader_num_workers", "report_to", "disable_tqdm", "use_cpu", "logging_steps",
)  # fmt: skip


def training_arguments(config: TrainConfig, total_steps: int, metric: str) -> TrainingArguments:
    """The Trainer's arguments for a run of ``total_steps``; evaluating and saving are Flow's.

    Raises:
        UsageError: a combination that this machine or the Trainer cannot do.
    """
    recompute = "activation_checkpointing"
    if recompute not in TrainingArguments.__dataclass_fields__:
        recompute = "gradient_checkpointing"  # its name in earlier releases of transformers 5
    options: dict[str, Any] = {name: getattr(config, name) for name in SAME_NAME} | {
        "max_steps": total_steps,
        "warmup_steps": warmup_steps(config, total_steps),
        # Without an accelerator it wants to be told, or each of several processes trains alone.
        "use_cpu": config.use_cpu or not torch.accelerator.is_available(),
        "data_seed": config.order_seed,
        recompute: config.gradient_checkpointing,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_only_model": True,  # by the Trainer; _save_checkpoint saves the rest
        "logging_nan_inf_filter": False,
        "metric_for_best_model": metric if config.load_best_model_at_end else None,
        "greater_is_better": greater_is_better(metric),
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if config.optim is not None:
        options["optim"] = config.optim
    if config.lr_scheduler_type == "polynomial":  # the reference's end rate, if below the peak
        end = 1e-7 if config.learning_rate > 1e-6 else 0.0
        options["lr_scheduler_kwargs"] = {"lr_end": end, "power": 1.0}
    try:
        return TrainingArguments(**options)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError.build("pem train", f"the flags cannot be used here ({reason})") from error


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps with a rising rate; at least one step is left for the decay.

    Raises:
        UsageError: ``--warmup_steps`` leaves none.
    """
    if config.warmup_steps is None:
        return min(math.ceil(config.warmup_ratio * total_steps), total_steps - 1)
    if config.warmup_steps >= total_steps:
        raise UsageError.build(
            "--warmup_steps",
            "leaves no step for training at the peak rate",
            found=config.warmup_steps,
            expected=f"less than the {total_steps} steps of the run",
        )
    return config.warmup_steps


class Flow(TrainerCallback):
    """Decides at the end of each step, from its number alone, what to log, evaluate and save."""

    def __init__(
        self, config: TrainConfig, steps_per_epoch: int, *, evaluates: bool, stop: StopRequest
    ) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.evaluates = evaluates and config.evaluation_strategy != "no"
        self.stop = stop
        self.stopped = False  # known to every process, whichever got the signal

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Set the Trainer's switches."""
        step, last = state.global_step, state.global_step >= state.max_steps
        self.stopped = stopping = not last and self._anyone_asked_to_stop(args)
        every = self.config.eval_steps or self.steps_per_epoch
        control.should_evaluate = self.evaluates and (step % every == 0 or last)
        due = bool(self.config.save_steps) and step % (self.config.save_steps or 1) == 0
        best = control.should_evaluate and self.config.load_best_model_at_end
        control.should_save = due or best or last or stopping
        # A report averages the losses since the last; one at each save keeps a resumed log equal.
        control.should_log = (
            control.should_save or step == 1 or step % self.config.logging_steps == 0
        )
        control.should_training_stop = stopping or last
        return control

    def _anyone_asked_to_stop(self, args: TrainingArguments) -> bool:
        """True on every process once a signal has reached one of them."""
        asked = self.stop.received is not None
        if args.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class EarlyStopping(EarlyStoppingCallback):
    """The Trainer's early stopping, which in a resumed run counts the evaluations before it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count again what the log holds: evaluations in a row without a better metric."""
        name, before = f"eval_{args.metric_for_best_model}", TrainerState()
        for value in [entry[name] for entry in state.log_history if name in entry]:
            self.check_metric_value(args, before, control, value)
            best = max if args.greater_is_better else min
            known = before.best_metric
            before.best_metric = value if known is None else best(value, known)

    @property
    def reached(self) -> bool:
        """True once training is to stop."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)


class ModuleTrainer(Trainer):
    """Trainer whose data order, loss, evaluation and checkpoints are given to it.

    Args:
        loader: training batches, the same ones for every number of processes.
        loss: (model output, labels, number of real rows in the global batch) -> scalar.
        score: model -> metrics without prefix; must not draw random numbers.
        weights: writes and reads what the checkpoints hold of the model.
        run: what the run is (flags, data, base); stored in every checkpoint's marker.
        stopping: ends training where evaluations no longer improve.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loader: EpochLoader,
        loss: Callable[..., Tensor],
        score: Callable[[nn.Module], dict[str, Any]],
        weights: TrainedWeights,
        run: Mapping[str, Any],
        flow: Flow,
        keep: int | None,
        stopping: EarlyStopping | None = None,
    ) -> None:
        if getattr(model, "is_quantized", False):
            # The Trainer lets a quantised base be trained only with adapters of PEFT's; ours are as
            # good, and this is the mark by which it knows them.
            model._hf_peft_config_loaded = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=loader.dataset,
            compute_loss_func=loss,
            callbacks=[flow, *([stopping] if stopping else [])],
        )
        self.remove_callback(DefaultFlowCallback)
        self.model_accepts_loss_kwargs = False  # the loss is ours, not the model's
        self._loss_shifts_labels = False  # and so are the labels: each is a target
        self._loader = loader
        self._score = score
        self._weights = weights
        self._run = run
        self.flow = flow
        self._stopping = stopping
        self._keep = keep
        self._evaluated: dict[
            int, dict[str, Any]
        ] = {}  # step -> metrics, of this process's lifetime
        self._step_in_model = 0
        self._size = sum(p.numel() for p in model.parameters())

    def get_train_dataloader(self) -> EpochLoader:
        return self._loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay leaves (IA)^3 vectors alone too: their neutral value is one, not zero."""
        return [
            name for name in super().get_decay_parameter_names(model) if not name.endswith(".ia3")
        ]

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """6 operations per parameter and token, without walking the model at every step."""
        return 6 * int(inputs["input_ids"].numel()) * self._size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One forward and backward pass.

        Raises:
            RunFailed: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged("loss", loss.item())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With float16 the gradient scaler deals with overflow: it skips the step.
        if not self.args.fp16 and not math.isfinite(float(norm)):
            raise self._diverged("gradient norm", float(norm))
        return norm

    def _diverged(self, what: str, value: float) -> RunFailed:
        saved = checkpointing.newest_complete(Path(self.args.output_dir), lambda _line: None)
        kept = f"last good checkpoint {saved}" if saved else "no checkpoint was written"
        return RunFailed.build(  # type: ignore[return-value]
            f"step {self.state.global_step + 1}",
            f"training diverged, {kept}",
            found=f"{what} {value}",
            expected="a finite number",
            do="lower --learning_rate or raise --warmup_ratio",
        )

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, Any]:
        """Metrics of the model as it is, logged.

        Raises:
            RunFailed: a logit is not finite.
        """
        try:
            scores = self.scores(self._score)
        except RunFailed as error:
            raise self._diverged("logits in evaluation", float("nan")) from error
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in scores.items()}
        self._evaluated[self.state.global_step] = metrics
        self.log(
            {
                k: v
                for k, v in metrics.items()
                if isinstance(v, (int, float)) and not isinstance(v, bool)
            }
        )
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        assembled = checkpointing.partial(output, step)
        self.store_flos()
        try:
            self._check_finite()
            if self.args.should_save:
                shutil.rmtree(assembled, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save or self._weights.in_parts:
                self._weights.write(assembled)
            self.accelerator.wait_for_everyone()
            self._save_optimizer_and_scheduler(str(assembled))
            self._save_scaler(str(assembled))
            self._save_rng_state(str(assembled))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(assembled / STATE_FILE))
                checkpointing.seal(
                    assembled, checkpointing.directory(output, step), step, self._run
                )
                checkpointing.rotate(output, self._keep, self.state.best_global_step)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(assembled, ignore_errors=True)
            raise RunFailed.build(
                checkpointing.directory(output, step),
                "cannot write the checkpoint",
                found=error,
                do="free some space and run the same command again to resume",
            ) from error

    def _check_finite(self) -> None:
        """No checkpoint of a module that is already broken."""
        reshard(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not whole(torch.isfinite(parameter).all()):
                raise self._diverged(f"parameter {name}", float("nan"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._weights.read(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and position from the checkpoint; rate and decay from the flags, as given now."""
        given = [(g["initial_lr"], g["weight_decay"]) for g in self.optimizer.param_groups]
        with _tensors_only(checkpoint):
            self._load_optimizer(checkpoint)
        scheduler = self.lr_scheduler
        for i, (rate, decay) in enumerate(given):
            group = self.optimizer.param_groups[i]
            group["weight_decay"] = decay
            if group["initial_lr"] != rate:  # otherwise the restored rate is exact as it is
                group["initial_lr"] = scheduler.base_lrs[i] = rate
                group["lr"] = rate * scheduler.lr_lambdas[i](scheduler.last_epoch)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._weights.in_parts:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        shards.write_optimizer(self.model, self.optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            write_json(Path(output_dir) / SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer(self, checkpoint: str | None) -> None:
        """The optimizer's state and the scheduler's, whoever holds and whoever wrote them."""
        where = Path(checkpoint or "")
        inner = self.optimizer.optimizer
        if checkpoint is None or not shards.hold(where):
            with shards.taken_apart(inner) if self._weights.in_parts else nullcontext():
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        shards.read_optimizer(self.model, inner, where)
        self.lr_scheduler.load_state_dict(read_json(where / SCHEDULER, where))
        for group, rate in zip(inner.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _tensors_only(checkpoint):
            super()._load_rng_state(checkpoint)

    def restore_best(self) -> int:
        """Put the best evaluated step's numbers into the model; the step that it then holds."""
        self._step_in_model = self.state.global_step
        best = self.state.best_global_step if self.args.metric_for_best_model else None
        if best and best != self._step_in_model:
            self._weights.read(checkpointing.directory(Path(self.args.output_dir), best))
            self._step_in_model = int(best)
            # The first process moves the checkpoints when it publishes.
            self.accelerator.wait_for_everyone()
        return self._step_in_model

    @property
    def candidates(self) -> int:
        """The evaluated steps of which the best one is kept; 0 where none is chosen."""
        if not self.args.metric_for_best_model:
            return 0
        return len({entry["step"] for entry in self.state.log_history if "eval_runtime" in entry})

    def scores(self, scorer: Callable[[nn.Module], T]) -> T:
        """Metrics or outputs of the model as it is, computed in the precision of the training."""
        with self.compute_loss_context_manager():
            return scorer(self.model)

    def final_scores(self) -> dict[str, Any]:
        """Metrics of the model as it is now; what was computed while training is not repeated."""
        known = self._evaluated.get(self._step_in_model)
        return known or {f"eval_{k}": v for k, v in self.scores(self._score).items()}

    def has_steps_left(self, checkpoint: Path) -> bool:
        """False for the checkpoint of the last step, or of the step that training stopped at."""
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if self._stopping is not None:
            self._stopping.on_train_begin(self.args, state, self.control)
            if self._stopping.reached:
                return False
            self._stopping.early_stopping_patience_counter = 0
        return state.global_step < self.args.max_steps

    def adopt_state(self, checkpoint: Path) -> None:
        """Take over a checkpoint of a run that has no step left."""
        self._weights.read(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
