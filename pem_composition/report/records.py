"""Reading results.jsonl: finished points, and the summary lines that tie them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Results:
    """The last summary of a results.jsonl and the points it names, by key."""

    path: Path
    summary: Mapping[str, Any]
    points: Mapping[str, Mapping[str, Any]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that hold a JSON object; a line torn by a crash is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def read(path: str | Path) -> Results:
    """The sweep that a results.jsonl, or the directory that holds it, ends with.

    Raises:
        DataError: no such file, no finished sweep in it, or a point of the sweep is missing.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError.build(
            file, "no such results file", do="give the output directory of a sweep"
        )
    lines = read_lines(file)
    summaries = [r for r in lines if "summary" in r]
    if not summaries:
        raise DataError.build(
            file,
            "holds no finished sweep",
            found=f"{len(lines)} points",
            do="run the sweep to its end; it continues",
        )
    summary = summaries[-1]
    points = {r["key"]: r for r in lines if "key" in r}
    needed = [r["key"] for r in summary["rows"]] + summary["singles"]
    needed += [p["key"] for curve in summary["curve"].values() for p in curve]
    lost = [key for key in needed if key not in points]
    if lost:
        raise DataError.build(
            file,
            "a point of the sweep cannot be read",
            found=f"{len(lost)} missing",
            do="run the sweep again; it fills the gap",
        )
    return Results(file, summary, {key: points[key] for key in needed})
