"""Rows of a task: where they are found, what their labels mean, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pem_composition import network
from pem_composition.errors import DataError
from pem_composition.tasks.data import RowFiles, find_split_files, load_task

RTE = [
    {"idx": i, "sentence1": f"a{i}", "sentence2": f"b{i}", "label": word}
    for i, word in enumerate(["entailment", "not_entailment", "entailment", "not_entailment"])
]


SPLITS = ("train", "validation", "test")


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels(examples) -> list:
    return [e.label for e in examples]


def with_label(values: list) -> list[dict]:
    return [row | {"label": v} for row, v in zip(RTE, values, strict=True)]


@pytest.mark.parametrize(
    "values",
    [
        ["entailment", "not_entailment", "entailment", "not_entailment"],
        [0, 1, 0, 1],
        ["0", "1", "0", "1"],
        [0.0, 1.0, 0.0, 1.0],
    ],
)
def test_words_and_numbers_mean_the_same_classes(tmp_path, values):
    train = jsonl(tmp_path / "train.jsonl", with_label(values))
    data = load_task("rte", RowFiles(train_file=train))
    assert labels(data.train) == [0, 1, 0, 1]
    assert [type(e.label) for e in data.train] == [int] * 4
    assert (data.train[2].text, data.train[2].text_pair, data.train[2].row_id) == ("a2", "b2", 2)


def test_the_word_entailment_has_another_number_in_wnli(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", RTE)
    assert labels(load_task("wnli", RowFiles(train_file=train)).train) == [1, 0, 1, 0]


BAD_LABELS = {
    "unknown": (
        ["entailment", "neutral", "entailment", "entailment"],
        "line 2: unknown label; found 'neutral', "
        "expected one of entailment (0), not_entailment (1)",
    ),
    "mixed": (
        ["entailment", "not_entailment", 0, 1],
        "line 3: labels are words in some rows and numbers in others",
    ),
    "missing": (["entailment", None, "entailment", None], "line 2: unknown label; found nothing"),
    "too large": ([0, 1, 2, 0], "line 3: unknown label; found 2"),
    "negative": ([0, -1, 0, 1], "line 2: unknown label; found -1"),
    "fraction": ([0, 0.5, 0, 1], "line 2: unknown label; found 0.5"),
    "truth value": ([0, True, 0, 1], "labels are words in some rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_bad_label_is_named_with_its_line(tmp_path, case):
    values, message = BAD_LABELS[case]
    train = jsonl(tmp_path / "train.jsonl", with_label(values))
    with pytest.raises(DataError) as error:
        load_task("rte", RowFiles(train_file=train))
    assert message in str(error.value)
    assert str(train) in str(error.value)


def test_regression_labels_are_numbers(tmp_path):
    rows = with_label([0, 2.5, "3.75", 5])
    data = load_task("stsb", RowFiles(train_file=jsonl(tmp_path / "train.jsonl", rows)))
    assert labels(data.train) == [0.0, 2.5, 3.75, 5.0]
    for wrong in ("high", "nan", "inf", True):
        bad = jsonl(tmp_path / "bad.jsonl", with_label([0, wrong, 1, 2]))
        with pytest.raises(DataError, match=r"line 2: unknown label.*expected a number"):
            load_task("stsb", RowFiles(train_file=bad))


def test_a_missing_column_lists_what_is_there(tmp_path):
    rows = [{"sentence1": "a", "label": 0}]
    with pytest.raises(DataError, match="found sentence1, label, expected sentence1 and"):
        load_task("rte", RowFiles(train_file=jsonl(tmp_path / "a.jsonl", rows)))
    rows = [{"sentence1": "a", "sentence2": "b"}]
    with pytest.raises(DataError, match=r"no label column; found sentence1, sentence2"):
        load_task("rte", RowFiles(train_file=jsonl(tmp_path / "a.jsonl", rows)))


def test_a_column_that_only_blanks_tell_from_the_usual_one_is_shown_with_them(tmp_path):
    rows = [{"": 0, "sentence1": "a", " sentence2 ": "b", "label": 1}]
    shown = "found '', sentence1, ' sentence2 ', label, expected sentence1 and sentence2"
    with pytest.raises(DataError, match=shown):
        load_task("rte", RowFiles(train_file=jsonl(tmp_path / "a.jsonl", rows)))


def test_text_that_is_a_number_is_refused_with_its_line(tmp_path):
    rows = [RTE[0], RTE[1] | {"sentence2": 7}]
    with pytest.raises(DataError, match=r"line 2: column 'sentence2' is not text; found 7"):
        load_task("rte", RowFiles(train_file=jsonl(tmp_path / "a.jsonl", rows)))


def test_a_file_without_a_task_never_takes_the_row_number_for_text(tmp_path):
    rows = [{"idx": i, "sentence": f"s {i}", "label": i % 2} for i in range(4)]
    data = load_task(files=RowFiles(train_file=jsonl(tmp_path / "a.jsonl", rows)))
    assert data.task.text_columns == ("sentence", None)
    assert data.task.labels == ("0", "1")
    assert data.train[1].text_pair is None
    rows = [{"key": str(i), "body": f"s {i}", "label": "ab"[i % 2]} for i in range(4)]
    task = load_task(files=RowFiles(train_file=jsonl(tmp_path / "b.jsonl", rows))).task
    assert task.text_columns == ("body", None)


def test_labels_of_a_file_are_sorted_or_given(tmp_path):
    rows = [{"text": "x", "label": v} for v in ("no", "yes", "maybe")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert load_task(files=RowFiles(train_file=path)).task.labels == ("maybe", "no", "yes")
    assert labels(
        load_task(files=RowFiles(train_file=path), labels=("yes", "no", "maybe")).train
    ) == [1, 0, 2]
    rows = [{"text": "x", "label": v} for v in (10, 9, 1)]
    stars = load_task(files=RowFiles(train_file=jsonl(tmp_path / "b.jsonl", rows)))
    assert stars.task.labels == ("1", "9", "10")
    assert labels(stars.train) == [2, 1, 0]


def test_a_file_with_float_labels_is_a_regression_and_one_class_is_nothing(tmp_path):
    rows = [{"text": "x", "label": v} for v in (1.0, 2.5)]
    task = load_task(files=RowFiles(train_file=jsonl(tmp_path / "a.jsonl", rows))).task
    assert task.regression
    assert task.primary == "pearson"
    rows = [{"text": "x", "label": "yes"}] * 3
    with pytest.raises(DataError, match=r"found labels yes, expected at least two different"):
        load_task(files=RowFiles(train_file=jsonl(tmp_path / "b.jsonl", rows)))


def test_a_validation_label_that_training_lacks_is_refused(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": v} for v in ("no", "yes")])
    dev = jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": "maybe"}])
    with pytest.raises(DataError, match=r"b.jsonl, line 1: unknown label; found 'maybe'"):
        load_task(files=RowFiles(train_file=train, validation_file=dev))
    with pytest.raises(DataError, match="unknown label"):
        load_task(files=RowFiles(train_file=train, validation_file=dev, splits=("validation",)))


@pytest.mark.parametrize("folder", ["rte", "RTE", "."])
def test_a_data_dir_is_a_task_folder_or_a_folder_of_them(tmp_path, folder):
    jsonl(tmp_path / folder / "train.jsonl", RTE)
    jsonl(tmp_path / folder / "dev.jsonl", RTE[:2])
    (tmp_path / folder / "SOURCE.json").write_text("{}")
    data = load_task("rte", RowFiles(data_dir=tmp_path))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 4, "validation": 2}
    with pytest.raises(DataError, match="rte: no test rows; found train, validation; give --test"):
        _ = data.test


def test_a_file_flag_wins_over_the_data_dir(tmp_path):
    jsonl(tmp_path / "rte/train.jsonl", RTE)
    jsonl(tmp_path / "rte/dev.jsonl", RTE[:2])
    half = jsonl(tmp_path / "half-0.jsonl", RTE[:1])
    data = load_task("rte", RowFiles(train_file=half, data_dir=tmp_path))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 1, "validation": 2}
    assert data.sources["train"] == str(half)


def test_mnli_files_as_distributed(tmp_path):
    words = ("neutral", "contradiction")
    rows = [{"sentence1": "a", "sentence2": "b", "gold_label": w} for w in words]
    for name in ("train", "dev_matched", "dev_mismatched"):
        jsonl(tmp_path / f"MNLI/{name}.jsonl", rows)
    data = load_task("mnli", RowFiles(data_dir=tmp_path))
    assert set(data.splits) == {"train", "validation", "validation_mismatched"}
    assert labels(data.validation) == [1, 2]


def test_two_files_for_one_split_are_refused(tmp_path):
    jsonl(tmp_path / "train.jsonl", RTE)
    jsonl(tmp_path / "dev.jsonl", RTE)
    (tmp_path / "validation.csv").write_text("sentence1,sentence2,label\na,b,0\n")
    with pytest.raises(DataError, match=r"two files for validation; found dev\.jsonl and v"):
        find_split_files(tmp_path)


def test_unlabelled_test_rows_have_no_label(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", RTE)
    hidden = jsonl(tmp_path / "test.jsonl", with_label([-1] * 4))
    assert labels(load_task("rte", RowFiles(train_file=train, test_file=hidden)).test) == [None] * 4
    bare = jsonl(tmp_path / "t.jsonl", [{"sentence1": "a", "sentence2": "b"}])
    assert labels(load_task("rte", RowFiles(train_file=train, test_file=bare)).test) == [None]


def test_snli_rows_without_gold_label_are_left_out_and_counted(tmp_path):
    words = ["entailment", "-", "neutral", "-"]
    data = load_task(
        "snli", RowFiles(train_file=jsonl(tmp_path / "train.jsonl", with_label(words)))
    )
    assert labels(data.train) == [0, 1]
    assert [e.row_id for e in data.train] == [0, 2]
    assert data.notes == (f"{tmp_path / 'train.jsonl'}: 2 rows without a gold label left out",)


def test_limits_are_stratified_deterministic_and_in_file_order(tmp_path):
    rows = [RTE[0] | {"label": int(i % 10 == 0)} for i in range(500)]
    path = jsonl(tmp_path / "train.jsonl", rows)
    first = load_task("rte", RowFiles(train_file=path, max_train_samples=50)).train
    assert Counter(labels(first)) == {0: 45, 1: 5}
    ids = [e.row_id for e in first]
    assert ids == sorted(ids)
    again = load_task("rte", RowFiles(train_file=path, max_train_samples=50)).train
    other = load_task("rte", RowFiles(train_file=path, max_train_samples=50, seed=1)).train
    assert ids == [e.row_id for e in again]
    assert ids != [e.row_id for e in other]
    assert len(load_task("rte", RowFiles(train_file=path, max_train_samples=999)).train) == 500
    with pytest.raises(DataError, match="found 0, expected at least 1"):
        load_task("rte", RowFiles(train_file=path, max_train_samples=0))


def test_without_file_and_hub_the_flags_for_local_files_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "reachable", lambda: False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DataError) as error:
        load_task("qnli")
    assert "nyu-mll/glue cannot be loaded from the hub" in str(error.value)
    for flag in ("--train_file", "--validation_file", "--data_dir"):
        assert flag in str(error.value)
    with pytest.raises(DataError, match="no task and no file"):
        load_task()


GLUE_COUNTS = {
    "cola": (8551, 1043, {1: 721, 0: 322}),
    "mnli": (9999, 9815, {0: 3479, 1: 3123, 2: 3213}),
    "rte": (2490, 277, {0: 146, 1: 131}),
    "sst2": (67349, 872, {1: 444, 0: 428}),
    "wnli": (635, 71, {0: 40, 1: 31}),
    "qqp": (20000, 4000, {0: 2555, 1: 1445}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GLUE_COUNTS)
def test_real_glue_folders(shared, name):
    data = load_task(name, RowFiles(data_dir=shared / "data/glue"))
    train, dev, counts = GLUE_COUNTS[name]
    assert (len(data.train), len(data.validation)) == (train, dev)
    assert Counter(labels(data.validation)) == counts


def test_real_sts_b(shared):
    data = load_task("STS-B", RowFiles(data_dir=shared / "data/glue"))
    assert len(data.train) == 5749
    assert data.train[0].label == 5.0
    assert all(0 <= score <= 5 for score in labels(data.validation))


@pytest.mark.parametrize("known", [(0, 2), (1, 2, 3), (-1, 1)])
def test_a_number_that_no_training_row_has_is_no_class(tmp_path, known):
    rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(known)]
    train = jsonl(tmp_path / "train.jsonl", rows)
    absent = next(n for n in range(4) if n not in known)
    rows[0]["label"] = absent
    other = jsonl(tmp_path / "dev.jsonl", rows)
    expected = ", ".join(map(str, known))
    with pytest.raises(DataError, match=f"line 1: unknown label; found {absent}, .*{expected}"):
        load_task(files=RowFiles(train_file=train, validation_file=other))


def test_minus_one_is_a_class_or_a_number_where_the_training_rows_say_so(tmp_path):
    for kind, values in (("class", (-1, 1)), ("number", (-1, 0.5, 2.25))):
        rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(values)]
        files = {f"{s}_file": jsonl(tmp_path / kind / f"{s}.jsonl", rows) for s in SPLITS}
        data = load_task(files=RowFiles(**files))
        assert labels(data.test) == labels(data.train)
        assert None not in labels(data.test)
    hidden = [{"sentence1": "a", "sentence2": "b", "label": -1}]
    data = load_task(
        "rte", RowFiles(test_file=jsonl(tmp_path / "t.jsonl", hidden), splits=("test",))
    )
    assert labels(data.test) == [None]
