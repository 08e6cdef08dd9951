"""Columns, classes and predictions on the command line: the same in every program."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from support.training_bench import make_base

from pem_composition.cli import main

pytestmark = pytest.mark.slow

COLUMNS = ("--text_column_names", "body", "--label_column_name", "mood")
CLASSES = ("ok", "bad", "good")  # not sorted


def table(path, labels, *, times=4, header=("body", "mood")):
    """Rows whose text names their label, in turn."""
    with path.open("w", newline="") as file:
        rows = [[f"w{i} {word} w{i + 1}", word] for i in range(times) for word in labels]
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base and a module of three classes in an order of its own."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rows")
    make_base(folder / "base", dropout=0.0)
    train = table(folder / "train.csv", CLASSES)
    argv = [
        "train", "--model_name_or_path", folder / "base", "--train_file", train, *COLUMNS,
        "--labels", *CLASSES, "--max_steps", 8, "--learning_rate", 0.02, "--disable_tqdm",
        "--output_dir", folder / "module",
    ]  # fmt: skip
    assert main([str(a) for a in argv]) == 0
    return folder


def flags(made, file, *more):
    return ["--model_name_or_path", made / "base", "--validation_file", file, *COLUMNS, *more]


def test_rows_without_one_class_are_scored_in_the_module_s_order(pem, made, tmp_path):
    """Oracle: the model's own logits, by word."""
    rows = table(tmp_path / "two.csv", ("good", "bad"))
    out = tmp_path / "out"
    done = pem("evaluate", "--adapter", made / "module", *flags(made, rows),
               "--output_dir", out, "--do_predict")  # fmt: skip
    assert done.code == 0, done.err
    assert "text in body; label in mood; 3 classes of the model: ok, bad, good" in done.out
    gold, said, shares = answers(made, rows)
    found = [json.loads(line) for line in (out / "predict_results_file.jsonl").open()]
    assert [r["prediction"] for r in found] == said
    given = [[r["probabilities"][word] for word in CLASSES] for r in found]
    np.testing.assert_allclose(given, shares, atol=1e-5)
    lines = (out / "predict_results_file.txt").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{word}" for i, word in enumerate(said))]
    scores = json.loads((out / "eval_results.json").read_text())
    assert scores["eval_accuracy"] == np.mean(np.array(gold) == np.array(said))
    expected = f1_score(gold, said, average="macro", zero_division=0.0)
    assert scores["eval_f1_macro"] == pytest.approx(expected)


def answers(made, path):
    """Gold words, predicted words and probabilities by plain PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(made / "base", num_labels=3)
    model = PeftModel.from_pretrained(base, made / "module").eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    rows = list(csv.DictReader(path.open()))
    with torch.no_grad():
        logits = [model(**tokenizer(r["body"], return_tensors="pt")).logits[0] for r in rows]
    shares = torch.stack(logits).softmax(-1).numpy()
    return [r["mood"] for r in rows], [CLASSES[i] for i in shares.argmax(1)], shares


PROGRAMS = {
    "evaluate": ["evaluate", "--adapter", "MODULE"],
    "fisher": ["fisher", "--adapter", "MODULE", "--split", "validation", "--output_dir", "OUT"],
    "gram": ["gram", "--adapter", "MODULE", "--split", "validation", "--output_dir", "OUT"],
    "sweep": ["sweep", "-a", "MODULE", "MODULE", "-p", "OUT", "--grid", "0", "1", "1"],
    "learn": ["learn", "-a", "MODULE", "MODULE", "-p", "OUT", "--max_steps", "1"],
    "search": ["search", "-a", "MODULE", "MODULE", "-p", "OUT", "--sampler", "grid",
               "--grid", "0", "1", "1"],
    "merge": ["merge", "-a", "MODULE", "MODULE", "-p", "OUT", "--grid", "0", "1", "1",
              "--evaluate"],
}  # fmt: skip


def argv(made, name, out, rows, *more):
    places = {"MODULE": made / "module", "OUT": out}
    return [*(places.get(word, word) for word in PROGRAMS[name]), *flags(made, rows, *more)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_takes_columns_and_the_module_s_classes(pem, made, tmp_path, name):
    rows = table(tmp_path / "two.csv", ("good", "bad"))
    done = pem(*argv(made, name, tmp_path / "out", rows))
    assert done.code == 0, done.err
    assert "text in body; label in mood; 3 classes of the model: ok, bad, good" in done.out


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_refuses_a_class_that_the_module_does_not_know(pem, made, tmp_path, name):
    rows = table(tmp_path / "new.csv", ("good", "awful"))
    done = pem(*argv(made, name, tmp_path / "out", rows))
    assert done.code == 2
    assert "unknown label; found 'awful', expected one of ok (0), bad (1), good (2)" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_takes_labels_and_refuses_others_than_the_module_s(pem, made, tmp_path, name):
    rows = table(tmp_path / "two.csv", ("good", "bad"))
    done = pem(*argv(made, name, tmp_path / "out", rows, "--labels", "bad", "good", "best"))
    assert done.code == 2
    assert "best" in done.err and "ok" in done.err
    assert not (tmp_path / "out").exists()
    done = pem(*argv(made, name, tmp_path / "out", rows, "--labels", *CLASSES))
    assert done.code == 0, done.err
    assert "3 classes as given: ok, bad, good" in done.out


@pytest.mark.parametrize("order", [("bad", "good", "ok"), ("good", "ok", "bad")])
def test_words_mean_the_same_in_whichever_order_they_are_named(pem, made, tmp_path, order):
    rows = table(tmp_path / "two.csv", ("good", "bad", "ok", "bad"))
    gold, said, shares = answers(made, rows)
    out = tmp_path / "out"
    done = pem("evaluate", "--adapter", made / "module", *flags(made, rows, "--labels", *order),
               "--output_dir", out, "--do_predict")  # fmt: skip
    assert done.code == 0, done.err
    found = [json.loads(line) for line in (out / "predict_results_file.jsonl").open()]
    assert [r["prediction"] for r in found] == said
    scores = json.loads((out / "eval_results.json").read_text())
    assert scores["eval_accuracy"] == np.mean(np.array(gold) == np.array(said))
    right = [row[CLASSES.index(word)] for row, word in zip(shares, gold, strict=True)]
    assert scores["eval_loss"] == pytest.approx(-np.log(right).mean(), abs=1e-5)
    done = pem("sweep", "-a", made / "module", made / "module", "-p", tmp_path / "sweep",
               "--grid", 0, 1, 1, *flags(made, rows, "--labels", *order))  # fmt: skip
    assert done.code == 0, done.err
    records = map(json.loads, (tmp_path / "sweep/results.jsonl").open())
    assert {r["score"] for r in records if "score" in r} == {scores["eval_accuracy"]}


@pytest.mark.parametrize("whole", [False, True])
def test_heads_without_names_take_the_indices_of_their_outputs(pem, made, tmp_path, whole):
    """A module of plain PEFT, or a classifier of transformers, neither of which names classes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    count = 2 if whole else 3
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(made / "base", num_labels=count)
    if not whole:
        lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
        model = get_peft_model(model, lora)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(tmp_path / "model")
    path = table(tmp_path / "ones.csv", ("1",), header=("text", "label"))
    base = tmp_path / "model" if whole else made / "base"
    adapter = [] if whole else ["--adapter", tmp_path / "model"]
    done = pem("evaluate", "--model_name_or_path", base, *adapter, "--validation_file", path)
    assert done.code == 0, done.err
    assert f"{count} classes of the model: LABEL_0, LABEL_1" in done.out


HUB_ORDER = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")  # of roberta-large-mnli


def test_a_classifier_of_mnli_in_another_order_is_scored_by_its_words(pem, made, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = dict(enumerate(HUB_ORDER))
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        made / "base", num_labels=3, id2label=names, label2id={w: i for i, w in names.items()}
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    words = ("entailment", "neutral", "contradiction")
    rows = [
        {"premise": f"w{i} good", "hypothesis": f"bad w{i * 7 % 30}", "label": words[i % 3]}
        for i in range(24)
    ]
    batches = [tokenizer(r["premise"], r["hypothesis"], return_tensors="pt") for r in rows]
    with torch.no_grad():  # centred, so that every class is predicted for some rows
        model.classifier.bias -= torch.cat([model(**batch).logits for batch in batches]).mean(0)
        said = [HUB_ORDER[model(**batch).logits.argmax()] for batch in batches]
    assert set(said) == set(HUB_ORDER)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path, out = tmp_path / "dev.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = pem("evaluate", "--model_name_or_path", tmp_path / "model", "--task_name", "mnli",
               "--validation_file", path, "--do_predict", "--output_dir", out)  # fmt: skip
    assert done.code == 0, done.err
    found = (out / "predict_results_mnli.txt").read_text().splitlines()[1:]
    assert [line.split("\t")[1].upper() for line in found] == said
    scores = json.loads((out / "eval_results.json").read_text())
    right = [row["label"].upper() == word for row, word in zip(rows, said, strict=True)]
    assert scores["eval_accuracy"] == np.mean(right)


@pytest.mark.slow
def test_training_goes_on_with_the_classes_of_the_initial_module(pem, made, tmp_path):
    init = tmp_path / "init"
    start = ["--model_name_or_path", made / "base", "--labels", *CLASSES, "--output_dir", init]
    assert pem("init", *start).code == 0
    rows = table(tmp_path / "two.csv", ("good", "bad"))
    done = pem(
        "train", "--model_name_or_path", made / "base", "--train_file", rows, *COLUMNS,
        "--init_from", init, "--max_steps", 1, "--output_dir", tmp_path / "out", "--disable_tqdm",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out/pem.json").read_text())
    assert record["head"]["labels"] == list(CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False, None])
def test_a_run_predicts_test_rows_whether_labelled_or_not(pem, made, tmp_path, labelled):
    words = {True: CLASSES, False: ("",), None: ("ok", "")}[labelled]
    test = table(tmp_path / "test.csv", words)
    done = pem(
        "train", "--model_name_or_path", made / "base", "--train_file", made / "train.csv",
        *COLUMNS, "--labels", *CLASSES, "--max_steps", 8, "--learning_rate", 0.02, "--disable_tqdm",
        "--output_dir", tmp_path / "out", "--do_predict", "--test_file", test,
    )  # fmt: skip
    assert done.code == 0, done.err
    said = (tmp_path / "out/predict_results_file.txt").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in said] == answers(made, test)[1]
    assert (tmp_path / "out/test_results.json").exists() == (labelled is True)
    assert ("without a label: predicted, not scored" in done.out) == (labelled is not True)


@pytest.mark.slow
def test_an_earlier_run_s_predictions_do_not_survive_another_run(pem, made, tmp_path):
    run = [
        "train", "--model_name_or_path", made / "base", "--train_file", made / "train.csv",
        *COLUMNS, "--disable_tqdm", "--output_dir", tmp_path / "out", "--max_steps",
    ]  # fmt: skip
    test = table(tmp_path / "test.csv", ("ok",))
    assert pem(*run, 1, "--do_predict", "--test_file", test).code == 0
    assert (tmp_path / "out/predict_results_file.txt").exists()
    assert pem(*run, 2).code == 0
    assert not list((tmp_path / "out").glob("predict_results_*"))


@pytest.mark.slow
def test_scores_of_a_regression_are_written_with_three_digits(pem, made, tmp_path):
    rows = table(tmp_path / "train.csv", ("0.5", "2"))
    test = table(tmp_path / "test.csv", ("1", "2"))  # whole numbers, and still scores
    done = pem(
        "train", "--model_name_or_path", made / "base", "--train_file", rows, *COLUMNS,
        "--max_steps", 1, "--output_dir", tmp_path / "out", "--disable_tqdm",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "scores (regression), from the rows; --do_regression false for classes" in done.out
    done = pem("evaluate", "--adapter", tmp_path / "out", *flags(made, test), "--do_predict",
               "--output_dir", tmp_path / "eval")  # fmt: skip
    assert done.code == 0, done.err
    lines = (tmp_path / "eval/predict_results_file.txt").read_text().splitlines()
    found = [json.loads(line) for line in (tmp_path / "eval/predict_results_file.jsonl").open()]
    assert lines[1:] == [f"{r['index']}\t{r['prediction']:3.3f}" for r in found]
    assert "probabilities" not in found[0]


def test_both_validation_sets_of_mnli_in_one_evaluation(pem, made, tmp_path):
    """Each with the numbers of an evaluation of its own."""
    header = ("premise", "hypothesis", "label")
    for name, shift in (("dev_matched", 0), ("dev_mismatched", 1)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            words = ("entailment", "neutral", "contradiction")
            rows = [
                [f"w{i} good", f"bad w{i + shift}", words[i * (i + shift) % 3]] for i in range(9)
            ]
            csv.writer(file).writerows([header, *rows])
    own = ["evaluate", "--model_name_or_path", made / "base", "--task_name", "mnli", "--data_dir",
           tmp_path, "--seed", 3, "--output_dir"]  # fmt: skip
    both = ("validation", "validation_mismatched")
    done = pem(*own, tmp_path / "both", "--split", *both, "--do_predict")
    assert done.code == 0, done.err
    scores = json.loads((tmp_path / "both/eval_results.json").read_text())
    for split, suffix in zip(both, ("", "_mm"), strict=True):
        assert pem(*own, tmp_path / split, "--split", split).code == 0
        alone = json.loads((tmp_path / split / "eval_results.json").read_text())
        for name in ("accuracy", "f1_macro", "loss", "samples"):
            assert scores[f"eval_{name}{suffix}"] == alone[f"eval_{name}{suffix}"]
    assert scores["eval_loss"] != scores["eval_loss_mm"]
    for name in ("mnli", "mnli-mm"):
        assert len((tmp_path / f"both/predict_results_{name}.txt").read_text().splitlines()) == 10


def test_unlabelled_rows_are_predicted_only_when_asked(pem, made, tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("body\nw1 good\nw2 bad\n")
    run = ["evaluate", "--model_name_or_path", made / "base", "--adapter", made / "module",
           "--test_file", path, "--split", "test", "--text_column_name", "body"]  # fmt: skip
    done = pem(*run)
    assert done.code == 2
    assert "cannot score unlabelled rows; found 2 without a label" in done.err
    done = pem(*run, "--do_predict", "--output_dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert len((tmp_path / "out/predict_results_file.txt").read_text().splitlines()) == 3
    done = pem(*run, "--do_predict")
    assert done.code == 2
    assert "--do_predict: writes classes or scores of rows to a folder" in done.err


@pytest.mark.parametrize("flag", ["--labels a b", "--label_column_name x", "--do_regression"])
@pytest.mark.parametrize("objective", [["causal_lm"], ["seq2seq", "--target", "next_block"]])
def test_flags_of_labels_are_refused_where_no_label_is_read(pem, made, tmp_path, flag, objective):
    done = pem(
        "train", "--model_name_or_path", made / "base", "--train_file", made / "train.csv",
        "--output_dir", tmp_path / "out", "--objective", *objective, *flag.split(),
    )  # fmt: skip
    assert done.code == 2
    assert "has no effect without labelled rows" in done.err
