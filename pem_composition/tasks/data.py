"""Rows of a task as checked examples: from files, a folder, the package index or the hub.

Labels become integers in GLUE order (floats for regression), whether the file has words or numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pem_composition import network, offline
from pem_composition.errors import DataError
from pem_composition.tasks.glue import (
    LABEL_COLUMNS,
    NOT_TEXT,
    Reading,
    Task,
    get_task,
    is_number,
    number_of,
    plain,
    reads_as_scores,
    text_columns,
    word_of,
)
from pem_composition.tasks.sampling import stratified_sample
from pem_composition.tasks.tables import FORMATS, PACKED, Table, read_table

TRAIN, VALIDATION, MISMATCHED, TEST = "train", "validation", "validation_mismatched", "test"
SPLIT_STEMS: dict[str, tuple[str, ...]] = {
    TRAIN: ("train", "training"),
    VALIDATION: ("dev", "validation", "valid", "val", "eval", "dev_matched", "validation_matched"),
    MISMATCHED: ("dev_mismatched", "validation_mismatched"),
    TEST: ("test", "test_matched"),
}
DATA_FILE = re.compile(
    rf"(?P<stem>[^.]+)\.({'|'.join(FORMATS)}|ndjson)(\.({'|'.join(PACKED)}))?", re.IGNORECASE
)
PROMPT_COLUMNS = ("prompt", "text")  # of beginnings of texts
FILE = "file"  # name of a task that is known from a file only
FLAGS = {TRAIN: "--train_file", VALIDATION: "--validation_file", TEST: "--test_file"}
LOCAL_REMEDY = (
    "give --train_file and --validation_file, or --data_dir with train and dev files "
    "(jsonl, csv, tsv or parquet)"
)


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its text or pair of texts, its label (None if unlabelled), and the row as read.

    The label of an instruction is its answer, a text; that of a row of several tasks the number of
    its task beside the label.
    """

    text: str
    text_pair: str | None
    label: int | float | str | tuple[int, int | float] | None
    row_id: int | str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class TaskData:
    """The examples of a task by split (train, validation, validation_mismatched, test)."""

    task: Task
    splits: Mapping[str, tuple[Example, ...]]
    sources: Mapping[str, str]  # split -> file or hub name
    notes: tuple[str, ...] = ()
    label_columns: Mapping[str, str | None] = field(default_factory=dict)  # by split

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


@dataclass(frozen=True, kw_only=True)
class RowFiles:
    """Where the rows of a task lie, and how many of them are taken.

    Attributes:
        train_file, validation_file, test_file: each wins over the same split of ``data_dir``. A
            file may be one of data by package name: ``toxic_comments/toxic.jsonl``.
        data_dir: a folder with train and dev files, a folder of such folders named after tasks, or
            a name that ``pem offline list`` shows.
        splits: the splits to read.
        max_train_samples, max_eval_samples, max_predict_samples: at most so many rows of the
            training rows, of others, of the test rows; None: all.
        seed: of the choice of labelled rows, which is stratified by label.
    """

    train_file: str | Path | None = None
    validation_file: str | Path | None = None
    test_file: str | Path | None = None
    data_dir: str | Path | None = None
    splits: Collection[str] = tuple(SPLIT_STEMS)
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    seed: int = 42

    def tables(self, task: Task | None) -> dict[str, Table]:
        """The tables of the splits; of a task known from its file only, always the first.

        Raises:
            DataError: no rows named, no such file or folder, or the hub out of reach.
        """
        named = {TRAIN: self.train_file, VALIDATION: self.validation_file, TEST: self.test_file}
        files, data_dir = {k: Path(v) for k, v in named.items() if v}, self.data_dir
        if data_dir is None and not files:
            if task is None:
                raise DataError.build("--task_name", "no task and no file", do=LOCAL_REMEDY)
            if task.offline is None and task.hub is None:
                raise DataError.build(
                    f"task {task.name}", "has no rows of its own", do=LOCAL_REMEDY
                )
            if task.offline is None:
                return _hub_tables(task, self.splits)
            data_dir = f"offline:{task.offline}"
        if data_dir is not None:
            files = find_split_files(offline.resolve(data_dir), task) | files
        order = [split for split in SPLIT_STEMS if split in files]
        wanted = [split for split in order if split in self.splits]
        if task is None and order[0] not in wanted:
            wanted.insert(0, order[0])
        return {split: read_table(offline.resolve(files[split])) for split in wanted}

    def first(self, split: str) -> int | None:
        """How many rows are taken where the first ones are, as of documents."""
        return self.max_train_samples if split == TRAIN else self.max_eval_samples


def load_task(
    task_name: str | None = None,
    files: RowFiles | None = None,
    *,
    labels: Sequence[str] | None = None,
    reading: Reading | None = None,
) -> TaskData:
    """Find, read and check the rows of a task.

    Without files the task's rows come by package name (rotten_tomatoes) or from the hub. Without
    ``task_name`` the task is what ``reading`` says of it, and for the rest what the training file
    shows (``infer_task``); a note says it.

    Args:
        labels: short for ``Reading(labels=labels)``.
        reading: columns, classes and regression, as far as they are known.

    Raises:
        DataError: unknown task; no such file or split; a malformed row; a missing column; an
            unknown label; words and numbers mixed; the hub out of reach.
    """
    task = get_task(task_name) if task_name is not None else None
    files = files or RowFiles()
    tables = files.tables(task)
    reading = reading or Reading(labels=tuple(labels or ()))
    reading.check()
    notes: list[str] = []
    if task is None:
        table = tables[TRAIN if TRAIN in tables else next(iter(tables))]
        task = infer_task(table, reading)
        notes.append(_inferred(task, table, reading))
    else:
        _check_known(task, reading)
    if guessed := _guessed_order(task, reading, named=task_name is not None):
        notes.append(guessed)
    limits = {TRAIN: files.max_train_samples, TEST: files.max_predict_samples}
    out = {}
    for split in [s for s in SPLIT_STEMS if s in tables and s in files.splits]:
        examples = _examples(task, tables[split], split, reading, notes)
        most = limits.get(split, files.max_eval_samples)
        out[split] = limit(examples, most, task, files.seed)
    columns = {s: _label_column(tables[s], reading, needed=False) for s in out}
    return TaskData(task, out, {s: tables[s].name for s in out}, tuple(notes), columns)


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
            expected="train.jsonl, dev.jsonl or the like (csv, tsv, parquet; .gz .bz2 .xz .zip)",
        )  # fmt: skip
    return found


def _split_of(stem: str) -> str | None:
    return next((split for split, stems in SPLIT_STEMS.items() if stem in stems), None)


def _hub_tables(task: Task, splits: Collection[str]) -> dict[str, Table]:
    """The task's splits from the hub, or from the cache that ``datasets`` keeps of it."""
    from datasets import disable_progress_bars, load_dataset

    assert task.hub is not None
    path, config = task.hub
    disable_progress_bars()
    try:
        with network.session():
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


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a table's column ``prompt`` or ``text``, or ``{"prompt": {"text": ...}}``.

    Raises:
        DataError: no rows, no such column, or a cell that holds no text.
    """
    table = read_table(path)
    column = table.column(PROMPT_COLUMNS, "prompts")
    prompts = []
    for index, row in enumerate(table.rows):
        cell = row[column]
        text = cell.get("text") if isinstance(cell, dict) else cell
        if not isinstance(text, str):
            raise DataError.build(
                table.where(index), f"column '{column}' holds no prompt",
                found=type(cell).__name__, expected='a text, or {"text": ...}',
            )  # fmt: skip
        prompts.append(text)
    return prompts


def infer_task(table: Table, reading: Reading | None = None) -> Task:
    """The task of a file: what ``reading`` says of it, the rest read off the table.

    Columns go by their usual names. Labels are scores as ``reads_as_scores`` says; otherwise their
    words are the classes, sorted.

    Raises:
        DataError: no text column, no label column, fewer than two classes, several labels in one
            cell, or scores and words mixed.
    """
    reading = reading or Reading()
    columns = _columns(table, None, reading)
    labels = _classes(table, reading)
    if labels:
        return Task(FILE, columns, labels)
    return Task(FILE, columns, (), metrics=("pearson", "spearmanr"), primary="pearson")


def _classes(table: Table, reading: Reading) -> tuple[str, ...]:
    """The class names of a table of no known task; none for a regression."""
    if reading.labels or reading.regression:
        return reading.labels
    own = reading.own if reading.regression is None else None
    if own == () or (own and not _are_numbered(own)):
        return own
    known = own is not None and _label_column(table, reading, needed=False) is None
    values = [] if known else _present(table, _label_column(table, reading))
    if own and all(_is_class(own, value) for value in values):
        return own
    if reading.regression is None and reads_as_scores(values):
        _check_scores(table, _label_column(table, reading))
        return ()
    words = {word_of(value) for value in values}
    numbers = {word for word in words if is_number(word)}
    if numbers and numbers <= {str(i) for i in range(len(words - numbers))}:
        _one_convention(table, _cells(table, _label_column(table, reading)))
    if len(words) < 2:
        raise DataError.build(
            table.name, "not a classification task",
            found=f"labels {', '.join(sorted(words)) or 'none'}",
            expected="at least two different labels", do="name all classes: --labels A B",
        )  # fmt: skip
    return tuple(sorted(words, key=_class_order))


def _class_order(word: str) -> tuple[bool, float, str]:
    """Numbers first, by their value; then words."""
    number = number_of(word)
    return number is None, number or 0.0, word


def _are_numbered(labels: Sequence[str]) -> bool:
    """True for LABEL_0, LABEL_1, ..., which transformers gives where nobody names the classes."""
    return all(word.upper() == f"LABEL_{i}" for i, word in enumerate(labels))


def _guessed_order(task: Task, reading: Reading, *, named: bool) -> str:
    """What to say where a head numbers its classes and rows call them by words: their order is a
    guess, and a wrong one gives wrong scores; empty elsewhere.
    """
    own = reading.own or ()
    words = [word for word in task.labels if not is_number(word)]
    known = reading.labels or task.labels == own or not _are_numbered(own)
    if known or not words or len(own) != len(task.labels):
        return ""
    taken = ", ".join(f"{i} for {word}" for i, word in enumerate(task.labels[:10]))
    remedy = "leave --task_name out, name the file and add --labels" if named else "add --labels"
    return (
        f"the head numbers its classes: output {taken}{', ...' if len(own) > 10 else ''}; if its "
        f"outputs have another order, {remedy} in that order"
    )


def _is_class(labels: tuple[str, ...], value: Any) -> bool:
    try:
        Task(FILE, ("text", None), labels).label_id(value)
    except DataError:
        return False
    return True


def _present(table: Table, column: str | None) -> list[Any]:
    """The labels that are there."""
    return [value for value in _cells(table, column) if value not in (None, "")]


def _cells(table: Table, column: str | None) -> list[Any]:
    """The column of the labels.

    Raises:
        DataError: a cell with several labels.
    """
    values = [row.get(column) for row in table.rows]
    values = [None if isinstance(v, float) and math.isnan(v) else v for v in values]  # of the hub
    for index, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise DataError.build(
                table.where(index), "several labels in one row (multi-label classification)",
                found=_shown(value), expected="one class or one score per row",
            )  # fmt: skip
    return values


def _check_scores(table: Table, column: str | None) -> None:
    """Every label of a column of scores is a number; another one is a mistake or makes classes."""
    for index, row in enumerate(table.rows):
        if row[column] not in (None, "") and not is_number(row[column]):
            raise DataError.build(
                table.where(index), "labels are scores in some rows and words in others",
                found=_shown(row[column]), expected="a number",
                do="correct the row, or add --do_regression false for classes",
            )  # fmt: skip


def _inferred(task: Task, table: Table, reading: Reading) -> str:
    """What was read off a table, or taken from a model, in one line."""
    texts = " and ".join(c for c in task.text_columns if c)
    column = _label_column(table, reading, needed=False)
    said = reading.labels or reading.regression is not None
    source = "as given" if said else "of the model" if reading.own is not None else "from the rows"
    if reading.own is not None and not said and task.labels != reading.own:
        source = "from the rows"
    if task.regression:
        what = f"scores (regression), {source}"
        what += "; --do_regression false for classes" if source == "from the rows" else ""
    else:
        named = [word if word.strip() == word and word else repr(word) for word in task.labels]
        more = f", ... {named[-1]}" if len(named) > 10 else ""
        what = f"{len(named)} classes {source}: {', '.join(named[:10])}{more}"
    return (
        f"{table.name}: text in {texts}; {f'label in {column}' if column else 'no label'}; {what}"
    )


def _check_known(task: Task, reading: Reading) -> None:
    """A task that is known by name has its own classes.

    Raises:
        DataError: the user says others.
    """
    if reading.labels and reading.labels != task.labels:
        raise DataError.build(
            "--labels", f"{task.name} has its own labels", found=" ".join(reading.labels),
            expected=" ".join(task.labels) or "none, for it is a regression",
            do="leave --labels or --task_name out",
        )  # fmt: skip
    if reading.regression is not None and reading.regression != task.regression:
        raise DataError.build(
            "--do_regression", f"{task.name} has {'scores' if task.regression else 'classes'}",
            found=str(reading.regression).lower(), do="leave --do_regression or --task_name out",
        )  # fmt: skip
    pair = task.text_columns[1] is not None
    if reading.text_columns and (len(reading.text_columns) == 2) != pair:
        raise DataError.build(
            "--text_column_names", f"{task.name} has {'two texts' if pair else 'one text'} per row",
            found=" ".join(reading.text_columns), expected="two columns" if pair else "one column",
        )  # fmt: skip


def check_labelled(task: Task, labels: Sequence[int | float | None]) -> None:
    """Refuse rows that cannot be scored.

    Raises:
        DataError: a row without a label (a test set whose labels are not published).
    """
    if missing := sum(label is None for label in labels):
        raise DataError.build(
            task.name, "cannot score unlabelled rows", found=f"{missing} without a label",
            do="give labelled rows; pem evaluate --do_predict writes predictions",
        )  # fmt: skip


def _columns(table: Table, task: Task | None, reading: Reading) -> tuple[str, str | None]:
    """The text columns: those that were named, else the usual ones."""
    keys = table.columns
    for name in reading.text_columns:
        _check_column(table, "--text_column_names", name)
    if reading.text_columns:
        first, *second = reading.text_columns
        return first, second[0] if second else None
    labels = {*LABEL_COLUMNS, reading.label_column}
    other = [k for k in keys if k not in NOT_TEXT and k not in labels]
    text_like = [k for k in other if task is None and _is_text(table, k)]
    columns = text_columns([k for k in keys if k != reading.label_column], task, text_like)
    if columns is None:
        expected = task.text_columns if task else ("sentence1", "sentence2")
        raise DataError.build(
            table.name, "no text column", found=table.shown,
            expected=" and ".join(c for c in expected if c), do="name it with --text_column_names",
        )  # fmt: skip
    return columns


def _check_column(table: Table, flag: str, name: str) -> None:
    if name not in table.columns:
        raise DataError.build(
            f"{flag} {name}", f"no such column in {table.name}", found=table.shown,
            expected="the name of a column",
        )  # fmt: skip


def _is_text(table: Table, key: str) -> bool:
    values = [row[key] for row in table.rows]
    return all(isinstance(v, str) for v in values) and not all(is_number(v) for v in values)


def _label_column(table: Table, reading: Reading, *, needed: bool = True) -> str | None:
    """The column of the labels, by its name or a usual one.

    Raises:
        DataError: there is none, and it is needed.
    """
    names = LABEL_COLUMNS if reading.label_column is None else (reading.label_column,)
    free = [name for name in names if name not in reading.text_columns]
    found = next((name for name in free if name in table.columns), None)
    if found is None and needed:
        if reading.label_column is not None:
            _check_column(table, "--label_column_name", reading.label_column)
        raise DataError.build(
            table.name, "no label column", found=table.shown,
            expected=LABEL_COLUMNS[0], do="name it with --label_column_name",
        )  # fmt: skip
    return found


def _examples(
    task: Task, table: Table, split: str, reading: Reading, notes: list[str]
) -> tuple[Example, ...]:
    """Checked examples of one table."""
    first, second = _columns(table, task, reading)
    labels = _labels(task, table, split, reading)
    out = []
    for index, row in enumerate(table.rows):
        if labels[index] is None and split != TEST:
            continue
        pair = None if second is None else _text(table, index, second)
        row_id = row.get("row_id", index)
        out.append(Example(_text(table, index, first), pair, labels[index], row_id, row))
    if task.name == FILE and (first, second) != task.text_columns:
        notes.append(f"{table.name}: text in {' and '.join(c for c in (first, second) if c)}")
    if len(out) < len(table.rows):
        missing = len(table.rows) - len(out)
        notes.append(f"{table.name}: {missing} rows without a gold label left out")
    if not out:
        raise DataError.build(table.name, "no labelled rows", expected="at least one")
    return tuple(out)


def texts_of(table: Table, task: Task | None, reading: Reading | None = None) -> list[str]:
    """The first text of every row, labels or not.

    Raises:
        DataError: the table has no text column, or a cell of it holds no text.
    """
    column, _ = _columns(table, task, reading or Reading())
    return [_text(table, index, column) for index in range(len(table.rows))]


def _text(table: Table, index: int, column: str) -> str:
    value = table.rows[index][column]
    if not isinstance(value, str):
        raise DataError.build(
            table.where(index), f"column '{column}' is not text", found=_shown(value),
            expected="a string",
        )  # fmt: skip
    return value


def _labels(task: Task, table: Table, split: str, reading: Reading) -> list[int | float | None]:
    """One label per row, None where the publisher hides it."""
    column = _label_column(table, reading, needed=split != TEST)
    if column is None:
        return [None] * len(table.rows)
    values = _cells(table, column)
    values_too = task.hub is None and (task.regression or "-1" in task.labels)
    absent = {"", *(() if values_too else ("-1", "-1.0"))} if split == TEST else set()
    hidden = absent.union(map(str, task.unlabelled))
    gold = [None if v is None or word_of(v) in hidden else v for v in values]
    if not any(map(is_number, task.labels or ("0",))):
        _one_convention(table, gold)
    out: list[int | float | None] = []
    for index, (value, raw) in enumerate(zip(gold, values, strict=True)):
        if value is None and (split == TEST or word_of(raw) in hidden):
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
            return task.label_id(value)
        except DataError:
            pass
    named = task.name == FILE and not task.regression
    raise DataError.build(
        table.where(index), "unknown label", found=_shown(value), expected=task.accepted(),
        do="if the file has other classes, name them all: --labels A B" if named else "",
    )  # fmt: skip


def _one_convention(table: Table, values: Sequence[Any]) -> None:
    """Words or indices, not both: a mixture comes from two sources joined by mistake."""
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


def _shown(value: Any) -> str:
    text = "nothing" if value is None or value == "" else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
