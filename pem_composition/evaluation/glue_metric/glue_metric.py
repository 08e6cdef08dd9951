"""The published GLUE metrics for the ``evaluate`` library, without a network:

import evaluate
metric = evaluate.load("pem_composition/evaluation/glue_metric", "mrpc")
metric.compute(predictions=[0, 1], references=[0, 1])       # {"accuracy": 1.0, "f1": 1.0}
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from pem_composition.evaluation.metrics import compute
from pem_composition.tasks.glue import TASKS


class GlueMetric(evaluate.Metric):
    """Configurations are the names in ``tasks.glue.TASKS``."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise KeyError(f"found {self.config_name!r}, expected one of {', '.join(TASKS)}")
        kind = "float32" if TASKS[self.config_name].regression else "int64"
        features = {name: datasets.Value(kind) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description="Metrics of the GLUE tasks.",
            citation="Wang et al. 2018, arXiv:1804.07461",
            inputs_description="predictions, references: class numbers, or scores for stsb",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return compute(TASKS[self.config_name], predictions, references)
