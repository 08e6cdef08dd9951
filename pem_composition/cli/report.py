"""``pem report``: tables, plots and a page of finished sweeps, made again from results.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.cli import common
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required
from pem_composition.report import records
from pem_composition.safe_files import in_turn
from pem_composition.training.training_flags import NO_TRACKER

if TYPE_CHECKING:
    from pem_composition.report.records import Results

NAME = "report"
HELP = (
    "table, plot and page of a finished sweep, or the mean of several (seeds), from results.jsonl"
)
EXAMPLES = """
  pem report -r runs/sweep
  pem report -r runs/search --html search.html --axes rte "rte loss"
  pem report -r runs/sweep-s0 runs/sweep-s1 runs/sweep-s2 -p runs/table
  pem report -r runs/search-s0 runs/search-s1 --leaderboard methods.csv
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of pem report."""

    results: tuple[str, ...] = required(
        "results.jsonl files or their directories", short="-r", metavar="DIR"
    )
    save_path: Path | None = flag(
        None,
        "where table, plot and page go; default: beside one results.jsonl, else nowhere",
        short="-p",
        metavar="OUT",
    )
    html: Path | None = flag(
        None, "the page of one sweep or search, a single file; default: OUT/report.html",
        metavar="FILE",
    )  # fmt: skip
    axes: tuple[str, str] | None = flag(
        None, "the two measures of the page's frontier, across and up", metavar="NAME"
    )
    comparison: Path | None = flag(
        None, "what pem compare -p wrote, for the page; default: the one beside the results",
        metavar="FILE",
    )  # fmt: skip
    leaderboard: Path | None = flag(
        None, "CSV file to add the methods of searches to; prints how all in it stand",
        metavar="FILE",
    )  # fmt: skip


def run(config: Config) -> int:
    """Print the table and write the files."""
    found = [records.read(path) for path in config.results]
    if config.leaderboard is not None:
        return _add(found, config.leaderboard, config)
    several = len(found) > 1
    if several and (config.html or config.axes or config.comparison):
        raise UsageError.build(
            "--html", "a page shows one sweep", found=f"{len(found)} results", do="name one"
        )
    if config.html is not None and config.html.resolve() == found[0].path.resolve():
        raise UsageError.build(
            "--html", "the results themselves", found=config.html, do="choose another --html"
        )
    out = config.save_path or (None if several else found[0].path.parent)
    if several:
        _several(found, out)
    else:
        assert out is not None
        _one(found[0], out, config)
    return 0


def _add(found: Sequence[Results], file: Path, config: Config) -> int:
    """Extend a leaderboard."""
    from pem_composition.report import leaderboard

    for name in ("save_path", "html", "axes", "comparison"):
        if getattr(config, name):
            raise UsageError.build(
                f"--{name}", "has no effect with --leaderboard", do="leave it out"
            )
    with in_turn(file.parent):  # of two at once the second reads what the first has written
        scores = leaderboard.read(file)
        for one in found:
            scores = leaderboard.extended(scores, leaderboard.scores_of(one))
        shown = leaderboard.markdown(scores)
        leaderboard.write(file, scores)
    print(shown)
    return 0


def show(results: Path, out: Path, tracker: str = NO_TRACKER) -> None:
    """Print the table of finished results; write it, its plots and its page into ``out``.

    Args:
        tracker: log the points to it, too.
    """
    print()
    _one(records.read(results), out, tracker=tracker)


def _one(found: Results, out: Path, asked: Config | None = None, tracker: str = NO_TRACKER) -> None:
    from pem_composition.report import (
        detoxified,
        frontier,
        page,
        plot,
        table,
        tracking,
        unlearning_tables,
    )

    if found.summary["composition"] == records.DETOXIFICATION:
        _check_no_page(found, asked)
        print(detoxified.write(found.path, out))
        return
    if asked is None:
        file, whole = out / page.FILE, page.document(found)
    else:
        file = asked.html or out / page.FILE
        whole = page.document(found, asked.axes or (), asked.comparison)
    if found.summary["composition"] == records.NEGATION:
        print(unlearning_tables.write(found.path, out))
        common.print_plots(lambda: frontier.write([found.path], out))
    else:
        print(table.write(found.path, out))
        common.print_plots(lambda: plot.write(found.path, out))
    common.print_plots(lambda: page.write(whole, file), "page")
    if tracker != NO_TRACKER:
        print(f"{tracker}: {tracking.track(found, out, tracker)} runs logged")


def _check_no_page(found: Results, asked: Config | None) -> None:
    for name in ("html", "axes", "comparison"):
        if getattr(asked, name, None):
            raise UsageError.build(
                f"--{name}", "a table of detoxified modules has no page", found=found.path,
                do="leave it out: table.md and table.csv are written",
            )  # fmt: skip


def _several(found: Sequence[Results], out: Path | None) -> None:
    """The mean over sweeps, searches and tables of detoxified modules; of strengths with a plot."""
    from pem_composition.report import detoxified, frontier, table, text, unlearning_tables

    paths = [one.path for one in found]
    kinds = {one.summary["composition"] for one in found}
    room = unlearning_tables if records.NEGATION in kinds else table
    if records.DETOXIFICATION in kinds:
        room = detoxified
    rows = room.aggregate(paths)
    markdown = room.aggregate_markdown(rows)
    print(markdown)
    if out is None:
        return
    text.write(out, markdown, rows, room.aggregate_columns(rows))
    if room is unlearning_tables and frontier.comparable(found):
        common.print_plots(lambda: frontier.write(paths, out))
    elif room is unlearning_tables:
        print("no plot: the sweeps differ in base model, judges, prompts, text or limits")
