"""``pem report``: tables and plots of finished sweeps, made again from results.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.cli import common
from pem_composition.errors import CheckpointError
from pem_composition.training.config import flag, required

if TYPE_CHECKING:
    from pem_composition.report.records import Results

NAME = "report"
HELP = (
    "table and plot of a finished sweep, or the mean of several (seeds), from results.jsonl alone"
)
EXAMPLES = """
  pem report -r runs/sweep
  pem report -r runs/sweep-s0 runs/sweep-s1 runs/sweep-s2 -p runs/table
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem report."""

    results: tuple[str, ...] = required(
        "results.jsonl files or their directories", short="-r", metavar="DIR"
    )
    save_path: Path | None = flag(
        None,
        "where table and plot go; default: beside one results.jsonl, else nowhere",
        short="-p",
        metavar="OUT",
    )


def run(config: Config) -> int:
    """Print the table and write the files."""
    from pem_composition.report import records, search

    if all(search.is_search(path) for path in config.results):
        return _search(config)
    sweeps = [records.read(path) for path in config.results]
    out = config.save_path or (sweeps[0].path.parent if len(sweeps) == 1 else None)
    if out is not None:
        if out.exists() and not out.is_dir():
            raise CheckpointError.build(
                out, "not a directory", found="a file", do="choose another --save_path"
            )
        out.mkdir(parents=True, exist_ok=True)
    if any(s.summary["composition"] == records.NEGATION for s in sweeps):
        _strengths(sweeps, out)
    else:
        _coefficients([s.path for s in sweeps], out)
    return 0


def _coefficients(sweeps: Sequence[Path], out: Path | None) -> None:
    """Sweeps over merges and analogies."""
    from pem_composition.report import plot, table

    if len(sweeps) == 1 and out is not None:
        print(table.write(sweeps[0], out))
        common.print_plots(lambda: plot.write(sweeps[0], out))
        return
    rows = table.aggregate(sweeps)
    _write(out, table.aggregate_markdown(rows), table.to_csv(rows, tuple(rows[0])))


def _strengths(sweeps: Sequence[Results], out: Path | None) -> None:
    """Sweeps over the strength of a negation."""
    from pem_composition.report import frontier, table, unlearning

    paths = [sweep.path for sweep in sweeps]
    if len(sweeps) == 1 and out is not None:
        print(unlearning.write(paths[0], out))
    else:
        rows = unlearning.aggregate(paths)
        csv = table.to_csv(rows, unlearning.aggregate_columns())
        _write(out, unlearning.aggregate_markdown(rows), csv)
    if out is not None and frontier.comparable(sweeps):
        common.print_plots(lambda: frontier.write(paths, out))
    elif out is not None:
        print("no plot: the sweeps differ in base model, judges, prompts, text or limits")


def _write(out: Path | None, markdown: str, csv: str) -> None:
    print(markdown)
    if out is not None:
        (out / "table.md").write_text(markdown + "\n", encoding="utf-8")
        (out / "table.csv").write_text(csv, encoding="utf-8")


def _search(config: Config) -> int:
    """Table and plot of a search, or the mean of several."""
    from pem_composition.report import search

    if len(config.results) > 1:
        text = search.aggregate(config.results)
        print(text)
        if config.save_path is not None:
            config.save_path.mkdir(parents=True, exist_ok=True)
            (config.save_path / "table.md").write_text(text + "\n", encoding="utf-8")
        return 0
    path = Path(config.results[0])
    out = config.save_path or (path if path.is_dir() else path.parent)
    out.mkdir(parents=True, exist_ok=True)
    print(search.write(path, out))
    common.print_plots(lambda: search.plot(path, out))
    return 0
