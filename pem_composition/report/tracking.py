"""The points of a sweep or a search as runs of a tracker: one run per point, with its coefficients.

TensorBoard, trackio and wandb are used as they are; what is written where is theirs to say. A point
is logged once: ``tracked-TRACKER.jsonl`` beside the results says which ones were.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pem_composition import json_lines
from pem_composition.errors import installed
from pem_composition.report import frames
from pem_composition.report.records import Results

TENSORBOARD = "tensorboard"


class Run(NamedTuple):
    """One point: its name, what it is, and its measures with their standard errors."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, float]


def runs(results: Results) -> Iterator[Run]:
    """Every point of the results that has a measure."""
    found = frames.points(results)
    measures = [n for name in found.signs for n in (name, name + frames.ERROR)]
    modules = results.summary.get("modules", ())
    for _, line in found.frame.iterrows():
        known = line.dropna()
        metrics = {n.strip("+- ") + " stderr" if n.endswith(frames.ERROR) else n: float(known[n])
                   for n in measures if n in known}  # fmt: skip
        if not metrics:
            continue
        config = {k: known[k] for k in ("role", "series", "space", "command") if k in known}
        if isinstance(line["coefficients"], list):
            config |= dict(zip(modules, line["coefficients"], strict=False))
        elif found.across and "at" in known:
            config[found.across] = float(known["at"])
        parts = dict.fromkeys(str(known[k]) for k in ("series", "name") if k in known)
        number = f", {frames.TRIAL} {known['at']:g}" if found.across == frames.TRIAL else ""
        yield Run(": ".join(parts) + number, config, metrics)


def track(results: Results, out: Path, tracker: str) -> int:
    """Log the points that were not logged before; returns how many.

    Args:
        out: folder of the results; its name is the project's.
    """
    done = out / f"tracked-{tracker}.jsonl"
    before = {line["run"] for line in json_lines.read(done)} if done.exists() else set()
    new = [run for run in runs(results) if run.name not in before]
    for run in new:
        if tracker == TENSORBOARD:
            _write_events(run, out / "runs")
        else:
            _send(run, importlib.import_module(tracker), out.resolve().name)
        json_lines.append(done, {"run": run.name})
    return len(new)


def _send(run: Run, client: Any, project: str) -> None:
    """To wandb, or to trackio, whose functions are the same."""
    client.init(project=project, name=run.name, config=run.config)
    client.log(run.metrics)
    client.finish()


def _write_events(run: Run, folder: Path) -> None:
    """Hyperparameters and measures as TensorBoard shows them side by side."""
    names = ("torch.utils.tensorboard", "tensorboardX")
    package = names[0] if installed(TENSORBOARD) else names[1]
    with importlib.import_module(package).SummaryWriter(str(folder)) as writer:
        plain: Mapping[str, Any] = {k: v for k, v in run.config.items() if k != "command"}
        writer.add_hparams(plain, run.metrics, run_name=run.name.replace("/", "-"))
