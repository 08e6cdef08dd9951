"""Classification and regression tasks as data: columns, labels in GLUE order, metrics, hub names.

The order of ``labels`` is the order of the output units, so it is part of a module's meaning: a
head trained elsewhere on the same task names the same classes. No files are read here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pem_composition.errors import DataError

# Pairs first: a table with sentence1, sentence2 and a column named text is a pair task.
TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),  # MRPC as distributed
    ("sentence", None),
    ("text", None),
)
# `is_duplicate`, `Quality`, `score` and `gold_label` are the names in the distributed GLUE files.
LABEL_COLUMNS = ("label", "labels", "gold_label", "is_duplicate", "Quality", "score")
NOT_TEXT = frozenset({"idx", "index", "id", "guid", "row_id"})

ENTAILMENT_3 = ("entailment", "neutral", "contradiction")
ACCURACY_F1 = ("accuracy", "f1")
SENTIMENT = ("negative", "positive")


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

    def label_id(self, value: str | int) -> int:
        """Index of a class given by its word, or by its number where no class is called by one.

        Raises:
            DataError: the task has no such class.
        """
        word = str(value)
        if word in self.labels:
            return self.labels.index(word)
        words = not any(map(is_number, self.labels))
        if words and word.isdecimal() and int(word) < len(self.labels):
            return int(word)
        raise DataError.build(
            self.name, "no such class", found=repr(value), expected=self.accepted()
        )

    def accepted(self) -> str:
        """The labels that a row may hold, for messages."""
        if self.regression:
            return "a number"
        if any(map(is_number, self.labels)):
            return "one of " + ", ".join(self.labels)
        return "one of " + ", ".join(f"{word} ({i})" for i, word in enumerate(self.labels))


def is_number(value: Any) -> bool:
    """True for a number or a string that reads as a finite one."""
    return not isinstance(value, bool) and number_of(value) is not None


def number_of(value: Any) -> float | None:
    """The finite number that a cell holds, None if it holds anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _glue(
    name: str, first: str, second: str | None, labels: tuple[str, ...], **changes: object
) -> Task:
    return Task(name, (first, second), labels, hub=("nyu-mll/glue", name), **changes)  # type: ignore[arg-type]


def _sentiment(name: str, hub: str | None = None) -> Task:
    """A domain whose rows install by package name; the hub's copy is named for the record."""
    return Task(name, ("text", None), SENTIMENT, hub=(hub, None) if hub else None, offline=name)


def _reviews(name: str, column: str) -> Task:
    """A domain that is on the hub only, where it has no validation split."""
    return Task(
        name, (column, None), SENTIMENT, hub=(f"fancyzhx/{name}", None), validation_splits=()
    )


# Primary metrics follow the LoRA and RoBERTa papers: Matthews for CoLA, Pearson for STS-B, accuracy
# for the rest; GLUE's leaderboard averages the two metrics of MRPC, QQP and STS-B.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            "cola", "sentence", None, ("unacceptable", "acceptable"),
            metrics=("matthews_correlation",), primary="matthews_correlation",
        ),
        _glue("sst2", "sentence", None, SENTIMENT),
        _glue(
            "mrpc", "sentence1", "sentence2", ("not_equivalent", "equivalent"), metrics=ACCURACY_F1
        ),
        _glue(
            "qqp", "question1", "question2", ("not_duplicate", "duplicate"), metrics=ACCURACY_F1
        ),
        _glue(
            "stsb", "sentence1", "sentence2", (),
            metrics=("pearson", "spearmanr"), primary="pearson",
        ),
        _glue(
            "mnli", "premise", "hypothesis", ENTAILMENT_3,
            validation_splits=("validation_matched", "validation_mismatched"),
        ),
        _glue("qnli", "question", "sentence", ("entailment", "not_entailment")),
        _glue("rte", "sentence1", "sentence2", ("entailment", "not_entailment")),
        _glue("wnli", "sentence1", "sentence2", ("not_entailment", "entailment")),
        Task(
            "snli", ("premise", "hypothesis"), ENTAILMENT_3,
            hub=("stanfordnlp/snli", None), unlabelled=("-", -1),
        ),
        _sentiment("rotten_tomatoes", hub="cornell-movie-review-data/rotten_tomatoes"),
        _sentiment("imdb", hub="stanfordnlp/imdb"),
        _reviews("amazon_polarity", "content"),
        _reviews("yelp_polarity", "text"),
        _sentiment("amazon_instruments"),
        _sentiment("amazon_snippets"),
        _sentiment("movie_snippets"),
        _sentiment("tweet_snippets"),
        Task("polarity", ("text", None), SENTIMENT),  # any other domain, from files
    )
}  # fmt: skip


def plain(name: str) -> str:
    """A task or folder name without case, hyphens and underscores: SST-2 is sst2."""
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str) -> Task:
    """The task of that name, in any spelling (``sst2``, ``SST-2``).

    Raises:
        DataError: unknown; the nearest name is suggested.
    """
    by_plain = {plain(known): task for known, task in TASKS.items()}
    if plain(name) in by_plain:
        return by_plain[plain(name)]
    near = get_close_matches(plain(name), by_plain, n=1)
    raise DataError.build(
        "--task_name",
        "unknown task",
        found=repr(name),
        expected="one of " + ", ".join(TASKS),
        do=f"did you mean {by_plain[near[0]].name}?" if near else "or leave it out and give files",
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
