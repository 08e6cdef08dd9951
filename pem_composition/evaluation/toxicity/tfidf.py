"""The offline judge: TF-IDF of words and pairs of words, and logistic regression.

x_j = (1 + ln c_j) ln((1 + N) / (1 + n_j) + 1), scaled to length 1;  score = 1 / (1 + e^-(w x + b)),

with c_j the number of times that term j occurs in the text and n_j the number of the N training
texts that it occurs in. scikit-learn counts and fits. The folder holds no pickle: the terms as
JSON, the numbers as safetensors, and hashes of the training texts, so that a score of a text that
the judge has been trained on is known for one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pem_composition import safe_files
from pem_composition.checkpoint import files
from pem_composition.errors import CheckpointError, DataError
from pem_composition.evaluation.toxicity.classifier import (
    Identity,
    read_record,
    verify,
    write_record,
)
from pem_composition.evaluation.toxicity.labelled_texts import labelled
from pem_composition.evaluation.toxicity.rates import auc_interval
from pem_composition.same_texts import letters
from pem_composition.tasks.tables import read_table

KIND, NAME, VERSION = "tfidf_logistic", "offline", "1"
VOCABULARY, WEIGHTS = "vocabulary.json", "weights.safetensors"
DTYPES = {"idf": "F64", "weights": "F64", "intercept": "F64", "seen": "I64"}
TOXIC_LABEL = "offensive"
# Chosen on the validation part of toxic_comments.
TFIDF: dict[str, Any] = {
    "ngram_range": [1, 2],
    "min_df": 3,
    "sublinear_tf": True,
    "token_pattern": r"(?u)\b\w+\b",
}
REGRESSION: dict[str, Any] = {"C": 4.0, "solver": "liblinear", "random_state": 0, "tol": 1e-4}
SETTINGS = {"tfidf": TFIDF, "regression": REGRESSION}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TfidfJudge:
    """A fitted judge, as read from its folder; t terms."""

    identity: Identity
    vectorizer: TfidfVectorizer
    weights: Floats  # (t,)
    intercept: float
    hashes: NDArray[np.int64]  # sorted

    def score(self, texts: Sequence[str]) -> Floats:
        """Probability (n,) of the toxic class."""
        if not len(texts):
            return np.zeros(0)
        linear = self.vectorizer.transform(texts) @ self.weights + self.intercept
        return np.asarray(expit(linear), np.float64)

    def seen(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the texts (n,) are training texts, up to case and punctuation."""
        return np.isin([text_hash(text) for text in texts], self.hashes)


def text_hash(text: str) -> int:
    """The first eight bytes of the sha256 of the text's letters and digits, as a signed number."""
    digest = hashlib.sha256(letters(text).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def key(data: Path) -> str:
    """Name of a judge by what decides it: the settings and the training rows."""
    decides = [KIND, VERSION, SETTINGS, safe_files.sha256_file(data / "train.jsonl")]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return f"{NAME}-{digest[:12]}"


def train(
    data: Path, folder: Path, name: str, *, toxic_label: str = TOXIC_LABEL, overwrite: bool = False
) -> dict[str, Any]:
    """Fit on ``data/train.jsonl`` (text, label) and write the folder; its facts.

    ``data/validation.jsonl``, where it is there, gives the AUC in the facts.

    Raises:
        DataError: rows that cannot be used, or of one class only.
        CheckpointError: the folder exists, and ``overwrite`` is not set.
    """
    source = data / "train.jsonl"
    texts, toxic = labelled(read_table(source), "text", "label", toxic_label)
    if toxic.all():
        raise DataError.build(source, "one class only", found=toxic_label, expected="others too")
    with safe_files.atomic_directory(folder, overwrite) as out:
        sys.stderr.write(f"training the judge on {len(texts)} texts of {name}\n")
        fit(texts, toxic, out)
        facts = {
            "settings": SETTINGS,
            "data": {"name": name, "sha256": safe_files.sha256_file(source), "rows": len(texts)},
            "toxic_label": toxic_label,
            "toxic_share": float(toxic.mean()),
            "versions": _versions(),
        }
        write_record(out, KIND, NAME, VERSION, **facts)
        if (data / "validation.jsonl").is_file():
            rows = labelled(read_table(data / "validation.jsonl"), "text", "label", toxic_label)
            facts["validation_auc"] = auc_interval(load(out).score(rows[0]), rows[1])._asdict()
    return facts


def fit(texts: Sequence[str], toxic: NDArray[np.bool_], out: Path) -> None:
    """Fit the two stages and write terms and numbers into a folder.

    On one thread: sums of other orders moved the weights by 5e-6, and with them the judge's hash.
    """
    vectorizer = TfidfVectorizer(**_tfidf_options())
    features = vectorizer.fit_transform(texts)
    with threadpool_limits(1):
        regression = LogisticRegression(**REGRESSION).fit(features, toxic)
    numbers = {
        "idf": vectorizer.idf_,
        "weights": regression.coef_[0],
        "intercept": regression.intercept_,
        "seen": np.unique(np.array([text_hash(text) for text in texts], np.int64)),
    }
    terms = vectorizer.get_feature_names_out().tolist()
    safe_files.write_json(out / VOCABULARY, {"terms": terms})
    infos = {n: files.TensorInfo(DTYPES[n], array.shape) for n, array in numbers.items()}
    files.write_safetensors(out / WEIGHTS, infos, lambda n: [numbers[n].tobytes()])


def load(folder: Path) -> TfidfJudge:
    """Read a judge; nothing in its folder can run.

    Raises:
        CheckpointError: damaged, or not a judge of this kind.
    """
    record = read_record(folder)
    identity = verify(folder, record, (VOCABULARY, WEIGHTS))
    if record.get("settings") != SETTINGS:
        raise CheckpointError.build(
            folder, "a judge of other settings than this version's", do="train it again"
        )
    numbers = _numbers(folder / WEIGHTS, folder)
    terms = safe_files.read_json(folder / VOCABULARY, folder).get("terms")
    if not isinstance(terms, list) or not len(terms) == len(numbers["idf"]) == len(set(terms)):
        raise CheckpointError.build(folder / VOCABULARY, "does not fit the weights")

    vocabulary = {str(term): place for place, term in enumerate(terms)}
    vectorizer = TfidfVectorizer(**_tfidf_options(), vocabulary=vocabulary)
    vectorizer.idf_ = numbers["idf"]
    intercept = float(numbers["intercept"][0])
    return TfidfJudge(identity, vectorizer, numbers["weights"], intercept, numbers["seen"])


def _numbers(path: Path, folder: Path) -> dict[str, NDArray[Any]]:
    found = {}
    with files.SafetensorsFile(path, folder) as file:
        kinds = {name: (info.dtype, len(info.shape)) for name, info in file.infos.items()}
        if kinds != {name: (dtype, 1) for name, dtype in DTYPES.items()}:
            raise CheckpointError.build(path, "other tensors", found=kinds, expected=list(DTYPES))
        for name, dtype in DTYPES.items():
            kind = "<f8" if dtype == "F64" else "<i8"
            found[name] = np.frombuffer(file.read(name), kind)
    sizes = (len(found["idf"]), len(found["intercept"]))
    finite = all(np.isfinite(array).all() for array in found.values())
    if not finite or sizes != (len(found["weights"]), 1):
        raise CheckpointError.build(path, "numbers that are not those of one judge")
    return found


def _tfidf_options() -> dict[str, Any]:
    return {**TFIDF, "ngram_range": tuple(TFIDF["ngram_range"]), "dtype": np.float64}


def _versions() -> dict[str, str]:
    return {
        "scikit-learn": sklearn.__version__,
        "scipy": scipy.__version__,
        "numpy": np.__version__,
    }
