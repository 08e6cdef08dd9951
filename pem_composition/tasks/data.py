"""Rows of a task as checked examples: from files, a folder, the package index or the hub.

Labels become integers in GLUE order (floats for regression), whether the file has words or numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError
from pem_composition.tasks import hub
from pem_composition.tasks.files import FORMATS, Table, read_rows, read_table
from pem_composition.tasks.glue import (
    LABEL_COLUMNS,
    NOT_TEXT,
    Task,
    get_task,
    is_number,
    number_of,
    plain,
    text_columns,
)
from pem_composition.tasks.sampling import stratified_sample

__all__ = ["Example", "TaskData", "load_task", "read_rows", "read_table"]

TRAIN, VALIDATION, MISMATCHED, TEST = "train", "validation", "validation_mismatched", "test"
SPLIT_STEMS: dict[str, tuple[str, ...]] = {
    TRAIN: ("train", "training"),
    VALIDATION: ("dev", "validation", "valid", "val", "eval", "dev_matched", "validation_matched"),
    MISMATCHED: ("dev_mismatched", "validation_mismatched"),
    TEST: ("test", "test_matched"),
}
DATA_FILE = re.compile(rf"(?P<stem>[^.]+)\.({'|'.join(FORMATS)}|ndjson)(\.gz)?", re.IGNORECASE)
FLAGS = {TRAIN: "--train_file", VALIDATION: "--validation_file", TEST: "--test_file"}
LOCAL_REMEDY = (
    "give --train_file and --validation_file, or --data_dir with train and dev files "
    "(jsonl, csv, tsv or parquet)"
)


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its text or pair of texts, its label (None if unlabelled), and the row as read.

    The label of an instruction is its answer, a text.
    """

    text: str
    text_pair: str | None
    label: int | float | str | None
    row_id: int | str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class TaskData:
    """The examples of a task by split (train, validation, validation_mismatched, test)."""

    task: Task
    splits: Mapping[str, tuple[Example, ...]]
    sources: Mapping[str, str]  # split -> file or hub name
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> tuple[Example, ...]:
        """Training examples; see ``require``."""
        return self.require(TRAIN)

    @property
    def validation(self) -> tuple[Example, ...]:
        """Validation examples (MNLI: matched); see ``require``."""
        return self.require(VALIDATION)

    @property
    def test(self) -> tuple[Example, ...]:
        """Test examples, whose labels may be None; see ``require``."""
        return self.require(TEST)

    def require(self, split: str) -> tuple[Example, ...]:
        """The examples of a split.

        Raises:
            DataError: the split was not given; the flag that gives it is named.
        """
        if split not in self.splits:
            do = f"give {FLAGS.get(split, '--data_dir')}"
            if split == VALIDATION and not self.task.validation_splits:
                do += ", or carve it out of the training rows: pem split --validation_size N"
            raise DataError.build(
                self.task.name, f"no {split} rows", found=", ".join(self.splits) or "no split",
                do=do,
            )  # fmt: skip
        return self.splits[split]


def load_task(
    task_name: str | None = None,
    *,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    data_dir: str | Path | None = None,
    labels: Sequence[str] | None = None,
    splits: Collection[str] = tuple(SPLIT_STEMS),
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    max_predict_samples: int | None = None,
    seed: int = 42,
) -> TaskData:
    """Find, read and check the rows of a task.

    A file flag wins over the same split of ``data_dir``; with neither, the task's rows come by
    package name (rotten_tomatoes) or from the hub. Without ``task_name`` the task is read off the
    training file: columns by their usual names, labels sorted, regression if they are floats.

    Args:
        data_dir: a folder with train and dev files, a folder of such folders named after tasks, or
            a name that ``pem offline list`` shows.
        labels: class names in the order of the output units, for a task known from its file only.
        splits: the splits to read.
        max_train_samples: at most so many rows, stratified by label and in the order of the file.

    Raises:
        DataError: unknown task; no such file or split; a malformed row; a missing column; an
            unknown label; words and numbers mixed; the hub out of reach.
    """
    task = get_task(task_name) if task_name is not None else None
    files = {TRAIN: train_file, VALIDATION: validation_file, TEST: test_file}
    tables = read_tables(task, {k: Path(v) for k, v in files.items() if v}, data_dir, splits)
    notes: list[str] = []
    if task is None:
        task = infer_task(tables[TRAIN if TRAIN in tables else next(iter(tables))], labels)
    elif labels and tuple(labels) != task.labels:
        raise DataError.build(
            "--labels", f"{task.name} has its own labels", found=" ".join(labels),
            expected=" ".join(task.labels),
        )  # fmt: skip
    limits = {TRAIN: max_train_samples, TEST: max_predict_samples}
    out = {}
    for split in [s for s in SPLIT_STEMS if s in tables and s in splits]:
        examples = _examples(task, tables[split], split, notes)
        out[split] = limit(examples, limits.get(split, max_eval_samples), task, seed)
    return TaskData(task, out, {s: tables[s].name for s in out}, tuple(notes))


def limit(
    examples: Sequence[Example], size: int | None, task: Task, seed: int
) -> tuple[Example, ...]:
    """At most ``size`` examples, stratified by label, in their original order.

    Raises:
        DataError: ``size`` is not positive.
    """
    if size is not None and size < 1:
        raise DataError.build("--max_*_samples", "too few rows", found=size, expected="at least 1")
    if size is None or size >= len(examples):
        return tuple(examples)
    labels = [0 if e.label is None else e.label for e in examples]
    chosen = stratified_sample(labels, size, seed=seed, regression=task.regression)
    return tuple(examples[i] for i in chosen)


def find_split_files(folder: str | Path, task: Task | None = None) -> dict[str, Path]:
    """Data files of a folder by split; a sub-folder named after the task is entered.

    Raises:
        DataError: no such folder, no data file in it, or two files for one split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        do = "give a file as --train_file" if folder.exists() else ""
        raise DataError.build("--data_dir", str(folder), found=what, expected="a folder", do=do)
    if task is not None:
        named = [
            p for p in sorted(folder.iterdir()) if p.is_dir() and plain(p.name) == plain(task.name)
        ]
        folder = next((p for p in named), folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = DATA_FILE.fullmatch(path.name)
        split = match and _split_of(match["stem"].lower())
        if not split or not path.is_file():
            continue
        if split in found:
            raise DataError.build(
                folder, f"two files for {split}", found=f"{found[split].name} and {path.name}",
                do=f"name one with {FLAGS.get(split, '--validation_file')}",
            )  # fmt: skip
        found[split] = path
    if not found:
        names = ", ".join(p.name for p in sorted(folder.iterdir())[:8]) or "an empty folder"
        subject = f"for task {task.name}" if task else "(give --task_name for a folder of tasks)"
        raise DataError.build(
            folder, f"no data files {subject}", found=names,
            expected="train.jsonl, dev.jsonl or the like (csv, tsv, parquet; .gz)",
        )  # fmt: skip
    return found


def _split_of(stem: str) -> str | None:
    return next((split for split, stems in SPLIT_STEMS.items() if stem in stems), None)


def read_tables(
    task: Task | None,
    files: dict[str, Path],
    data_dir: str | Path | None,
    splits: Collection[str],
) -> dict[str, Table]:
    """The tables of the splits asked for; of a task known from its file only, always the first.

    A file may be one of data by package name: ``toxic_comments/toxic.jsonl``.

    Raises:
        DataError: no rows named, no such file or folder, or the hub out of reach.
    """
    if data_dir is None and not files:
        if task is None:
            raise DataError.build("--task_name", "no task and no file", do=LOCAL_REMEDY)
        if task.offline is None and task.hub is None:
            raise DataError.build(f"task {task.name}", "has no rows of its own", do=LOCAL_REMEDY)
        if task.offline is None:
            return _hub_tables(task, splits)
        data_dir = f"offline:{task.offline}"
    if data_dir is not None:
        files = find_split_files(_folder(data_dir), task) | files
    order = [split for split in SPLIT_STEMS if split in files]
    wanted = [split for split in order if split in splits]
    if task is None and order[0] not in wanted:
        wanted.insert(0, order[0])
    return {split: read_table(_file(files[split])) for split in wanted}


def _file(path: Path) -> str:
    from pem_composition import offline

    return offline.resolve(str(path))


def _folder(data_dir: str | Path) -> Path:
    """A folder, or the cache folder of data by package name (NAME or ``offline:NAME``)."""
    from pem_composition import offline

    scheme, _, name = str(data_dir).partition(":")
    return Path(offline.get(name) if scheme == "offline" else offline.resolve(str(data_dir)))


def _hub_tables(task: Task, splits: Collection[str]) -> dict[str, Table]:
    """The task's splits from the hub, or from the cache that ``datasets`` keeps of it."""
    assert task.hub is not None
    path, config = task.hub
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with hub.session():
            dataset = load_dataset(path, config)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError.build(
            f"--task_name {task.name}", f"data set {path} cannot be loaded from the hub ({reason})",
            do=LOCAL_REMEDY,
        ) from None  # fmt: skip
    names = dict(zip((VALIDATION, MISMATCHED), task.validation_splits, strict=False))
    names |= {TRAIN: "train", TEST: "test" if "test" in dataset else "test_matched"}
    return {
        split: Table(f"{path} {names[split]}", dataset[names[split]].to_list(),
                     range(len(dataset[names[split]])), "row")
        for split in SPLIT_STEMS
        if split in splits and names.get(split) in dataset
    }  # fmt: skip


def infer_task(table: Table, labels: Sequence[str] | None = None) -> Task:
    """The task of a file: usual column names, labels sorted, regression if labels are floats.

    Raises:
        DataError: no text column, no label column, or fewer than two classes.
    """
    columns = _columns(table, None)
    values = [row[_label_column(table)] for row in table.rows]
    if labels is None and any(_is_fraction(v) for v in values):
        scores = ("pearson", "spearmanr")
        return Task("file", columns, (), metrics=scores, primary="pearson")
    if labels is None:
        _one_convention(table, values)
        words = {_plain_number(v) for v in values if v not in (None, "")}
        labels = sorted(words, key=lambda w: (0, int(w), w) if is_number(w) else (1, 0, w))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError.build(
            table.name, "not a classification task", found=f"labels {', '.join(labels) or 'none'}",
            expected="at least two different labels",
            do="give --task_name, or --labels in pem split",
        )  # fmt: skip
    return Task("file", columns, tuple(labels))


def _columns(table: Table, task: Task | None) -> tuple[str, str | None]:
    keys = table.columns
    other = [k for k in keys if k not in NOT_TEXT and k not in LABEL_COLUMNS]
    text_like = [k for k in other if task is None and _is_text(table, k)]
    columns = text_columns(keys, task, text_like)
    if columns is None:
        expected = task.text_columns if task else ("sentence1", "sentence2")
        raise DataError.build(
            table.name, "no text column", found=", ".join(keys),
            expected=" and ".join(c for c in expected if c), do="rename the columns",
        )  # fmt: skip
    return columns


def _is_text(table: Table, key: str) -> bool:
    values = [row[key] for row in table.rows]
    return all(isinstance(v, str) for v in values) and not all(is_number(v) for v in values)


def _label_column(table: Table) -> str:
    for name in LABEL_COLUMNS:
        if name in table.columns:
            return name
    raise DataError.build(
        table.name, "no label column", found=", ".join(table.columns), expected=LABEL_COLUMNS[0]
    )


def _examples(task: Task, table: Table, split: str, notes: list[str]) -> tuple[Example, ...]:
    """Checked examples of one table."""
    first, second = _columns(table, task)
    labels = _labels(task, table, split)
    out = []
    for index, row in enumerate(table.rows):
        if labels[index] is None and split != TEST:
            continue
        pair = None if second is None else _text(table, index, second)
        row_id = row.get("row_id", index)
        out.append(Example(_text(table, index, first), pair, labels[index], row_id, row))
    if len(out) < len(table.rows):
        missing = len(table.rows) - len(out)
        notes.append(f"{table.name}: {missing} rows without a gold label left out")
    if not out:
        raise DataError.build(table.name, "no labelled rows", expected="at least one")
    return tuple(out)


def texts_of(table: Table, task: Task | None) -> list[str]:
    """The first text of every row, labels or not.

    Raises:
        DataError: the table has no text column, or a cell of it holds no text.
    """
    column, _ = _columns(table, task)
    return [_text(table, index, column) for index in range(len(table.rows))]


def _text(table: Table, index: int, column: str) -> str:
    value = table.rows[index][column]
    if not isinstance(value, str):
        raise DataError.build(
            table.where(index), f"column '{column}' is not text", found=_shown(value),
            expected="a string",
        )  # fmt: skip
    return value


def _labels(task: Task, table: Table, split: str) -> list[int | float | None]:
    """One label per row, None where the publisher hides it."""
    if split == TEST and not any(name in table.columns for name in LABEL_COLUMNS):
        return [None] * len(table.rows)
    column = _label_column(table)
    values = [row[column] for row in table.rows]
    values_too = task.hub is None and (task.regression or "-1" in task.labels)
    absent = {"", *(() if values_too else ("-1", "-1.0"))} if split == TEST else set()
    hidden = absent.union(map(str, task.unlabelled))
    gold = [None if v is None or str(v) in hidden else v for v in values]
    if not task.regression:
        _one_convention(table, gold)
    out: list[int | float | None] = []
    for index, (value, raw) in enumerate(zip(gold, values, strict=True)):
        if value is None and (split == TEST or str(raw) in hidden):
            out.append(None)
        else:
            out.append(_label(task, table, index, value))
    return out


def _label(task: Task, table: Table, index: int, value: Any) -> int | float:
    if task.regression:
        number = number_of(value)
        if number is not None:
            return number
    elif value is not None:
        try:
            return task.label_id(_plain_number(value))
        except DataError:
            pass
    raise DataError.build(
        table.where(index), "unknown label", found=_shown(value), expected=task.accepted()
    )


def _one_convention(table: Table, values: Sequence[Any]) -> None:
    """Words or numbers, not both: a mixture comes from two sources joined by mistake."""
    first: dict[bool, int] = {}
    for index, value in enumerate(values):
        if value is None or value == "":
            continue
        first.setdefault(is_number(value), index)
    if len(first) == 2:
        word, number = first[False], first[True]
        raise DataError.build(
            table.where(max(word, number)), "labels are words in some rows and numbers in others",
            found=f"{_shown(values[word])} in {table.unit} {table.lines[word]} and "
            f"{_shown(values[number])} in {table.unit} {table.lines[number]}",
            expected="one convention in a file",
        )  # fmt: skip


def _is_fraction(value: Any) -> bool:
    """True for a score: a JSON float or a CSV cell with a decimal point."""
    return is_number(value) and (isinstance(value, float) or "." in str(value))


def _plain_number(value: Any) -> str:
    """A label as a word; 1, 1.0 and "1" are the same class."""
    number = number_of(value)
    return str(int(number)) if number is not None and number == int(number) else str(value)


def _shown(value: Any) -> str:
    text = "nothing" if value is None or value == "" else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
