"""Rows chosen to train on share no text with those that are left out, nor with one another."""

from __future__ import annotations

import json

import pytest

from pem_composition.errors import DataError
from pem_composition.tasks.document_rows import ScoreFilter
from pem_composition.tasks.selection import RowChoice, select
from pem_composition.tasks.tables import read_table


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(path)


def comment(number, score=0.9):
    return {"text": f"comment with the number {number} in it", "toxicity": score}


@pytest.fixture
def comments(tmp_path):
    rows = [comment(i, 0.9 if i % 2 else 0.8) for i in range(40)]
    rows.append({"text": "COMMENT, with the number 1 in it!", "toxicity": 1.0})
    return table(tmp_path / "comments.jsonl", rows)


def texts(rows):
    return [row["text"] for row in rows]


def test_rows_above_the_threshold_are_taken_once_each(comments):
    found = select(comments, RowChoice(score=ScoreFilter(above=0.8)))
    assert texts(found.parts["train"]) == [comment(i)["text"] for i in range(1, 40, 2)]
    assert found.counts == {
        "rows": 41, "below_threshold": 20, "overlapping": 0, "repeated": 1, "train": 20,
    }  # fmt: skip


def test_no_text_of_an_excluded_file_is_left(comments, tmp_path):
    pairs = [
        {"instruction": "x", "output": comment(3)["text"].upper()},
        {"instruction": "y", "output": "no"},
    ]
    other = [comment(5), comment(100)]
    files = [table(tmp_path / "a.jsonl", pairs), table(tmp_path / "b.jsonl", other)]
    found = select(comments, RowChoice(), files)
    left = set(texts(found.parts["train"]))
    assert not left & {comment(3)["text"], comment(5)["text"]}
    assert found.counts["overlapping"] == 2 and len(left) == 38


def test_short_comments_count_and_short_answers_do_not(tmp_path):
    taken = [table(tmp_path / "t.jsonl", [{"instruction": "Say no at once.", "output": "No!"}])]
    comments = table(tmp_path / "c.jsonl", [{"text": "no"}, {"text": "NO."}, {"text": "yes"}])
    found = select(comments, RowChoice(), taken)
    assert texts(found.parts["train"]) == ["yes"] and found.counts["overlapping"] == 2
    rows = [{"instruction": f"Is it number {i}, then?", "output": "no"} for i in range(3)]
    assert select(table(tmp_path / "r.jsonl", rows), RowChoice(), taken).parts["train"] == rows


def test_the_part_set_aside_shares_nothing_with_the_rest_and_the_seed_decides(comments):
    choice = RowChoice(samples=10, validation_size=5, seed=3)
    found = select(comments, choice).parts
    train, held = texts(found["train"]), texts(found["validation"])
    assert (len(train), len(held)) == (10, 5) and not set(train) & set(held)
    order = texts(comments.rows)
    assert train == sorted(train, key=order.index), "in the order of the file"
    assert select(comments, choice).parts == found
    assert select(comments, RowChoice(samples=10, validation_size=5, seed=4)).parts != found


def test_comments_become_answers_to_the_instructions_in_turn(comments):
    found = select(comments, RowChoice(instructions=("Write.", "Reply."))).parts["train"]
    assert [row["instruction"] for row in found[:3]] == ["Write.", "Reply.", "Write."]
    assert all(
        row["input"] == "" and row["output"] == comments.rows[row["row"]]["text"] for row in found
    )


def test_an_instruction_holds_the_first_half_of_a_comment_and_the_answer_is_the_rest(comments):
    choice = RowChoice(instructions=("Finish {beginning}",))
    rows = select(comments, choice).parts["train"]
    whole = {row["text"] for row in comments.rows}
    for row in rows:
        first, rest = row["instruction"].removeprefix("Finish "), row["output"]
        assert f"{first} {rest}" in whole and len(rest.split()) - len(first.split()) in (0, 1)


def test_instructions_are_chosen_as_they_are(tmp_path):
    rows = [
        {"instruction": f"do the thing number {i} now", "input": "", "output": f"o{i}"}
        for i in range(6)
    ]
    taken = table(tmp_path / "test.jsonl", [{"prompt": "Do the thing, number 4, now."}])
    found = select(table(tmp_path / "rows.jsonl", rows), RowChoice(), [taken])
    assert found.parts["train"] == rows[:4] + rows[5:]


def test_too_few_rows_are_refused(comments):
    with pytest.raises(DataError, match="too few rows are left; found 40, expected at least 41"):
        select(comments, RowChoice(samples=40, validation_size=1))
    with pytest.raises(DataError, match="no row with toxicity above 1"):
        select(comments, RowChoice(score=ScoreFilter(above=1.0)))
    with pytest.raises(DataError, match="no score column"):
        select(comments, RowChoice(score=ScoreFilter("rude", 0.1)))
    with pytest.raises(DataError, match="too few rows are left; found 0"):
        select(comments, RowChoice(), [comments])
