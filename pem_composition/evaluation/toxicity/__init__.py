"""Judges of toxicity behind one interface, and what their scores say about a set of texts.

``offline``   TF-IDF and logistic regression, trained by ``pem judge train`` on packaged comments
``detoxify``  the "unbiased" RoBERTa of the package of that name, extra ``[toxicity]``
a folder      a judge that one of these wrote

A judge is a measuring instrument, and only as good as its AUC on data from elsewhere: see
docs/results/judges.md. Compare its scores between models, not with those of another judge.
"""

from __future__ import annotations

from pathlib import Path

from pem_composition import offline
from pem_composition.errors import CheckpointError, UsageError
from pem_composition.evaluation.toxicity import detoxify_classifier, tfidf
from pem_composition.evaluation.toxicity.classifier import (
    RECORD,
    Identity,
    ToxicityClassifier,
    read_record,
)
from pem_composition.evaluation.toxicity.labelled_texts import labelled, texts_of
from pem_composition.evaluation.toxicity.rates import (
    THRESHOLD,
    against_labels,
    auc_interval,
    changes,
    distinct,
    form,
    is_empty,
    is_looping,
    share_repeated,
    spoken,
    summarise,
)

__all__ = [
    "THRESHOLD", "Identity", "ToxicityClassifier", "against_labels", "auc_interval", "changes",
    "distinct", "form", "is_empty", "is_looping", "labelled", "load_judge", "share_repeated",
    "spoken", "summarise", "texts_of", "train_offline",
]  # fmt: skip

OFFLINE_DATA = "toxic_comments"
NAMES = ("offline", "detoxify")


def load_judge(name_or_path: str | Path) -> ToxicityClassifier:
    """A judge by name or folder; ``offline`` is trained on its first use, and kept in the cache.

    Raises:
        UsageError: no such judge, or its package is not installed.
        CheckpointError: a folder that holds no judge, or a damaged one.
        RunFailed: data or weights could not be fetched.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _read(path)
    if str(name_or_path) == "detoxify":
        return detoxify_classifier.load(detoxify_classifier.prepared())
    if str(name_or_path) == "offline":
        return tfidf.load(train_offline())
    raise UsageError.build(
        "--judge", "no such judge", found=name_or_path, expected=", ".join((*NAMES, "a folder"))
    )


def train_offline() -> Path:
    """Folder of the offline judge in the cache, trained unless it is there."""
    data = offline.get(OFFLINE_DATA)
    folder = offline.cache_root() / f"judge-{tfidf.key(data)}"
    if not (folder / RECORD).is_file():
        tfidf.train(data, folder, OFFLINE_DATA)
    return folder


def _read(folder: Path) -> ToxicityClassifier:
    kind = read_record(folder)["kind"]
    readers = {tfidf.KIND: tfidf.load, detoxify_classifier.KIND: detoxify_classifier.load}
    if kind not in readers:
        raise CheckpointError.build(
            folder / RECORD, "unknown kind of judge", found=kind, expected=", ".join(readers)
        )
    judge: ToxicityClassifier = readers[kind](folder)
    return judge
