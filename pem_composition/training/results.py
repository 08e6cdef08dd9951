"""The result files of a run, named as the Hugging Face example programs name them. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pem_composition import safe_files
from pem_composition.checkpoint import layouts
from pem_composition.checkpoint.content import RECORD
from pem_composition.errors import PEMError

ALL = "all_results.json"
STATE = "trainer_state.json"
SPLIT = "_results.json"


def jsonable(value: Any) -> Any:
    """The value with NaN and infinities as null, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_results(
    folder: Path, splits: Mapping[str, Mapping[str, Any]], *, earlier: Path | None = None
) -> None:
    """``train_results.json``, ``eval_results.json``, ... and all of them together.

    What ``all_results.json`` of the folder ``earlier`` held of other splits stays, as in the
    Hugging Face programs.
    """
    for split, metrics in splits.items():
        _write(folder / f"{split}{SPLIT}", metrics)
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(((earlier or folder) / ALL).read_text(encoding="utf-8")))
    _write(folder / ALL, known | {k: v for part in splits.values() for k, v in part.items()})


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """``trainer_state.json``: the step, the best step and the log."""
    _write(folder / STATE, state)


def is_foreign(entry: str) -> bool:
    """True for what no run writes as its result, which survives when another run takes its place.

    Adapter and model files of another kind of run must not: transformers would load both.
    """
    own = entry == STATE or entry.endswith(SPLIT) or entry.startswith("predict_results_")
    return layouts.is_foreign(entry) and not own


def read_training(output_dir: Path) -> dict[str, Any]:
    """The ``training`` part of a finished run's pem.json; empty if there is none to read."""
    try:
        record = safe_files.read_json(output_dir / RECORD)
    except (OSError, PEMError):
        return {}
    training = record.get("training")
    return training if isinstance(training, dict) else {}


def is_intact(output_dir: Path) -> bool:
    """True if every file that pem.json lists is there as it was written."""
    recorded = safe_files.read_json(output_dir / RECORD).get("files")
    return isinstance(recorded, dict) and all(
        (output_dir / name).is_file() and safe_files.sha256_file(output_dir / name) == digest
        for name, digest in recorded.items()
    )


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
