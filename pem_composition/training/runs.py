"""One training run, whatever its objective: read, resume, train, evaluate, write."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition import checkpoint as checkpoints
from pem_composition import launch
from pem_composition.checkpoint import hub
from pem_composition.evaluation.keys import key_of
from pem_composition.evaluation.model_names import resolve
from pem_composition.evaluation.own_classes import Classes, of_model, of_module
from pem_composition.objectives import Objective, objective_of
from pem_composition.objectives.documents import Documents
from pem_composition.objectives.instructions import Instructions
from pem_composition.objectives.joint import Joint
from pem_composition.signals import StopRequest
from pem_composition.tasks.data import TEST, TRAIN, VALIDATION, TaskData
from pem_composition.training import checkpointing, processes, results
from pem_composition.training.identity import Outcome, RunPlan, describe_run
from pem_composition.training.resume import check_place, find_resume, refuse_undescribed
from pem_composition.training.training_flags import TrainConfig

if TYPE_CHECKING:
    from pem_composition.module import PEM

Say = Callable[[str], None]


def train(config: TrainConfig, say: Say = lambda _line: None) -> PEM:
    """Train and return the module (for ``fft`` the difference to the base); see ``run``."""
    outcome = run(config, say)
    base = resolve(config.model_name_or_path) if config.adapter_config == "fft" else None
    return checkpoints.load(outcome.output_dir, base=base)


def run(
    config: TrainConfig, say: Say = lambda _line: None, stop: StopRequest | None = None
) -> Outcome:
    """Train, evaluate and write ``config.output_dir``; resume or skip what is there already.

    Args:
        say: called with one line per noteworthy event, on the main process only.
        stop: the signals to heed; None heeds none.

    Raises:
        DataError, UsageError: data, flags or output directory cannot be used; nothing was written.
        RunFailed: the loss is not finite, or the disk is full; the last good checkpoint is kept.
        Preempted: a signal arrived; a checkpoint was written at the end of the step.
    """
    if not launch.is_main():
        say = _silent
    processes.check_sharding(os.environ, fsdp=config.fsdp)
    output = Path(config.output_dir)
    check_place(output)
    objective = trained_objective(config)
    data = read_data(config, objective)
    for note in [*config.idle_notes(), *data.notes]:
        say(note)
    identity = describe_run(config, data, objective.content(data.task))
    plan = RunPlan(objective, data, identity)
    with checkpointing.alone(output) if launch.is_main() else nullcontext():
        return _run(config, plan, say, stop or StopRequest())


def _run(config: TrainConfig, plan: RunPlan, say: Say, stop: StopRequest) -> Outcome:
    """Skip, resume or start the run in its folder."""
    output, identity = Path(config.output_dir), plan.identity
    done = results.read_training(output)
    same = done.get("key") == key_of(identity)
    if same and not config.overwrite_output_dir and results.is_intact(output):
        say(f"{output}: already holds the result of this run, skipped")
        return Outcome(output, done.get("scores", {}), skipped=True)
    if not config.overwrite_output_dir:
        refuse_undescribed(output, done)
    resume = find_resume(config, identity, say, finished=bool(done))
    from pem_composition.training.execution import execute

    return execute(config, replace(plan, resume=resume), say, stop)


def _silent(_line: str) -> None:
    return None


def trained_objective(config: TrainConfig) -> Objective:
    """The objective that the flags name."""
    if config.joint_tasks:
        return Joint(names=config.joint_tasks, max_seq_length=config.max_seq_length)
    found = objective_of(
        config.objective, next_block=config.next_block, max_seq_length=config.max_seq_length,
        block_size=config.block_tokens, prompt=config.prompt, template=config.template,
    )  # fmt: skip
    if isinstance(found, Documents):
        return replace(
            found, chosen=config.score_filter, truncate=config.truncate,
            loss_on_padding=config.loss_on_padding,
        )  # fmt: skip
    if isinstance(found, Instructions):
        return replace(found, train_on_inputs=config.train_on_inputs)
    return found


def read_data(config: TrainConfig, objective: Objective) -> TaskData:
    """The rows of the splits that the run uses."""
    splits = [TRAIN, VALIDATION] + ([TEST] if config.do_predict else [])
    data = objective.read(
        config.task_name,
        config.row_files(
            splits,
            max_train_samples=config.max_train_samples,
            max_eval_samples=config.max_eval_samples,
        ),
        reading=config.reading(own_classes(config)),
    )
    data.require(TRAIN)
    if config.eval_strategy not in (None, "no") or config.early_stopping_patience is not None:
        data.require(VALIDATION)
    return data


def own_classes(config: TrainConfig) -> Classes:
    """The classes that the run starts with, where neither task nor flags say them."""
    said = config.task_name or config.joint_tasks or config.labels
    said = said or config.do_regression is not None
    if said or config.objective != "classification":
        return None
    if config.init_from is not None and hub.folder_of(config.init_from).is_dir():
        return of_module(checkpoints.inspect_header(config.init_from))
    return of_model(config.model_name_or_path)
