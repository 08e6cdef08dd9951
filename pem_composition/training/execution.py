"""One training run that may begin: load, train, evaluate, write."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pem_composition import launch, safe_files
from pem_composition.errors import UsageError
from pem_composition.evaluation.attached import say_slow
from pem_composition.evaluation.evaluator import Evaluator
from pem_composition.evaluation.predictions import predictions
from pem_composition.evaluation.predictions import write as write_predictions
from pem_composition.objectives import Objective
from pem_composition.record import Provenance, purpose_note
from pem_composition.signals import StopRequest
from pem_composition.tasks.data import TEST, TRAIN, VALIDATION, TaskData
from pem_composition.tasks.glue import Task
from pem_composition.training import results
from pem_composition.training.batches import EpochLoader, Examples, GlobalBatches, Padding
from pem_composition.training.identity import Outcome, RunPlan
from pem_composition.training.preparation import Start, prepare
from pem_composition.training.resume import clean
from pem_composition.training.trainer import (
    EarlyStopping,
    Flow,
    ModuleTrainer,
    training_arguments,
)
from pem_composition.training.training_flags import DEFAULT_EPOCHS, TrainConfig

Say = Callable[[str], None]


def execute(config: TrainConfig, plan: RunPlan, say: Say, stop: StopRequest) -> Outcome:
    """Load, train, evaluate, write."""
    output = Path(config.output_dir)
    start = prepare(config, plan.data.task, config.freeze)
    say_precision(config, say)
    plan = replace(plan, objective=fitted(plan.objective, start, say))
    evaluators = make_evaluators(config, plan, start)
    loader = make_loader(config, plan, start, say)
    trainer = make_trainer(config, plan, start, loader, evaluators.get(VALIDATION), stop)
    if launch.is_main():
        clean(output, keep_checkpoints=plan.resume is not None)
    splits = {"train": _train(plan, trainer, loader, stop)} if config.do_train else {}
    if config.do_eval and VALIDATION in evaluators:
        splits["eval"] = trainer.final_scores()
    told: list[dict[str, Any]] = []
    if config.do_predict and TEST not in evaluators:
        say("note: --do_predict: there are no test rows (--test_file)")
    elif config.do_predict:
        scores, told = _predict(config, plan.data, trainer, evaluators[TEST], say)
        splits |= {"test": scores} if scores else {}
    metrics = {k: v for part in splits.values() for k, v in part.items()}
    if launch.is_main():
        publish(config, plan, start, trainer, splits, told)
        say(f"{output}: " + summary(metrics))
    else:
        start.weights.lend()
    return Outcome(output, metrics)


def _predict(
    config: TrainConfig, data: TaskData, trainer: ModuleTrainer, evaluator: Evaluator, say: Say
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of the test rows where all have labels, and the prediction for each of them."""
    began = time.perf_counter()
    outputs = trainer.scores(evaluator.predict)
    seconds, rows = time.perf_counter() - began, data.splits[TEST]
    if not config.answers_labels:
        return {f"test_{k}": v for k, v in evaluator.report(outputs, seconds=seconds).items()}, []
    told = predictions(evaluator, outputs, rows)
    lacking = sum(example.label is None for example in rows)
    if lacking:
        say(f"note: {lacking} of {len(rows)} test rows without a label: predicted, not scored")
        return {}, told
    return {f"test_{k}": v for k, v in evaluator.report(outputs, seconds=seconds).items()}, told


def say_precision(config: TrainConfig, say: Say) -> None:
    """One line where the processor is asked for an arithmetic that it does not have."""
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    if on_cpu and config.fp16:
        say("note: --fp16 does nothing on a processor; the run computes in float32")
    say_slow("cpu" if on_cpu else "", bf16=config.bf16, say=say)


def fitted(objective: Objective, start: Start, say: Say) -> Objective:
    """The objective with inputs that the model can take; says where they are shorter."""
    found = objective.read_by(start.model.config, start.tokenizer)
    given, limit = objective.max_seq_length, found.max_seq_length
    if limit < given:
        say(f"--max_seq_length {given}: the model takes {limit} tokens; using {limit}")
    return found


def _train(
    plan: RunPlan,
    trainer: ModuleTrainer,
    loader: EpochLoader,
    stop: StopRequest,
) -> dict[str, Any]:
    """Run the steps that are left and put the best ones' numbers into the model."""
    begin = time.perf_counter()
    total = trainer.args.max_steps
    with stop.deferred():
        if plan.resume is not None and not trainer.has_steps_left(plan.resume):
            trainer.adopt_state(plan.resume)
        else:
            trainer.train(resume_from_checkpoint=str(plan.resume) if plan.resume else None)
    if trainer.flow.stopped:
        stop.received = stop.received or "a signal to another process"
    stop.check(f"after step {trainer.state.global_step} of {total}, checkpoint written")
    best = trainer.restore_best()
    seconds = time.perf_counter() - begin
    steps = trainer.state.global_step
    return {
        "epoch": trainer.state.epoch,
        "train_loss": mean_loss(trainer.state.log_history),
        "train_samples": len(loader.dataset),  # type: ignore[arg-type]
        "train_steps": steps,
        "best_step": best,
        "best_of": trainer.candidates,
        "total_flos": trainer.state.total_flos,
        "train_runtime": round(seconds, 3),
    }


def mean_loss(log: list[dict[str, Any]]) -> float | None:
    """Mean training loss over all steps; each entry of the log averages those since the last."""
    entries = [(e["step"], e["loss"]) for e in log if "loss" in e]
    if not entries:
        return None
    before = [0, *(step for step, _ in entries)]
    return (
        sum(loss * (step - b) for (step, loss), b in zip(entries, before, strict=False))
        / entries[-1][0]
    )


def make_loader(config: TrainConfig, plan: RunPlan, start: Start, say: Say) -> EpochLoader:
    """Training batches of this process; says what rows lost where they were cut."""
    data = plan.objective.encode(
        plan.data.task, plan.data.train, start.tokenizer, start.model.config
    )
    for note in data.notes:
        say(note)
    world = launch.world_size()
    order = GlobalBatches(
        len(data),
        config.per_device_train_batch_size * world,
        seed=config.order_seed,
        rank=launch.rank(),
        world=world,
        lengths=data.lengths if config.group_by_length else None,
    )
    padding = Padding(data.padding, fixed_length(config, plan.objective))
    return EpochLoader(Examples(data), order, padding, config.dataloader_num_workers)


def fixed_length(config: TrainConfig, objective: Objective) -> int | None:
    """Tokens that every input is padded to."""
    return objective.max_seq_length if config.pad_to_max_length else None


def make_evaluators(config: TrainConfig, plan: RunPlan, start: Start) -> dict[str, Evaluator]:
    """What evaluates each split but the training rows."""
    task, model = plan.data.task, start.model
    layout: dict[str, Any] = {
        "batch_size": config.per_device_eval_batch_size,
        "pad_to": fixed_length(config, plan.objective),
    }
    return {
        split: plan.objective.evaluator(task, rows, start.tokenizer, model.config, **layout)
        for split, rows in plan.data.splits.items()
        if split != TRAIN
    }


def make_trainer(
    config: TrainConfig,
    plan: RunPlan,
    start: Start,
    loader: EpochLoader,
    evaluator: Evaluator | None,
    stop: StopRequest,
) -> ModuleTrainer:
    """The trainer of this run."""
    steps_per_epoch = -(-len(loader) // config.gradient_accumulation_steps)
    epochs = config.num_train_epochs or DEFAULT_EPOCHS
    total = config.max_steps or max(1, math.ceil(epochs * steps_per_epoch))
    metric = _best_metric(config, plan.data.task, plan.objective.metrics(plan.data.task))
    loss = plan.objective.loss(plan.data.task)
    if config.label_smoothing_factor:
        if plan.data.task.regression and config.objective == "classification":
            raise UsageError.build(
                "--label_smoothing_factor", "a regression has no classes", do="leave it out"
            )
        loss = functools.partial(loss, label_smoothing=config.label_smoothing_factor)
    stopping = None
    if config.early_stopping_patience is not None:
        threshold = config.early_stopping_threshold or 0.0
        stopping = EarlyStopping(config.early_stopping_patience, threshold)
    flow = Flow(config, steps_per_epoch, evaluates=evaluator is not None, stop=stop)
    return ModuleTrainer(
        start.model,
        training_arguments(config, total, metric),
        loader=loader,
        loss=loss,
        score=evaluator.measure if evaluator is not None else _no_scores,
        weights=start.weights,
        run=plan.identity,
        flow=flow,
        keep=config.save_total_limit,
        stopping=stopping,
    )


def _best_metric(config: TrainConfig, task: Task, given: tuple[str, ...]) -> str:
    """Name of the metric that the best step is chosen by.

    Raises:
        UsageError: evaluations of the task have no such metric.
    """
    name = (config.metric_for_best_model or task.primary).removeprefix("eval_")
    known = tuple(dict.fromkeys((*given, "loss")))
    if name not in known:
        raise UsageError.build(
            "--metric_for_best_model",
            f"no metric of {task.name}",
            found=name,
            expected=", ".join(known),
        )
    return name


def _no_scores(_model: object) -> dict[str, Any]:
    return {}


def publish(
    config: TrainConfig,
    plan: RunPlan,
    start: Start,
    trainer: ModuleTrainer,
    splits: Mapping[str, Mapping[str, Any]],
    told: Sequence[dict[str, Any]] = (),
) -> None:
    """Write module, results, predictions, state and card into the output folder, all or nothing."""
    output = Path(config.output_dir)
    metrics = {k: v for part in splits.values() for k, v in part.items()}
    content = {k: v for k, v in plan.identity.items() if k != "flags"}
    training = results.jsonable(
        {
            "key": plan.key, "flags": asdict(config), "decide": list(config.result_fields()),
            "content": content, "scores": metrics,
        }
    )  # fmt: skip
    purpose = config.stated_purpose
    parents = [f"{output.name} was trained from {s.name} ({s.sha256})" for s in start.parents]
    notes = [purpose_note(output.name, purpose)] if purpose else []
    provenance = Provenance(
        sources=start.parents,
        init=start.init,
        training=training,
        notes=tuple(dict.fromkeys((*start.notes, *parents, *notes))),
    )
    with safe_files.atomic_directory(output, overwrite=True, keep=results.is_foreign) as folder:
        start.weights.publish(folder, output.name, provenance)
        results.write_results(folder, splits)
        if told:
            write_predictions(folder, plan.data.task.name, told)
        results.write_state(folder, asdict(trainer.state))


def summary(metrics: Mapping[str, Any]) -> str:
    """The scores in one line."""
    shown = {
        k: v
        for k, v in metrics.items()
        if isinstance(v, float) and not k.endswith(("_runtime", "epoch"))
    }
    line = ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
    if "eval_loss" in metrics and metrics.get("best_of", 0) > 1:
        line += (
            f" (eval is of step {metrics['best_step']}, the best of {metrics['best_of']} on these "
            "rows, so it is optimistic; other rows: --do_predict --test_file)"
        )
    return line + (" (degenerate: predicts one class)" if metrics.get("eval_degenerate") else "")
