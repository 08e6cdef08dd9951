"""Documents for a language model, one per row; of scored ones those above a threshold.

Texts with a high score for toxicity teach a module what is to be taken out of a model: such a
module exists to be subtracted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pem_composition.errors import DataError
from pem_composition.tasks import data
from pem_composition.tasks.files import Table
from pem_composition.tasks.glue import Reading, Task, get_task, is_number, plain
from pem_composition.tasks.polarity import LANGUAGE

SCORE_COLUMN = "toxicity"
THRESHOLD = 0.8  # a text with a higher score counts as toxic; Zhang et al. 2023, section 5.4
CIVIL_COMMENTS = Task(
    "civil_comments", ("text", None), (), hub=("google/civil_comments", None)
)  # on the hub: comments with a score from 0 to 1 for toxicity and its kinds


class ScoreFilter(NamedTuple):
    """Keeps the rows with ``row[column] > above``."""

    column: str = SCORE_COLUMN
    above: float = THRESHOLD

    def __str__(self) -> str:
        return f"{self.column} above {self.above:g}"

    def rows(self, table: Table) -> list[int]:
        """Numbers of the rows to keep; a row without a score is left out.

        Raises:
            DataError: no such column, a score that is no number, or no row above the threshold.
        """
        if self.column not in table.columns:
            raise DataError.build(
                table.name, "no score column", found=", ".join(table.columns),
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


def load_texts(
    task_name: str | None = None,
    *,
    chosen: ScoreFilter | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    data_dir: str | Path | None = None,
    splits: Collection[str] = (data.TRAIN, data.VALIDATION),
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    reading: Reading | None = None,
) -> data.TaskData:
    """The texts of a file's column ``text`` (or ``sentence``), of a task's, or of civil_comments.

    Args:
        reading: names another column.
        chosen: keep the rows above its threshold, in every split; a note says how many.
        max_train_samples: the first so many of the rows that are left.

    Raises:
        DataError: no such file, task or column; no text; no row above the threshold.
    """
    task = CIVIL_COMMENTS if is_scored(task_name) else get_task(task_name) if task_name else None
    given = {data.TRAIN: train_file, data.VALIDATION: validation_file, data.TEST: test_file}
    paths = {split: Path(path) for split, path in given.items() if path}
    tables = data.read_tables(task or LANGUAGE, paths, data_dir, splits)
    notes: list[str] = []
    rows = {}
    for split, table in tables.items():
        limit = max_train_samples if split == data.TRAIN else max_eval_samples
        rows[split] = _examples(table, task or LANGUAGE, chosen, reading, notes)[:limit]
    return data.TaskData(LANGUAGE, rows, {s: t.name for s, t in tables.items()}, tuple(notes))


def _examples(
    table: Table,
    task: Task,
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
