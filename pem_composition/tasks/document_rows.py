"""Documents for a language model, one per row; of scored ones those above a threshold.

Blocks: documents end with the tokenizer's end token, are joined in the order of the file and cut
into blocks of equal size; the rest that fills no block is left out. n blocks give n - 1 pairs, in
which block i is read and block i + 1 is written. (The reference joins per 1,000 rows and drops a
rest each time; here there is one rest.)

Texts with a high score for toxicity teach a module what is to be taken out of a model: such a
module exists to be subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

from pem_composition.errors import DataError
from pem_composition.tasks import data
from pem_composition.tasks.glue import Reading, Task, get_task, is_number, plain
from pem_composition.tasks.tables import Table

LANGUAGE = Task(
    "language", ("text", None), (), metrics=("loss", "perplexity"), primary="loss"
)  # what a domain's documents are learned as
SCORE_COLUMN = "toxicity"
THRESHOLD = 0.8  # a text with a higher score counts as toxic; Zhang et al. 2023, section 5.4
CIVIL_COMMENTS = Task(
    "civil_comments", ("text", None), (), hub=("google/civil_comments", None)
)  # on the hub: comments with a score from 0 to 1 for toxicity and its kinds


class ScoreFilter(NamedTuple):
    """Keeps the rows with ``row[column] > above``."""

    column: str = SCORE_COLUMN
    above: float = THRESHOLD

    @classmethod
    def of(cls, column: str | None, above: float | None) -> ScoreFilter:
        """The filter of two flags, with the defaults filled in."""
        return cls(column or SCORE_COLUMN, THRESHOLD if above is None else above)

    def __str__(self) -> str:
        return f"{self.column} above {self.above:g}"

    def rows(self, table: Table) -> list[int]:
        """Numbers of the rows to keep; a row without a score is left out.

        Raises:
            DataError: no such column, a score that is no number, or no row above the threshold.
        """
        if self.column not in table.columns:
            raise DataError.build(
                table.name, "no score column", found=table.shown,
                expected=self.column, do="name the column with --score_column",
            )  # fmt: skip
        scores = [self._score(table, index) for index in range(len(table.rows))]
        known = [score for score in scores if score is not None]
        kept = [i for i, score in enumerate(scores) if score is not None and score > self.above]
        if not kept:
            largest = f"{max(known):g} at most" if known else "no score at all"
            raise DataError.build(
                table.name, f"no row with {self}", found=f"{largest} in {len(scores)} rows",
                do="lower --score_above",
            )  # fmt: skip
        return kept

    def _score(self, table: Table, index: int) -> float | None:
        value: Any = table.rows[index][self.column]
        if value is None or value == "":
            return None
        if not is_number(value):
            raise DataError.build(
                table.where(index), f"column '{self.column}' is not a score",
                found=type(value).__name__, expected="a number",
            )  # fmt: skip
        return float(value)


def is_scored(task_name: str | None) -> bool:
    """True for the data set whose rows are toxic and ordinary comments mixed."""
    return task_name is not None and plain(task_name) == plain(CIVIL_COMMENTS.name)


def load_documents(
    task_name: str | None,
    files: data.RowFiles,
    *,
    chosen: ScoreFilter | None = None,
    reading: Reading | None = None,
    unnamed: Task | None = LANGUAGE,
) -> data.TaskData:
    """The texts of files, of a task without its labels, or of civil_comments, in their order.

    Blank ones are left out; a note says how many. Where rows of a task have two texts, the first is
    taken. Limits take the first of the rows that are left.

    Args:
        chosen: keep the rows above its threshold, in every split; a note says how many.
        reading: names another column.
        unnamed: whose columns a table of no task has: ``text`` or ``sentence``; None: any text.

    Raises:
        DataError: no such file, task or column; no text; no row above the threshold.
    """
    task = CIVIL_COMMENTS if is_scored(task_name) else get_task(task_name) if task_name else unnamed
    tables = {s: t for s, t in files.tables(task).items() if s in files.splits}
    notes: list[str] = []
    rows = {
        split: _examples(table, task, chosen, reading, notes)[: files.first(split)]
        for split, table in tables.items()
    }
    return data.TaskData(LANGUAGE, rows, {s: t.name for s, t in tables.items()}, tuple(notes))


def _examples(
    table: Table,
    task: Task | None,
    chosen: ScoreFilter | None,
    reading: Reading | None,
    notes: list[str],
) -> tuple[data.Example, ...]:
    texts: Sequence[str] = data.texts_of(table, task, reading)
    kept: Sequence[int] = range(len(texts)) if chosen is None else chosen.rows(table)
    if chosen is not None:
        notes.append(f"{table.name}: {len(kept)} of {len(texts)} rows with {chosen} kept")
    filled = [i for i in kept if texts[i].strip()]
    if not filled:
        raise DataError.build(table.name, "no text in any row")
    if len(filled) < len(kept):
        notes.append(f"{table.name}: {len(kept) - len(filled)} rows without text left out")
    return tuple(data.Example(texts[i], None, None, i) for i in filled)


def next_blocks(
    documents: Sequence[Sequence[int]], block_size: int
) -> list[tuple[list[int], list[int]]]:
    """Pairs of neighbouring blocks of the joined documents (token numbers, end tokens included).

    Raises:
        DataError: fewer than two blocks.
    """
    stream = list(chain.from_iterable(documents))
    count = len(stream) // block_size
    if count < 2:
        raise DataError.build(
            "--block_size", "the documents fill fewer than two blocks",
            found=f"{len(stream)} tokens", expected=f"at least {2 * block_size}",
            do="lower --block_size or give more text",
        )  # fmt: skip
    blocks = [stream[i * block_size : (i + 1) * block_size] for i in range(count)]
    return list(pairwise(blocks))
