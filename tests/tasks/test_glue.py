"""Tasks as data: label order, metrics and hub names are the published ones."""

from __future__ import annotations

import pytest

from pem_composition import offline
from pem_composition.errors import DataError
from pem_composition.tasks.data import RowFiles, TaskData, load_task
from pem_composition.tasks.glue import TASKS, get_task, text_columns

# From the GLUE data set card: the order of the ClassLabel names, and the metrics of the task.
GLUE = {
    "cola": (("unacceptable", "acceptable"), {"matthews_correlation"}),
    "sst2": (("negative", "positive"), {"accuracy"}),
    "mrpc": (("not_equivalent", "equivalent"), {"accuracy", "f1"}),
    "qqp": (("not_duplicate", "duplicate"), {"accuracy", "f1"}),
    "stsb": ((), {"pearson", "spearmanr"}),
    "mnli": (("entailment", "neutral", "contradiction"), {"accuracy"}),
    "qnli": (("entailment", "not_entailment"), {"accuracy"}),
    "rte": (("entailment", "not_entailment"), {"accuracy"}),
    "wnli": (("not_entailment", "entailment"), {"accuracy"}),
}


@pytest.mark.parametrize("name", GLUE)
def test_labels_and_metrics_are_glues(name):
    task = TASKS[name]
    assert (task.labels, set(task.metrics)) == GLUE[name]
    assert task.primary in task.metrics
    assert task.hub == ("nyu-mll/glue", name)
    assert task.num_labels == (1 if name == "stsb" else len(task.labels))
    assert task.regression == (name == "stsb")


# From the data set cards: hub name, text column, number of published validation splits.
SENTIMENT = {
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", "text", 1),
    "imdb": ("stanfordnlp/imdb", "text", 1),  # by package name, where it has one
    "amazon_polarity": ("fancyzhx/amazon_polarity", "content", 0),
    "yelp_polarity": ("fancyzhx/yelp_polarity", "text", 0),
}


@pytest.mark.parametrize("name", SENTIMENT)
def test_sentiment_domains_of_the_hub(name):
    task, (hub, column, validation) = TASKS[name], SENTIMENT[name]
    assert task.hub == (hub, None)
    assert task.text_columns == (column, None)
    assert task.labels == ("negative", "positive")
    assert len(task.validation_splits) == validation


CORPORA = {"toxic_comments", "wikitext2"}  # read by judges and language models, not as tasks


def test_every_domain_by_package_name_is_a_task():
    names = {asset.name for asset in offline.ASSETS.values() if asset.kind == "data"} - CORPORA
    assert {task.offline for task in TASKS.values()} - {None} == names
    assert all(TASKS[name].labels == ("negative", "positive") for name in names)


def test_a_task_without_published_validation_rows_says_where_they_come_from(tmp_path):
    lines = '{"content": "fine", "label": 1}\n{"content": "poor", "label": 0}\n'
    (tmp_path / "train.jsonl").write_text(lines)
    data = load_task("amazon_polarity", RowFiles(data_dir=tmp_path))
    assert [e.text for e in data.train] == ["fine", "poor"]
    with pytest.raises(
        DataError, match=r"give --validation_file, or .* pem split --validation_size"
    ):
        _ = data.validation
    rte = TaskData(TASKS["rte"], {}, {})
    with pytest.raises(DataError, match=r"give --validation_file$"):
        _ = rte.validation


def test_mnli_is_validated_on_the_matched_split():
    assert TASKS["mnli"].validation_splits == ("validation_matched", "validation_mismatched")


def test_spellings_of_the_published_folders_name_the_task():
    for spelling, name in (("SST-2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola")):
        assert get_task(spelling) is TASKS[name]


def test_an_unknown_task_gets_a_suggestion():
    with pytest.raises(DataError, match=r"found 'mnly', expected one of cola.*did you mean mnli\?"):
        get_task("mnly")


def test_a_class_is_known_by_word_and_by_number():
    rte = TASKS["rte"]
    assert [rte.label_id(v) for v in ("entailment", "not_entailment", 0, "1")] == [0, 1, 0, 1]
    for wrong in ("contradiction", 2, "-1", -1, "True"):
        with pytest.raises(DataError, match=r"one of entailment \(0\), not_entailment \(1\)"):
            rte.label_id(wrong)


def test_text_columns_of_a_file_without_a_task():
    assert text_columns(["idx", "sentence", "label"], None, ["sentence"]) == ("sentence", None)
    assert text_columns(["question", "sentence"], None, []) == ("question", "sentence")
    assert text_columns(["a", "b", "c"], None, ["b", "c"]) == ("b", "c")
    assert text_columns(["a"], None, []) is None


def test_a_known_task_takes_other_usual_names_of_its_arity_only():
    assert text_columns(["premise", "hypothesis"], TASKS["rte"], []) == ("premise", "hypothesis")
    assert text_columns(["text"], TASKS["cola"], []) == ("text", None)
    assert text_columns(["sentence"], TASKS["rte"], []) is None
    assert text_columns(["sentence1", "sentence2"], TASKS["sst2"], []) is None
