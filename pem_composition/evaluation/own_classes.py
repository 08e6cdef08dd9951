"""The classes that a module or a model brings: they decide what rows of no known task mean.

Empty for a regression; None where nothing is said, as by a language model or a base without head.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.arithmetic.heads import tasks_of
from pem_composition.checkpoint.files import read_json
from pem_composition.checkpoint.full import head_info
from pem_composition.evaluation.models import resolve

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.config import HeadInfo

Classes = tuple[str, ...] | None


def of_module(header: ModuleHeader, head: str | None = None) -> Classes:
    """The classes of a module's head, or of one of its heads by name."""
    if head is None:
        return _said(header.head)
    if head in header.heads:
        return _said(header.heads[head])
    part = tasks_of(header.head).get(head)
    return tuple(part["labels"]) if part else None


def of_model(model_name_or_path: str) -> Classes:
    """The classes of a model that was saved as a sequence classifier."""
    source = resolve(model_name_or_path)
    if not Path(source).is_dir():
        return None
    raw = read_json(Path(source) / "config.json", Path(source))
    classifies = any("SequenceClassification" in str(n) for n in raw.get("architectures") or ())
    return _said(head_info(raw)) if classifies else None


def _said(info: HeadInfo | None) -> Classes:
    if info is None or (info.problem != "regression" and not info.labels):
        return None
    return info.labels
