"""``pem judge``: train the offline judge of toxicity, or score the texts of a file with a judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pem_composition import json_lines, offline
from pem_composition.errors import UsageError
from pem_composition.flag_declarations import flag, required
from pem_composition.tasks.document_rows import THRESHOLD
from pem_composition.tasks.tables import read_table

NAME = "judge"
HELP = "score texts for toxicity, or train the offline judge that does"
EXAMPLES = """
  pem judge train --data toxic_comments --output_dir judges/offline
  pem judge score --judge offline --texts runs/negated/samples.jsonl --output scores.jsonl
  pem judge score --judge detoxify --texts samples.jsonl --threshold 0.5
  pem judge score --judge judges/offline --texts hatecheck.jsonl --label_column label \\
      --toxic_label hateful
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of ``pem judge``."""

    action: Literal["train", "score"] = required(
        "train the offline judge, or score a file's texts", positional=True
    )
    data: str = flag(
        "toxic_comments",
        "train: an offline name or a folder with train.jsonl (text, label) and, for the AUC, "
        "validation.jsonl",
    )
    output_dir: Path | None = flag(None, "train: folder of the judge to be written", metavar="OUT")
    judge: str = flag("offline", "score: offline, detoxify or a judge's folder")
    texts: Path | None = flag(
        None, "score: rows of texts: jsonl, json, csv, tsv, parquet; .gz", metavar="FILE"
    )
    text_column: str = flag("text", "score: column of the texts")
    label_column: str | None = flag(None, "score: column that says what is toxic; adds the AUC")
    toxic_label: str = flag("offensive", "the label of toxic rows, e.g. 1 or hateful")
    threshold: float = flag(
        THRESHOLD, "score: the share of scores above it is reported", least=0, most=1
    )
    output: Path | None = flag(
        None, "score: where each text goes with its score, as jsonl", metavar="FILE"
    )
    json: bool = flag(False, "score: print one JSON object, no table")
    overwrite: bool = flag(False, "replace an existing output", short="-o")

    NEEDS: ClassVar = {
        "action=train": ("data", "output_dir"),
        "action=score": (
            "judge", "texts", "text_column", "label_column", "threshold", "output", "json",
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        needed = "output_dir" if self.action == "train" else "texts"
        if getattr(self, needed) is None:
            raise UsageError.build(f"--{needed}", f"pem judge {self.action} needs it")


def run(config: Config) -> int:
    """Train and print the facts, or score and print the table."""
    if config.action == "train":
        _train(config)
    else:
        _score(config)
    return 0


def _train(config: Config) -> None:
    from pem_composition.evaluation.toxicity import tfidf

    assert config.output_dir is not None
    name = config.data
    data = Path(offline.resolve(name))
    if not data.is_dir():
        raise UsageError.build(
            "--data", "no such data", found=name, expected="a folder, or a name of pem offline list"
        )
    facts = tfidf.train(
        data, config.output_dir, name, toxic_label=config.toxic_label, overwrite=config.overwrite
    )
    rows = f"{facts['data']['rows']} texts, {facts['toxic_share']:.1%} toxic"
    print(f"{config.output_dir}: trained on {rows}")
    if auc := facts.get("validation_auc"):
        print(f"AUC on the validation part {_interval(auc)}")


def _score(config: Config) -> None:
    from pem_composition.evaluation import toxicity

    assert config.texts is not None
    _check_free(config)
    table, column, toxic = read_table(config.texts), config.text_column, None
    if config.label_column is None:
        texts = toxicity.texts_of(table, column)
    else:
        texts, toxic = toxicity.labelled(table, column, config.label_column, config.toxic_label)
    judge = toxicity.load_judge(config.judge)
    scores = judge.score(texts)
    facts: dict[str, Any] = {"judge": vars(judge.identity), "texts": str(config.texts)}
    facts |= toxicity.summarise(scores, toxicity.spoken(texts), config.threshold)
    facts |= toxicity.form(texts)
    facts |= toxicity.against_labels(judge, texts, scores, toxic)
    if config.output is not None:
        pairs = zip(texts, scores, strict=True)
        json_lines.write(config.output, ({"text": t, "score": float(s)} for t, s in pairs))
    print(json.dumps(facts) if config.json else _table(facts, str(judge.identity)))


def _check_free(config: Config) -> None:
    """Before the work: the output must not be there yet."""
    path = config.output
    if path is not None and path.exists() and not config.overwrite:
        raise UsageError.build(path, "exists", do="give --overwrite to replace it")
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError.build(path, "no such folder", found=path.parent)


def _table(facts: Mapping[str, Any], judge: str) -> str:
    shown = {"judge": judge, "texts": f"{facts['n']} of {facts['texts']}"}
    if facts["with_words"] < facts["n"]:
        empty = facts["n"] - facts["with_words"]
        shown["with words"] = f"{facts['with_words']}; {empty} empty ones have no score"
    error = facts["mean_stderr"]
    mean = "none" if facts["mean"] is None else f"{facts['mean']:.4f}"
    shown["mean score"] = mean if error is None else f"{mean} +- {error:.4f}"
    shown[f"share above {facts['threshold']:g}"] = _share(facts, "toxic")
    for name in ("distinct_1", "distinct_2", "repeated"):
        shown[name.replace("_", "-")] = f"{facts[name]:.4f}"
    for name in ("empty", "looping"):
        shown[name] = _share(facts, name)
    if "seen_in_training" in facts:
        shown["seen in training"] = str(facts["seen_in_training"])
    if "toxic_rows" in facts:
        shown["toxic, other rows"] = f"{facts['toxic_rows']}, {facts['other_rows']}"
    for name, title in (("auc", "AUC"), ("auc_unseen", "AUC, unseen texts")):
        if name in facts:
            shown[title] = _interval(facts[name])
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def _share(facts: Mapping[str, Any], name: str) -> str:
    ends = {"value": facts[name], "low": facts[f"{name}_low"], "high": facts[f"{name}_high"]}
    return "none" if facts[name] is None else _interval(ends)


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.4f} (95 % {found['low']:.4f} to {found['high']:.4f})"
