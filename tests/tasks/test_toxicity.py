"""Which documents are learned: every text, or those whose score is above a threshold."""

from __future__ import annotations

import json

import pytest

from pem_composition.errors import DataError
from pem_composition.tasks.data import TRAIN, RowFiles
from pem_composition.tasks.document_rows import ScoreFilter, is_scored, load_documents


def rows(path, *scores, **more):
    lines = [{"text": f"text {i}", "toxicity": s, **more} for i, s in enumerate(scores)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def train(path, chosen=None, **options):
    return load_documents(None, RowFiles(train_file=path, splits=[TRAIN], **options), chosen=chosen)


def test_rows_at_or_below_the_threshold_are_left_out_and_counted(tmp_path):
    path = rows(tmp_path / "t.jsonl", 0.9, 0.8, 0.81, 0.1, None, 1)
    data = train(path, ScoreFilter())
    assert [e.text for e in data.train] == ["text 0", "text 2", "text 5"]
    assert [e.row_id for e in data.train] == [0, 2, 5]
    assert data.notes == (f"{path}: 3 of 6 rows with toxicity above 0.8 kept",)
    assert [e.label for e in data.train] == [None] * 3
    assert [e.text for e in train(path, ScoreFilter(), max_train_samples=2).train] == [
        "text 0",
        "text 2",
    ]
    assert len(train(path).train) == 6 and train(path).notes == ()


def test_scores_are_read_from_any_format_and_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,threat\na,0.3\nb,0.5\nc,\nd,1\n")
    assert [e.text for e in train(path, ScoreFilter("threat", 0.4)).train] == ["b", "d"]


def test_every_split_is_chosen_by_its_score(tmp_path):
    one, two = rows(tmp_path / "a.jsonl", 0.9), rows(tmp_path / "b.jsonl", 0.1, 0.95)
    data = load_documents(None, RowFiles(train_file=one, validation_file=two), chosen=ScoreFilter())
    assert [e.text for e in data.validation] == ["text 1"] and len(data.notes) == 2


@pytest.mark.parametrize(
    ("scores", "chosen", "words"),
    [
        ((0.1, 0.8), ScoreFilter(), ("no row with toxicity above 0.8", "0.8 at most in 2 rows")),
        ((None, None), ScoreFilter(), ("no score at all in 2 rows", "--score_above")),
        ((0.9,), ScoreFilter("rude"), ("no score column", "text, toxicity", "--score_column")),
        ((0.9, "high"), ScoreFilter(), ("line 2", "'toxicity' is not a score", "found str")),
    ],
)
def test_scores_that_choose_nothing_are_refused(tmp_path, scores, chosen, words):
    with pytest.raises(DataError) as error:
        train(rows(tmp_path / "t.jsonl", *scores), chosen)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "text 1" not in str(error.value), "no message quotes a text"


def test_files_without_text_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"comment": "words", "id": "a"}\n')
    with pytest.raises(DataError, match=r"no text column; found comment, id, expected text"):
        train(path)
    path.write_text('{"text": "  "}\n{"text": ""}\n')
    with pytest.raises(DataError, match="no text in any row"):
        train(path)
    path.write_text('{"text": "  "}\n{"text": "word"}\n')
    assert train(path).notes == (f"{path}: 1 rows without text left out",)


def test_civil_comments_is_known_by_its_hub_name_in_any_spelling(tmp_path):
    assert is_scored("civil_comments") and is_scored("Civil-Comments")
    assert not is_scored("sst2") and not is_scored(None)
    path = rows(tmp_path / "t.jsonl", 0.9, 0.1)
    data = load_documents(
        "civil_comments", RowFiles(train_file=path, splits=[TRAIN]), chosen=ScoreFilter()
    )
    assert len(data.train) == 1


def test_the_toxic_comments_at_hand_are_all_above_the_published_threshold(shared):
    path = shared / "data" / "toxicity" / "civil_comments_pem" / "toxic_test.jsonl.gz"
    assert len(train(path, ScoreFilter()).train) == 1674
    assert 0 < len(train(path, ScoreFilter("insult", 0.8)).train) < 1674
