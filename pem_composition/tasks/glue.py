"""Classification and regression tasks as data: columns, labels in GLUE order, metrics, hub names.

The order of ``labels`` is the order of the output units, so it is part of a module's meaning: a
head trained elsewhere on the same task names the same classes. No files are read here.

A class name is a word: the text that stands in the file (``word_of``), so that 1, 1.0, 01 and 1e0
are four classes. A decimal number (``number_of``) is an index of a class only where no class of the
task is itself called by a number. ``reads_as_scores`` says when a column of labels is numeric.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pem_composition.errors import DataError, nearest

# Pairs first: a table with sentence1, sentence2 and a column named text is a pair task.
TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),  # MRPC as distributed
    ("text", "text_pair"),
    ("sentence", None),
    ("text", None),
)
# `is_duplicate`, `Quality`, `score` and `gold_label` are the names in the distributed GLUE files.
LABEL_COLUMNS = ("label", "labels", "gold_label", "is_duplicate", "Quality", "score")
# The last are the names of rows that pandas writes into Parquet and CSV.
NOT_TEXT = frozenset({"idx", "index", "id", "guid", "row_id", "__index_level_0__", "Unnamed: 0"})

ENTAILMENT_3 = ("entailment", "neutral", "contradiction")
ACCURACY_F1 = ("accuracy", "f1")
SENTIMENT = ("negative", "positive")
# ASCII digits only: Python also reads "1_2" and digits of other scripts as numbers.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class WrittenFloat(float):
    """A number that remembers how the file writes it: 1e5 is not 100000.0."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass(frozen=True)
class Task:
    """One task: what goes in, which answers there are, how it is scored.

    Attributes:
        text_columns: the first and the second text (None for single sentences).
        labels: class names in the order of the output units; empty for regression.
        metrics: names of the published metrics; ``primary`` is the one that selects and is plotted.
        hub: (data set, configuration) on the hub, None for a task known from a file only.
        validation_splits: names of the validation splits on the hub, the reported one first;
            empty where the publisher has none.
        unlabelled: values by which the publisher marks rows without a gold label; such rows are
            left out of train and validation.
        offline: name of the rows in the package index, see ``pem offline list``.
    """

    name: str
    text_columns: tuple[str, str | None]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    primary: str = "accuracy"
    hub: tuple[str, str | None] | None = None
    validation_splits: tuple[str, ...] = ("validation",)
    unlabelled: tuple[str | int, ...] = ()
    offline: str | None = None

    @property
    def regression(self) -> bool:
        """True if the answer is a number and not a class."""
        return not self.labels

    @property
    def scores(self) -> tuple[str, ...]:
        """The metrics that an evaluation gives: the published ones, and macro F1 of more than two
        classes."""
        several = len(self.labels) > 2 and "f1_macro" not in self.metrics
        return (*self.metrics, "f1_macro") if several else self.metrics

    @property
    def num_labels(self) -> int:
        """Output units: one per class, one for regression."""
        return len(self.labels) or 1

    @property
    def problem_type(self) -> str:
        """The name by which Hugging Face models choose their loss."""
        return "regression" if self.regression else "single_label_classification"

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by output unit, as model configurations keep them; empty for regression."""
        return dict(enumerate(self.labels))

    @property
    def _called_by_numbers(self) -> bool:
        """True where a number can be the name of a class, so that it cannot be its index."""
        return any(map(is_number, self.labels))

    def label_id(self, value: Any) -> int:
        """Index of a class given by its word, or by its index where no class is called by a number.

        Raises:
            DataError: the task has no such class.
        """
        word = word_of(value)
        if word in self.labels:
            return self.labels.index(word)
        number = None if self._called_by_numbers else number_of(value)
        if number is not None and number.is_integer() and 0 <= number < len(self.labels):
            return int(number)
        raise DataError.build(
            self.name, "no such class", found=repr(word), expected=self.accepted()
        )

    def accepted(self) -> str:
        """The labels that a row may hold, for messages."""
        if self.regression:
            return "a number"
        if self._called_by_numbers:
            return "one of " + ", ".join(self.labels)
        return "one of " + ", ".join(f"{word} ({i})" for i, word in enumerate(self.labels))


@dataclass(frozen=True)
class Reading:
    """What is known of a table before it is read; whatever is left open is read off the table.

    Attributes:
        text_columns: one or two columns of text.
        label_column: the column of the labels.
        labels: class names in the order of the output units, as the user gives them.
        regression: whether labels are scores, as the user says it.
        own: the classes that the scored module or model brings; empty for a regression, None where
            it says nothing.
    """

    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    labels: tuple[str, ...] = ()
    regression: bool | None = None
    own: tuple[str, ...] | None = None

    def check(self) -> None:
        """Refuse what no table can satisfy.

        Raises:
            DataError: more than two texts, a column that is text and label, classes of scores, one
                class or one class twice.
        """
        if len(self.text_columns) > 2 or len(set(self.text_columns)) < len(self.text_columns):
            raise DataError.build(
                "--text_column_names", "names the columns of one text or of a pair",
                found=" ".join(self.text_columns), expected="one or two columns",
            )  # fmt: skip
        if self.label_column in self.text_columns:
            raise DataError.build(
                "--label_column_name", "is also a column of text", found=self.label_column,
                expected="another column",
            )  # fmt: skip
        if self.labels and self.regression:
            raise DataError.build(
                "--labels", "contradicts --do_regression true", do="give one of the two"
            )
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise DataError.build(
                "--labels", "not the classes of a task", found=" ".join(self.labels),
                expected="at least two different names",
            )  # fmt: skip


def is_number(value: Any) -> bool:
    """True for a number or a string that is written as a finite decimal one."""
    return number_of(value) is not None


def number_of(value: Any) -> float | None:
    """The finite decimal number that a cell holds, None if it holds anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return number if math.isfinite(number) else None


def word_of(value: Any) -> str:
    """What the file writes for a cell: the text itself, or JSON's spelling of anything else."""
    if isinstance(value, WrittenFloat):
        return value.text
    return json.dumps(value) if isinstance(value, (bool, int, float)) else str(value)


def reads_as_scores(values: Sequence[Any]) -> bool:
    """True if labels are scores: one of them, at least, is a number that is not whole.

    So 0.5 makes a regression, and 1, 1.0, 1e5, 01 do not: they are names of classes.
    """
    numbers = (number_of(value) for value in values)
    return any(number is not None and not number.is_integer() for number in numbers)


# Primary metrics follow the LoRA and RoBERTa papers: Matthews for CoLA, Pearson for STS-B, accuracy
# for the rest; GLUE's leaderboard averages the two metrics of MRPC, QQP and STS-B.
GLUE = (
    Task(
        "cola", ("sentence", None), ("unacceptable", "acceptable"),
        metrics=("matthews_correlation",), primary="matthews_correlation",
    ),
    Task("sst2", ("sentence", None), SENTIMENT),
    Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ACCURACY_F1),
    Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ACCURACY_F1),
    Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearmanr"), primary="pearson"),
    Task(
        "mnli", ("premise", "hypothesis"), ENTAILMENT_3,
        validation_splits=("validation_matched", "validation_mismatched"),
    ),
    Task("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    Task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
)  # fmt: skip
TEXT = ("text", None)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(replace(task, hub=("nyu-mll/glue", task.name)) for task in GLUE),
        Task(
            "snli", ("premise", "hypothesis"), ENTAILMENT_3,
            hub=("stanfordnlp/snli", None), unlabelled=("-", -1),
        ),
        # Domains: rows that install by package name; two are on the hub, with no validation split.
        Task(
            "rotten_tomatoes", TEXT, SENTIMENT,
            hub=("cornell-movie-review-data/rotten_tomatoes", None), offline="rotten_tomatoes",
        ),
        Task("imdb", TEXT, SENTIMENT, hub=("stanfordnlp/imdb", None), offline="imdb"),
        Task(
            "amazon_polarity", ("content", None), SENTIMENT,
            hub=("fancyzhx/amazon_polarity", None), validation_splits=(),
        ),
        Task(
            "yelp_polarity", TEXT, SENTIMENT,
            hub=("fancyzhx/yelp_polarity", None), validation_splits=(),
        ),
        Task("amazon_instruments", TEXT, SENTIMENT, offline="amazon_instruments"),
        Task("amazon_snippets", TEXT, SENTIMENT, offline="amazon_snippets"),
        Task("movie_snippets", TEXT, SENTIMENT, offline="movie_snippets"),
        Task("tweet_snippets", TEXT, SENTIMENT, offline="tweet_snippets"),
        Task("polarity", TEXT, SENTIMENT),  # any other domain, from files
    )
}  # fmt: skip


def plain(name: str) -> str:
    """A task or folder name without case, hyphens and underscores: SST-2 is sst2."""
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str, flag: str = "--task_name") -> Task:
    """The task of that name, in any spelling (``sst2``, ``SST-2``).

    Args:
        flag: that gave the name.

    Raises:
        DataError: unknown; the nearest name is suggested.
    """
    by_plain = {plain(known): task for known, task in TASKS.items()}
    if plain(name) in by_plain:
        return by_plain[plain(name)]
    near = nearest(plain(name), by_plain)
    raise DataError.build(
        flag,
        "unknown task",
        found=repr(name),
        expected="one of " + ", ".join(TASKS),
        do=f"did you mean {by_plain[near].name}?" if near else "or leave it out and give files",
    )


def text_columns(
    keys: Collection[str], task: Task | None, text_like: Sequence[str]
) -> tuple[str, str | None] | None:
    """The text columns of a table with these keys, None if there are none.

    A known task takes its own columns or any usual pair (or single column) of the same arity; a
    table of no known task takes the usual names, then its first two columns that hold text.

    Args:
        keys: the table's column names.
        task: the task, or None for a table given by file only.
        text_like: columns that hold text, in the table's order, without labels and row numbers.
    """
    if task is not None:
        pair = task.text_columns[1] is not None
        usual = [c for c in TEXT_COLUMNS if (c[1] is not None) == pair]
        candidates = [task.text_columns, *usual]
    else:
        candidates = list(TEXT_COLUMNS)
    for first, second in candidates:
        if first in keys and (second is None or second in keys):
            return first, second
    if task is not None or not text_like:
        return None
    return text_like[0], text_like[1] if len(text_like) > 1 else None
