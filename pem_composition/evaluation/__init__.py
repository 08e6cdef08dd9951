"""How well a model does a task: metrics, predictions, base models. Import from the modules."""

from __future__ import annotations
