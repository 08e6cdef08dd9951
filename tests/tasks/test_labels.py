"""Class names are words; when labels are scores; what the user and a module say of a table."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from pathlib import Path

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from pem_composition.errors import DataError
from pem_composition.tasks.data import RowFiles, load_task
from pem_composition.tasks.glue import (
    Reading,
    Task,
    get_task,
    number_of,
    reads_as_scores,
    word_of,
)
from pem_composition.tasks.halves import SplitConfig, make_split, write_split
from pem_composition.tasks.tables import read_table

# As they stand in a file; each is a class of its own.
WORDS = [
    "12", "1_2", "1e1", "10", "01", "1", "1.0", "+1", "nan", "inf", "true", "True", "a b", "\u0661",
]  # fmt: skip


def table(path: Path, labels: list[str], *, times: int = 6) -> Path:
    """A CSV file with every label so many times."""
    with path.open("w", newline="") as file:
        rows = [[f"row {i} of {word}", word] for i in range(times) for word in labels]
        csv.writer(file).writerows([["text", "label"], *rows])
    return path


def said(examples, task: Task) -> list[tuple[str, str]]:
    return [(e.text, task.labels[e.label]) for e in examples]


def test_class_names_that_look_alike_stay_apart_through_a_split(tmp_path):
    data = load_task(files=RowFiles(train_file=table(tmp_path / "a.csv", WORDS)))
    assert set(data.task.labels) == set(WORDS)
    assert said(data.train, data.task) == [
        (f"row {i} of {word}", word) for i in range(6) for word in WORDS
    ]
    write_split(make_split(data, SplitConfig(share=0.5)), tmp_path / "out")
    again = load_task(files=RowFiles(train_file=tmp_path / "out/all.jsonl"))
    assert again.task.labels == data.task.labels
    assert sorted(said(again.train, again.task)) == sorted(said(data.train, data.task))


@pytest.mark.parametrize(
    "labels", [["1e5", "2e5"], ["0", "1"], ["+1", "-1"], ["01", "02"], ["1", "1.0"], ["-0", "0"]]
)
def test_a_half_has_the_classes_of_the_whole_letter_by_letter(tmp_path, labels):
    path = table(tmp_path / "a.csv", labels)
    whole = load_task(files=RowFiles(train_file=path))
    write_split(make_split(whole, SplitConfig()), tmp_path / "out")
    half = load_task(files=RowFiles(train_file=tmp_path / "out/half-0.jsonl"))
    assert half.task == whole.task
    assert not half.task.regression
    assert set(half.task.labels) == set(labels)


@pytest.mark.parametrize("scores", [[".5", "01", "+1"], ["2.50", "0.10"], ["1.5e1", "3.25"]])
def test_scores_keep_their_digits_through_a_split(tmp_path, scores):
    data = load_task(files=RowFiles(train_file=table(tmp_path / "a.csv", scores)))
    assert data.task.regression
    write_split(make_split(data, SplitConfig()), tmp_path / "out")
    again = load_task(files=RowFiles(train_file=tmp_path / "out/all.jsonl"))
    assert again.task.regression
    assert sorted(e.label for e in again.train) == sorted(6 * [float(s) for s in scores])
    written = (tmp_path / "out/all.jsonl").read_text()
    assert all(f" {s}, " in written or f'"{s}"' in written for s in scores)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_numbers_of_json_are_written_as_they_were_read(tmp_path, suffix):
    lines = ['{"text": "a", "w": 1e5, "label": 1.0}', '{"text": "b", "w": 2.50, "label": 1}']
    text = "\n".join(lines * 10) if suffix == "jsonl" else f"[{', '.join(lines * 10)}]"
    (tmp_path / f"a.{suffix}").write_text(text)
    data = load_task(files=RowFiles(train_file=tmp_path / f"a.{suffix}"))
    assert data.task.labels == ("1", "1.0")
    write_split(make_split(data, SplitConfig()), tmp_path / "out")
    found = (tmp_path / "out/all.jsonl").read_text().splitlines()
    assert {line.partition(', "row_id"')[0] + "}" for line in found} == set(lines)


def test_a_number_is_ascii_decimal_and_finite():
    for text in ("1", "+1", "-.5", "5.", "01", "1e1", " 2 ", "1E-3"):
        assert number_of(text) == float(text)
    for text in ("1_2", "\u0661", "nan", "inf", "Infinity", "1e999", "0x1", "", ".", "1e", "1,5"):
        assert number_of(text) is None
    assert number_of(True) is None


@pytest.mark.parametrize(
    ("values", "scores"),
    [
        (["0.5", "1"], True), ([2.5, 1], True), (["1e-1", "3"], True), ([1.0, 2.0], False),
        (["1e5", "2e5"], False), (["1.0", "2.0"], False), (["a", "b"], False),
        ([True, False], False),
    ],
)  # fmt: skip
def test_labels_are_scores_where_one_is_not_whole(tmp_path, values, scores):
    assert reads_as_scores(values) == scores
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": v}) + "\n" for v in values))
    data = load_task(files=RowFiles(train_file=path))
    assert data.task.regression == scores
    assert ("scores (regression)" in data.notes[0]) == scores
    flipped = load_task(files=RowFiles(train_file=path), reading=Reading(regression=False))
    assert set(flipped.task.labels) == {word_of(v) for v in values}


def test_booleans_are_classes_by_their_spelling_and_null_is_no_class(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"text": "b", "label": false}\n')
    assert load_task(files=RowFiles(train_file=path)).task.labels == ("false", "true")
    path.write_text(path.read_text() + '{"text": "c", "label": null}\n')
    with pytest.raises(DataError, match=r"line 3: unknown label; found nothing"):
        load_task(files=RowFiles(train_file=path))


@pytest.mark.parametrize("label", [[0, 1], [], {"a": 1}])
@pytest.mark.parametrize("task_name", [None, "sst2", "stsb"])
def test_several_labels_in_a_row_are_refused_by_name(tmp_path, label, task_name):
    path = tmp_path / "a.jsonl"
    row = {"text": "x", "sentence1": "x", "sentence2": "y", "label": label}
    path.write_text(json.dumps(row | {"label": 0}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"line 2: several labels in one row \(multi-label"):
        load_task(task_name, RowFiles(train_file=path))


def test_lists_of_parquet_are_several_labels(tmp_path):
    pandas.DataFrame({"text": ["a", "b"], "label": [[0], [1, 2]]}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="several labels in one row"):
        load_task(files=RowFiles(train_file=tmp_path / "a.parquet"))


def test_indices_beside_the_words_they_stand_for_are_refused_other_numbers_are_classes(tmp_path):
    mixed = table(tmp_path / "a.csv", ["0", "1", "no", "yes"])
    with pytest.raises(DataError, match="labels are words in some rows and numbers in others"):
        load_task(files=RowFiles(train_file=mixed))
    stars = load_task(files=RowFiles(train_file=table(tmp_path / "b.csv", ["1", "5", "none"])))
    assert stars.task.labels == ("1", "5", "none")
    named = load_task(files=RowFiles(train_file=mixed), labels=("0", "1", "no", "yes"))
    assert named.task.labels == ("0", "1", "no", "yes")


def test_a_word_among_scores_names_both_ways_out(tmp_path):
    path = table(tmp_path / "a.csv", ["0.5", "n/a"], times=1)
    with pytest.raises(DataError, match=r"line 3: labels are scores.*--do_regression false"):
        load_task(files=RowFiles(train_file=path))
    assert (
        load_task(
            files=RowFiles(train_file=path), reading=Reading(regression=False)
        ).task.num_labels
        == 2
    )


def test_a_module_s_own_classes_give_meaning_and_order(tmp_path):
    own = ("ok", "bad", "good")
    path = table(tmp_path / "a.csv", ["good", "bad"], times=1)
    data = load_task(files=RowFiles(validation_file=path), reading=Reading(own=own))
    assert data.task.labels == own
    assert [e.label for e in data.validation] == [2, 1]
    one = load_task(
        files=RowFiles(validation_file=table(tmp_path / "b.csv", ["bad"])), reading=Reading(own=own)
    )
    assert one.task.labels == own
    with pytest.raises(
        DataError, match=r"line 3: unknown label; found 'awful', expected one of ok"
    ):
        load_task(
            files=RowFiles(validation_file=table(tmp_path / "c.csv", ["bad", "awful"])),
            reading=Reading(own=own),
        )
    ids = load_task(
        files=RowFiles(validation_file=table(tmp_path / "d.csv", ["2", "0"])),
        reading=Reading(own=own),
    )
    assert [e.label for e in ids.validation][:2] == [2, 0]


def test_numbered_classes_of_a_module_are_indices_or_give_way_to_words(tmp_path):
    own = ("LABEL_0", "LABEL_1", "LABEL_2")
    ids = load_task(
        files=RowFiles(validation_file=table(tmp_path / "a.csv", ["0", "2"])),
        reading=Reading(own=own),
    )
    assert [e.label for e in ids.validation][:2] == [0, 2]
    words = table(tmp_path / "b.csv", ["x", "y", "z"])
    assert load_task(
        files=RowFiles(validation_file=words), reading=Reading(own=own)
    ).task.labels == ("x", "y", "z")


def test_a_module_that_predicts_scores_reads_whole_numbers_as_scores(tmp_path):
    path = table(tmp_path / "a.csv", ["1", "2"])
    assert load_task(files=RowFiles(validation_file=path), reading=Reading(own=())).task.regression
    assert not load_task(files=RowFiles(validation_file=path)).task.regression


def test_columns_are_those_that_were_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,body,title,mood\nt,9,b,h,bad\nt,8,c,i,good\n")
    reading = Reading(text_columns=("title", "body"), label_column="mood")
    data = load_task(files=RowFiles(train_file=path), reading=reading)
    assert data.task.text_columns == ("title", "body")
    assert [(e.text, e.text_pair) for e in data.train] == [("h", "b"), ("i", "c")]
    assert data.task.labels == ("bad", "good")
    assert "text in title and body; label in mood; 2 classes from the rows" in data.notes[0]
    pair = load_task(
        "rte", RowFiles(train_file=path, splits=()), reading=Reading(("title", "body"), "label")
    )
    assert pair.task.text_columns == ("sentence1", "sentence2"), "the task's prompt names these"


REFUSED = {
    "no such text": (Reading(("nope",)), "--text_column_names nope: no such column"),
    "no such label": (Reading(label_column="nope"), "--label_column_name nope: no such column"),
    "text is label": (Reading(("mood",), "mood"), "is also a column of text"),
    "three texts": (Reading(("text", "mood", "body")), "one or two columns"),
    "one class": (Reading(labels=("a",)), "at least two different names"),
    "classes of scores": (Reading(labels=("a", "b"), regression=True), "contradicts --do"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_table_can_satisfy_is_refused_by_its_flag(tmp_path, case):
    reading, message = REFUSED[case]
    path = tmp_path / "a.csv"
    path.write_text("text,body,mood\nt,b,bad\nt,c,good\n")
    with pytest.raises(DataError, match=message):
        load_task(files=RowFiles(train_file=path), reading=reading)


def test_a_known_task_keeps_its_own_classes(tmp_path):
    path = table(tmp_path / "a.csv", ["0", "1"])
    for reading in (Reading(labels=("positive", "negative")), Reading(regression=True)):
        with pytest.raises(DataError, match=r"sst2 has"):
            load_task("sst2", RowFiles(train_file=path), reading=reading)


@pytest.mark.parametrize("columns", [("sentence1", "sentence2"), ("text",)])
@pytest.mark.parametrize("labels", [("0", "1"), ("no", "yes")])
def test_tables_of_the_hugging_face_examples(tmp_path, columns, labels):
    for name in ("train", "dev"):
        rows = [{**{c: f"{c} {i}" for c in columns}, "label": labels[i % 2]} for i in range(4)]
        pandas.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    data = load_task(
        files=RowFiles(train_file=tmp_path / "train.csv", validation_file=tmp_path / "dev.csv")
    )
    assert data.task.labels == labels
    assert [e.label for e in data.validation] == [0, 1, 0, 1]
    assert [e.text for e in data.train] == [
        r[columns[0]] for r in read_table(tmp_path / "train.csv").rows
    ]


def test_a_prompt_file_s_answers_are_the_classes_of_its_rows(tmp_path):
    from pem_composition.tasks.prompts import classes_of, get_prompt

    prompt = tmp_path / "prompt.json"
    answers = {"ok": "maybe", "bad": "no", "good": "yes"}
    prompt.write_text(json.dumps({"template": "{text}?", "answers": answers}))
    own = classes_of(str(prompt))
    assert own == ("ok", "bad", "good")
    rows = table(tmp_path / "a.csv", ["good", "bad"], times=1)
    data = load_task(files=RowFiles(validation_file=rows), reading=Reading(own=own))
    asked = get_prompt(data.task, str(prompt))
    assert [asked.target(data.task, e) for e in data.validation] == ["yes", "no"]
    prompt.write_text(json.dumps({"template": "{text}?", "answers": ["0.0", "1.0"]}))
    assert classes_of(str(prompt)) == ()
    assert classes_of("sst2") is None
    assert classes_of(None) is None


def test_labels_of_parquet_that_are_missing_or_dates(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "b", "c"], "label": [0.0, 1.0, math.nan]})
    parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"row 3: unknown label; found nothing"):
        load_task(files=RowFiles(train_file=path))
    days = [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)]
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": days}), path)
    assert load_task(files=RowFiles(train_file=path)).task.labels == ("2020-01-01", "2021-01-01")


CELLS = {
    "decimals": [decimal.Decimal(i) / 4 for i in range(8)],
    "bytes": [b"yes" if i % 2 else b"no" for i in range(8)],
    "words": ["yes" if i % 2 else "no" for i in range(8)],
    "numbers": [i % 2 for i in range(8)],
}


@pytest.mark.parametrize("name", CELLS)
def test_a_split_of_a_parquet_table_means_what_the_table_means(name, tmp_path):
    columns = {
        "review": [f"text {i}" for i in range(8)],
        "label": CELLS[name],
        "missing": [float("nan"), *[1.5] * 7],
        "endless": [float("inf")] * 8,
        "nested": [{"a": [float("nan")], "when": datetime.date(2020, 1, 2)}] * 8,
        "__index_level_0__": [f"row {i}" for i in range(8)],  # the names of rows of pandas
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    whole = load_task(files=RowFiles(train_file=tmp_path / "a.parquet"))
    write_split(make_split(whole, SplitConfig()), tmp_path / "out")
    again = load_task(files=RowFiles(train_file=tmp_path / "out" / "all.jsonl"))
    assert again.task == whole.task
    assert whole.task.regression == (name == "decimals")
    assert whole.task.text_columns == ("review", None)
    by_row = sorted(again.train, key=lambda e: e.row_id)
    assert [(e.text, e.label) for e in by_row] == [(e.text, e.label) for e in whole.train]
    if name == "decimals":
        assert [e.label for e in whole.train] == [i / 4 for i in range(8)]
    else:
        assert [e.label for e in whole.train] == [i % 2 for i in range(8)]
        assert whole.task.labels == (("0", "1") if name == "numbers" else ("no", "yes"))
    for line in (tmp_path / "out" / "all.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["endless"] == float("inf")


NUMBERED = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("task", ["mnli", None])
def test_a_head_that_numbers_its_classes_is_said_to_be_guessed(task, tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"a,b,{word}" for word in ("neutral", "entailment", "contradiction")]
    path.write_text("\n".join(["premise,hypothesis,label", *rows]))

    def notes(**known) -> str:
        reading = Reading(**known)
        return " ".join(load_task(task, RowFiles(validation_file=path), reading=reading).notes)

    order = get_task("mnli").labels if task else tuple(sorted(get_task("mnli").labels))
    said = ", ".join(f"{i} for {word}" for i, word in enumerate(order))
    assert f"the head numbers its classes: output {said};" in notes(own=NUMBERED)
    for known in ({"own": order}, {"own": None}, {"own": NUMBERED, "labels": order}):
        assert "numbers its classes" not in notes(**known)


def test_numbers_of_numbered_classes_are_no_guess(tmp_path):
    path = table(tmp_path / "a.csv", ["0", "1", "2"])
    (note,) = load_task(files=RowFiles(validation_file=path), reading=Reading(own=NUMBERED)).notes
    assert "3 classes of the model" in note
