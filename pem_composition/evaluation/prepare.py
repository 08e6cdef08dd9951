"""The exam of an objective: its rows tokenised and padded once, for any number of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pem_composition.evaluation import classify
from pem_composition.evaluation.answers import AnswerExam, ask
from pem_composition.evaluation.exam import (
    BATCH_ROWS,
    SCORING,
    ClassificationExam,
    Exam,
    ExamSettings,
)
from pem_composition.evaluation.generation import GenerationExam
from pem_composition.evaluation.instructions import instruction_exam
from pem_composition.evaluation.language import LanguageExam
from pem_composition.evaluation.perplexity import document_exam
from pem_composition.tasks.data import Example
from pem_composition.tasks.glue import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def make_exam(
    settings: ExamSettings,
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    batch_size: int | None = None,
    pad_to: int | None = None,
    device: torch.device | str = "cpu",
) -> Exam:
    """Tokenise and pad rows once, for any number of evaluations.

    Args:
        config: the model's configuration: where an encoder-decoder starts to write.
        batch_size: rows per forward pass; None: 16 on a CPU, 64 on a GPU.
        pad_to: pad every batch to this many tokens.

    Raises:
        DataError: no rows, rows without labels, answers that the tokenizer cannot write, too few
            blocks.
    """
    size = batch_size or BATCH_ROWS.get(torch.device(device).type, BATCH_ROWS["cuda"])
    layout: dict[str, Any] = {"batch_size": size, "pad_to": pad_to, "device": device}
    if settings.objective == "classification":
        data = classify.encode(tokenizer, examples, max_seq_length=settings.max_seq_length)
        batches = classify.batches(data, **layout)
        return ClassificationExam(task, data.labels, batches, settings.order)
    if settings.objective == "causal_lm":
        return document_exam(settings, examples, tokenizer, config, **layout)
    if settings.objective == "instruction":
        return instruction_exam(settings, examples, tokenizer, config, **layout)
    if settings.target == "next_block":
        return LanguageExam.prepare(settings, examples, tokenizer, config, **layout)
    asked = ask(settings, task, examples, tokenizer, config, **layout)
    if settings.answers == SCORING:
        return AnswerExam(asked)
    return GenerationExam(asked, settings.answers)
