"""``pem judge``: training, the table, the file of scores, and one line per mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.jsonl import read_jsonl, write_jsonl

from pem_composition.evaluation import toxicity

RUDE, KIND = "you are a stupid awful liar", "thanks for the kind and lovely help"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"text": f"{RUDE if i % 3 == 0 else KIND} {i}", "label": ("offensive", "fine")[i % 3 > 0]}
        for i in range(60)
    ]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", rows[:9])
    return folder


@pytest.fixture
def judge(data, tmp_path, pem):
    done = pem("judge", "train", "--data", data, "--output_dir", tmp_path / "judge")
    assert done.code == 0, done.err
    return tmp_path / "judge"


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": RUDE, "y": 1}, {"text": KIND, "y": 0}, {"text": "", "y": 0}]
    rows.append({"text": f"{KIND} 1", "y": 0})  # a training text
    return write_jsonl(tmp_path / "texts.jsonl", rows)


def test_training_says_what_it_did_and_writes_a_judge(data, tmp_path, pem):
    done = pem("judge", "train", "--data", data, "--output_dir", tmp_path / "j")
    assert done.code == 0
    assert "trained on 60 texts, 33.3% toxic" in done.out
    assert "AUC on the validation part 1.0000" in done.out
    assert toxicity.load_judge(tmp_path / "j").score([RUDE, KIND]).argmax() == 0


def test_a_judge_is_replaced_only_if_asked(data, judge, pem):
    again = ("judge", "train", "--data", data, "--output_dir", judge)
    done = pem(*again)
    assert done.code == 2 and str(judge) in done.err
    assert pem(*again, "--overwrite").code == 0


def test_the_table_and_the_file_hold_what_the_judge_says(judge, texts, tmp_path, pem):
    out = tmp_path / "scores.jsonl"
    done = pem("judge", "score", "--judge", judge, "--texts", texts, "--output", out)
    assert done.code == 0, done.err
    rows = read_jsonl(out)
    words = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    scores = toxicity.load_judge(judge).score(words)
    assert [row["text"] for row in rows] == words
    np.testing.assert_array_equal([row["score"] for row in rows], scores)
    table = dict(line.split("  ", 1) for line in done.out.splitlines())
    spoken = np.array(toxicity.spoken(words))
    assert table["mean score"].strip().startswith(f"{scores[spoken].mean():.4f} +- ")
    assert table["with words"].strip() == "3; 1 empty ones have no score"
    assert table["empty"].strip() == "0.2500 (95 % 0.0456 to 0.6994)"
    assert table["seen in training"].strip() == "1"
    assert "AUC" not in done.out


def test_json_holds_the_identity_and_the_threshold(judge, texts, pem):
    done = pem("judge", "score", "--judge", judge, "--texts", texts, "--threshold", 0.1, "--json")
    facts = json.loads(done.out)
    identity = toxicity.load_judge(judge).identity
    assert facts["judge"] == vars(identity)
    words = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    scores = toxicity.load_judge(judge).score(words)
    expected = toxicity.summarise(scores, toxicity.spoken(words), 0.1) | toxicity.form(words)
    assert {k: facts[k] for k in expected} == expected


def test_labels_add_the_auc_with_and_without_training_texts(judge, texts, pem):
    labels = ("--label_column", "y", "--toxic_label", 1, "--json")
    facts = json.loads(pem("judge", "score", "--judge", judge, "--texts", texts, *labels).out)
    assert (facts["toxic_rows"], facts["other_rows"], facts["seen_in_training"]) == (1, 3, 1)
    assert facts["auc"]["value"] == facts["auc_unseen"]["value"] == 1.0


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", (), "the file is empty"),
        ('{"body": "x"}\n', (), "no column 'text'; found body"),
        ('{"text": 3}\n', (), "line 1: column 'text' is no text; found int"),
        ('{"text": "x", "y": 0}\n', ("--label_column", "y"), "no row has the toxic label; found 0"),
        ('{"text": "x"}\n', ("--judge", "nowhere"), "no such judge; found nowhere"),
        ('{"text": "x"}\n', ("--threshold", 1.5), "--threshold: cannot be used"),
        ('{"text": "x"}\n', ("--data", "x"), "--data: has no effect without train"),
        ('{"text": "x"}\n', ("--output", "no/such/folder.jsonl"), "no such folder"),
    ],
)
def test_a_mistake_is_one_line(content, flags, message, judge, tmp_path, pem):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    first = () if "--judge" in flags else ("--judge", judge)
    done = pem("judge", "score", "--texts", path, *first, *flags)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and done.err.count("\n") == 1


def test_an_output_that_exists_is_not_lost(judge, texts, tmp_path, pem):
    out = tmp_path / "scores.jsonl"
    out.write_text("precious\n")
    command = ("judge", "score", "--judge", judge, "--texts", texts, "--output", out)
    done = pem(*command)
    assert done.code == 2 and "--overwrite" in done.err
    assert out.read_text() == "precious\n"
    assert pem(*command, "--overwrite").code == 0
    assert len(out.read_text().splitlines()) == 4
    assert not list(tmp_path.glob(".scores*"))


@pytest.mark.parametrize("action", ["train", "score"])
def test_what_is_needed_is_named(action, pem):
    done = pem("judge", action)
    needed = {"train": "--output_dir", "score": "--texts"}[action]
    assert done.code == 2 and f"{needed}: pem judge {action} needs it" in done.err
