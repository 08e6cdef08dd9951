"""What a model answers for each row, as the Hugging Face example programs write it, and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pem_composition import json_lines
from pem_composition.errors import DataError
from pem_composition.evaluation.evaluator import check_finite
from pem_composition.safe_files import write_text

PREDICTIONS = "predict_results_"  # how the names of the files begin

if TYPE_CHECKING:
    from pem_composition.evaluation.evaluator import Evaluator, Outputs
    from pem_composition.tasks.data import Example

NO_ANSWER = "invalid"  # of a model that wrote none of a prompt's answers


def predictions(
    evaluator: Evaluator, outputs: Outputs, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """One record per row: a class by its word (None for an answer that is none), or a score; and
    the probability of every class where outputs (n, k) tell.

    Raises:
        RunFailed: an output that is not finite.
    """
    task = evaluator.task
    check_finite(task, outputs, "outputs")
    values = evaluator.predictions(outputs)
    words = [*task.labels, None]
    said = [float(v) if task.regression else words[int(v)] for v in values]
    records = [
        {"index": i, "row_id": example.row_id, "prediction": word}
        for i, (example, word) in enumerate(zip(examples, said, strict=True))
    ]
    for record, shares in zip(records, _probabilities(evaluator, outputs), strict=False):
        record["probabilities"] = dict(zip(task.labels, shares, strict=True))
    return records


def _probabilities(evaluator: Evaluator, outputs: Outputs) -> list[list[float]]:
    """For each row those of the classes; empty where there are none or outputs do not tell them."""
    if evaluator.task.regression:
        return []
    try:
        scores = evaluator.class_scores(torch.from_numpy(outputs).double())
    except DataError:  # generation writes an answer and scores no other
        return []
    return scores.softmax(dim=-1).tolist()  # type: ignore[no-any-return]


def write(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> Path:
    """Write ``predict_results_<name>.txt`` (index and prediction) and ``.jsonl`` (the records)."""
    lines = ["index\tprediction"]
    for record in records:
        said = record["prediction"]
        shown = f"{said:3.3f}" if isinstance(said, float) else said or NO_ANSWER
        lines.append(f"{record['index']}\t{shown}")
    path = folder / f"{PREDICTIONS}{name}.txt"
    write_text(path, "\n".join(lines) + "\n")
    json_lines.write(path.with_suffix(".jsonl"), records)
    return path
