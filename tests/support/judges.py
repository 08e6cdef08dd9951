"""A judge of toxicity that is trained in a moment."""

from __future__ import annotations

import json
from pathlib import Path

from pem_composition.evaluation.toxicity import tfidf


def write_judge(folder: Path, rude: str, kind: str) -> Path:
    """A judge that tells the words of ``rude`` from those of ``kind``."""
    data = folder / "judge-data"
    data.mkdir()
    rows = [
        {"text": rude if i % 3 == 0 else kind, "label": ("offensive", "fine")[i % 3 > 0]}
        for i in range(60)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tfidf.train(data, folder / "judge", "words")
    return folder / "judge"
