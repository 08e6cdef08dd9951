"""Two skewed halves of a training set: the paper's split for distribution generalization.

N rows, n0 of them of the key class, share s, half size h = floor(N / 2).

Paper (reference code): half 0 takes k0 = floor(s n0) key rows and h - k0 others; half 1 the rest.
That fails where s n0 >= h (QQP: the key class is the majority): half 0 has no room for others.
There the same rule is applied to the complement: half 1 takes floor(s (N - n0)) of the *other*
rows, half 0 the rest of them, and key rows fill both halves. With two classes this is the paper's
rule with the other class as key and the halves exchanged. It always fits, leaves more than one
class in each half for s < 1, and the share of key rows that half 0 reached is written down. The
same rule serves where s is so small that half 1 would overflow.

Which rows: drawn at random, the other classes in equal proportion in both halves, so that only the
key class is skewed. The reference takes the first rows in the file (``reference_halves``).
Regression: the key class is the rows whose score is above the median.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pem_composition.errors import DataError
from pem_composition.safe_files import atomic_directory, sha256_file
from pem_composition.tasks.data import TRAIN, VALIDATION, Example, TaskData
from pem_composition.tasks.glue import Task, WrittenFloat
from pem_composition.tasks.sampling import allocate, strata, stratified_sample
from pem_composition.tasks.tables import JSON_INTEGER, JSON_NUMBER, written

HIGH, LOW = "high", "low"
PAPER, COMPLEMENT, REFERENCE = "paper", "complement", "reference"
REPORTED = "test"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Halves:
    """Row numbers of the two halves, which rule gave them, and the share of key rows in half 0."""

    first: list[int]
    second: list[int]
    rule: str
    share_reached: float


@dataclass(frozen=True)
class SplitConfig:
    """What to split off, in this order: validation rows, a sample of the rest, two halves of it.

    Attributes:
        key_class: word or number; None is class 0, or the high scores of a regression task.
        share: part of the key class's rows that goes to half 0.
        samples: at most so many rows in both halves together, stratified; None for all.
        validation_size: rows carved out of the training set first, stratified.
        reference_rule: the reference's row choice, in the order of the file.
    """

    key_class: str | None = None
    share: float = 0.8
    samples: int | None = None
    validation_size: int = 0
    seed: int = 42
    reference_rule: bool = False


@dataclass(frozen=True)
class Split:
    """The examples of each written file, by its stem, and what ``split.json`` says of them."""

    parts: Mapping[str, Sequence[Example]]
    label_columns: Mapping[str, str | None]  # by part
    record: Mapping[str, Any]


def skewed_halves(
    labels: Sequence[Hashable], key_class: Hashable, share: float = 0.8, *, seed: int = 42
) -> Halves:
    """Divide rows into two halves of equal size (up to one row) that differ in their key class.

    ``share`` of the key class's rows go to the first half where that fits; see the module's text
    for where it does not. Other classes keep their mutual proportions in both halves. Row numbers
    are in ascending order.

    Raises:
        DataError: the share is not in (0, 1], or the key class or every other class is absent.
    """
    n, key = len(labels), [i for i, label in enumerate(labels) if label == key_class]
    k0, rule = key_rows_in_first(n, len(key), share)
    rng = random.Random(seed)
    chosen = set(rng.sample(key, k0))
    others = [i for i, label in enumerate(labels) if label != key_class]
    groups = [[others[j] for j in group] for group in strata([labels[i] for i in others])]
    counts = allocate([len(g) for g in groups], n // 2 - k0)
    for group, count in zip(groups, counts, strict=True):
        chosen.update(rng.sample(group, count))
    second = [i for i in range(n) if i not in chosen]
    return Halves(sorted(chosen), second, rule, k0 / len(key))


def key_rows_in_first(n: int, n_key: int, share: float) -> tuple[int, str]:
    """How many key rows the first half takes, and by which rule: paper or complement.

    Raises:
        DataError: the share is not in (0, 1], or there is only one kind of row.
    """
    _check_share(share)
    if not 0 < n_key < n:
        raise DataError.build(
            "--key_class", "nothing to skew", found=f"{n_key} of {n} rows in the key class",
            expected="both key rows and others",
        )  # fmt: skip
    half, exact = n // 2, Fraction(str(share))
    k0 = int(exact * n_key)
    if k0 < half and n_key - k0 < n - half:
        return k0, PAPER
    others_in_first = (n - n_key) - int(exact * (n - n_key))
    return half - others_in_first, COMPLEMENT


def reference_halves(labels: Sequence[Hashable], key_class: Hashable, share: float = 0.8) -> Halves:
    """The reference's index sets: the first floor(s n0) key rows and the first floor(N/2) - that of
    the others, in the order of the file; the second half is the rest. Not shuffled.

    Raises:
        DataError: the key rows do not fit into a half (the reference cuts at a negative number).
    """
    _check_share(share)
    key = [i for i, label in enumerate(labels) if label == key_class]
    others = [i for i, label in enumerate(labels) if label != key_class]
    k0 = int(Fraction(str(share)) * len(key))
    rest = len(labels) // 2 - k0
    if not key or not 0 <= rest <= len(others):
        raise DataError.build(
            "--reference_rule", f"{k0} of {len(key)} key rows in half 0 leave {rest} others there",
            expected=f"0 to {len(others)}", do="leave --reference_rule out, or change --share",
        )  # fmt: skip
    first = key[:k0] + others[:rest]
    second = key[k0:] + others[rest:]
    return Halves(first, second, REFERENCE, k0 / len(key))


def key_labels(task: Task, labels: Sequence[int | float], key: str | None) -> tuple[list[Any], Any]:
    """The labels that the split works on, and the key among them.

    Classes stay as they are; scores become ``high`` (above the median; from it on where nothing is
    above) and ``low``.

    Raises:
        DataError: the task has no such class.
    """
    if not task.regression:
        return list(labels), 0 if key is None else _class_number(task, key)
    if key not in (None, HIGH, LOW):
        raise DataError.build(
            "--key_class", f"{task.name} is a regression task", found=repr(key),
            expected=f"{HIGH} or {LOW}",
        )  # fmt: skip
    side = _side_of(labels)
    return [side(score) for score in labels], key or HIGH


def _side_of(scores: Sequence[float]) -> Callable[[float], str]:
    """``high`` above the median; from the median on where nothing is above it."""
    median = statistics.median(scores)
    if max(scores) > median:
        return lambda score: HIGH if score > median else LOW
    return lambda score: HIGH if score >= median else LOW


def make_split(data: TaskData, config: SplitConfig) -> Split:
    """Carve out validation rows, sample, and divide the training set of a task.

    The task's own validation rows, where ``data`` holds them, become the part ``test``: what the
    coefficient is not selected on, and results are reported on.

    Raises:
        DataError: too few rows, a key class the task does not have, or a share out of range.
    """
    task, rows = data.task, data.train
    pool = list(range(len(rows)))
    if not 0 <= config.validation_size < len(rows) - 1:
        raise DataError.build(
            "--validation_size", "not a part of the training set", found=config.validation_size,
            expected=f"0 to {len(rows) - 2}",
        )  # fmt: skip
    validation = _sample(rows, pool, config.validation_size, task, config.seed)
    pool = _without(pool, validation)
    if config.samples is not None and config.samples < 2:
        raise DataError.build("--samples", "too few", found=config.samples, expected="at least 2")
    pool = _sample(rows, pool, min(config.samples or len(pool), len(pool)), task, config.seed)
    labels, key = key_labels(task, [rows[i].label for i in pool], config.key_class)
    if config.reference_rule:
        halves = reference_halves(labels, key, config.share)
    else:
        halves = skewed_halves(labels, key, config.share, seed=config.seed)
    indices = {
        "half-0": [pool[i] for i in halves.first],
        "half-1": [pool[i] for i in halves.second],
        "all": list(pool),
    }
    if validation:
        indices["validation"] = validation
    parts = {name: _ordered(rows, part, name, config) for name, part in indices.items()}
    if VALIDATION in data.splits:
        parts[REPORTED] = list(data.splits[VALIDATION])
    kind_of = _kind_of(task, [rows[i].label for i in pool])
    summary = {n: _summary(task, [kind_of(e) for e in part], key) for n, part in parts.items()}
    columns = {
        name: data.label_columns.get(VALIDATION if name == REPORTED else TRAIN) for name in parts
    }
    return Split(parts, columns, _record(data, config, halves, key, summary))


def write_split(split: Split, path: str | Path, *, overwrite: bool = False) -> None:
    """Write one JSON-lines file per part and ``split.json``, the whole directory or nothing.

    Every row is the row as read plus ``row_id``, its number in its file (counted from 0). Labels
    of a CSV file become numbers, digit for digit, where all of them are scores that JSON can write
    so, or all of them are whole numbers.
    """
    with atomic_directory(Path(path), overwrite=overwrite) as folder:
        files = {}
        for name, examples in split.parts.items():
            target = folder / f"{name}.jsonl"
            lines = [written(row) for row in _rows(examples, split, name)]
            target.write_text("\n".join(lines) + "\n", encoding="utf-8")
            files[target.name] = split.record["parts"][name] | {"sha256": sha256_file(target)}
        record = {k: v for k, v in split.record.items() if k != "parts"} | {"files": files}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / "split.json").write_text(text + "\n", encoding="utf-8")


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise DataError.build(
            "--share", "not a share", found=share, expected="above 0, at most 1 (the paper: 0.8)"
        )


def _class_number(task: Task, key: str) -> int:
    try:
        return task.label_id(key)
    except DataError:
        raise DataError.build(
            "--key_class", f"no such class in {task.name}", found=repr(key),
            expected=task.accepted(),
        ) from None  # fmt: skip


def _sample(
    rows: Sequence[Example], pool: Sequence[int], size: int, task: Task, seed: int
) -> list[int]:
    labels = [rows[i].label for i in pool]
    chosen = stratified_sample(labels, size, seed=seed, regression=task.regression)
    return [pool[i] for i in chosen]


def _without(pool: Sequence[int], taken: Sequence[int]) -> list[int]:
    gone = set(taken)
    return [i for i in pool if i not in gone]


def _ordered(
    rows: Sequence[Example], part: list[int], name: str, config: SplitConfig
) -> list[Example]:
    """The rows of a part, shuffled by the seed and the part's name."""
    digest = hashlib.sha256(f"{config.seed} {name}".encode()).digest()
    order = sorted(part)
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return [rows[i] for i in order]


def _kind_of(task: Task, pool: Sequence[Any]) -> Callable[[Example], Any]:
    """What a row counts as in the summary: its class, or its side of the sample's median score."""
    if not task.regression:
        return lambda example: example.label
    side = _side_of(pool)
    return lambda example: side(example.label)


def _summary(task: Task, kinds: Sequence[Any], key: Any) -> dict[str, Any]:
    counts = Counter(kinds)
    names = {kind: kind if task.regression else task.labels[kind] for kind in sorted(counts)}
    return {
        "rows": len(kinds),
        "counts": {names[kind]: counts[kind] for kind in names},
        "key_share_of_rows": counts[key] / len(kinds),
    }


def _record(
    data: TaskData, config: SplitConfig, halves: Halves, key: Any, summary: dict[str, Any]
) -> dict[str, Any]:
    task, source = data.task, data.sources[TRAIN]
    path = Path(source)
    return {
        "format_version": FORMAT_VERSION,
        "task": task.name,
        "labels": list(task.labels),
        "rule": halves.rule,
        "key_class": key if task.regression else task.labels[key],
        "share_asked": config.share,
        "share_reached": halves.share_reached,
        "samples": config.samples,
        "validation_size": config.validation_size,
        "seed": config.seed,
        "source": {
            "name": source,
            "rows": len(data.train),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        },
        "parts": summary,
    }


def _rows(examples: Sequence[Example], split: Split, part: str) -> list[dict[str, Any]]:
    """The rows as read, each with its number in its file."""
    column, scores = split.label_columns[part], not split.record["labels"]
    rows = [{k: v for k, v in e.row.items() if k != "row_id"} for e in examples]
    if column is not None and all(_is_json_number(row[column], scores) for row in rows):
        rows = [row | {column: WrittenFloat(row[column])} for row in rows]
    return [row | {"row_id": e.row_id} for row, e in zip(rows, examples, strict=True)]


def _is_json_number(value: Any, scores: bool) -> bool:
    """True for text that is a number of JSON; a class must be a whole one to stay the same word."""
    form = JSON_NUMBER if scores else JSON_INTEGER
    return isinstance(value, str) and form.fullmatch(value) is not None
