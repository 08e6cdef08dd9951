"""The skewed halves: sizes, shares, disjointness over random tables; the reference's rule."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pem_composition import cli
from pem_composition.errors import DataError
from pem_composition.tasks.data import RowFiles, load_task
from pem_composition.tasks.halves import (
    SplitConfig,
    make_split,
    reference_halves,
    skewed_halves,
    write_split,
)
from pem_composition.tasks.sampling import allocate, stratified_sample
from pem_composition.tasks.tables import read_table


def table(counts: list[int], seed: int = 0) -> list[int]:
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(seed).shuffle(labels)
    return labels


class_counts = st.lists(st.integers(2, 60), min_size=2, max_size=4)


@given(class_counts, st.integers(1, 10), st.integers(0, 3))
def test_halves_are_disjoint_complete_and_equal(counts, tenths, seed):
    labels = table(counts, seed)
    halves = skewed_halves(labels, 0, tenths / 10, seed=seed)
    assert sorted(halves.first + halves.second) == list(range(len(labels)))
    assert (len(halves.first), len(halves.second)) == (len(labels) // 2, -(-len(labels) // 2))
    assert halves.share_reached == sum(labels[i] == 0 for i in halves.first) / counts[0]


@given(class_counts, st.integers(1, 9))
def test_the_paper_rule_wherever_it_fits_else_the_same_rule_on_the_others(counts, tenths):
    labels = table(counts)
    n, n0, half = len(labels), counts[0], len(labels) // 2
    halves = skewed_halves(labels, 0, tenths / 10)
    k0 = sum(labels[i] == 0 for i in halves.first)
    wanted = tenths * n0 // 10
    if wanted < half and n0 - wanted < n - half:
        assert (halves.rule, k0) == ("paper", wanted)
    else:
        others_in_second = sum(labels[i] != 0 for i in halves.second)
        assert halves.rule == "complement"
        assert others_in_second == tenths * (n - n0) // 10


def test_two_classes_at_eighty_percent_as_in_the_paper():
    halves = skewed_halves(table([1249, 1241]), 0)  # RTE
    assert halves.share_reached == pytest.approx(0.8, abs=1e-3)
    labels = table([1249, 1241])
    assert Counter(labels[i] for i in halves.first) == {0: 999, 1: 246}
    assert Counter(labels[i] for i in halves.second) == {0: 250, 1: 995}


def test_three_classes_skew_the_key_class_only():
    labels = table([300, 300, 300])
    halves = skewed_halves(labels, 2)
    assert Counter(labels[i] for i in halves.first) == {0: 105, 1: 105, 2: 240}
    assert Counter(labels[i] for i in halves.second) == {0: 195, 1: 195, 2: 60}


def test_qqp_where_the_reference_rule_breaks():
    labels = table([12530, 7470])
    with pytest.raises(DataError, match=r"10024 of 12530 key rows in half 0 leave -24 others"):
        reference_halves(labels, 0)
    halves = skewed_halves(labels, 0)
    assert halves.rule == "complement"
    assert Counter(labels[i] for i in halves.second)[1] == 5976  # floor(0.8 * 7470)
    mirrored = skewed_halves(labels, 1)  # the paper's rule, with the other class as key
    assert mirrored.rule == "paper"
    first = Counter(labels[i] for i in halves.first)
    assert first == Counter(labels[i] for i in mirrored.second)


@given(class_counts, st.integers(0, 5))
def test_the_reference_rule_is_the_literal_formula(counts, seed):
    labels = table(counts, seed)
    key = [i for i in range(len(labels)) if labels[i] == 0]
    rest = [i for i in range(len(labels)) if labels[i] != 0]
    a = 4 * len(key) // 5
    b = len(labels) // 2 - a
    if b < 0 or b > len(rest):
        with pytest.raises(DataError, match="--reference_rule"):
            reference_halves(labels, 0)
        return
    halves = reference_halves(labels, 0)
    assert set(halves.first) == set(key[:a]) | set(rest[:b])
    assert set(halves.second) == set(key[a:]) | set(rest[b:])


def test_the_share_is_exact_decimal_arithmetic():
    labels = table([100, 1000])
    assert skewed_halves(labels, 0, 0.29).share_reached == 0.29  # 0.29 * 100 is 28.999... in binary
    assert skewed_halves(labels, 0, 0.57).share_reached == 0.57


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(DataError, match="--share"):
        skewed_halves([0, 0, 1, 1], 0, share)


def test_an_absent_key_class_is_refused():
    with pytest.raises(DataError, match="found 0 of 4 rows in the key class"):
        skewed_halves([0, 0, 1, 1], 2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_allocation_is_proportional_within_one_row(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    counts = allocate(sizes, total)
    assert sum(counts) == total
    for count, size in zip(counts, sizes, strict=True):
        assert abs(count - total * size / sum(sizes)) < 1
        assert count <= size


def test_a_stratified_sample_of_scores_covers_their_range():
    scores = [i / 100 for i in range(500)]
    chosen = stratified_sample(scores, 50, seed=3, regression=True)
    assert Counter(int(scores[i] / 0.5) for i in chosen) == dict.fromkeys(range(10), 5)


def rte_file(folder: Path, n: int = 200) -> Path:
    rng = random.Random(1)
    rows = [
        {"idx": i, "sentence1": f"a {i}", "sentence2": f"b {i}",
         "label": rng.choice(["entailment", "not_entailment"])}
        for i in range(n)
    ]  # fmt: skip
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_tasks_own_validation_rows_are_kept_for_reporting(tmp_path):
    rte_file(tmp_path)
    dev = [{"sentence1": "x", "sentence2": "y", "label": w} for w in ("entailment",) * 2]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in dev))
    argv = ["split", "--task_name", "rte", "--data_dir", str(tmp_path), "--validation_size", "30"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert [r | {"row_id": i} for i, r in enumerate(dev)] == read_table(
        tmp_path / "out/test.jsonl"
    ).rows
    record = json.loads((tmp_path / "out/split.json").read_text())
    assert record["files"]["test.jsonl"]["counts"] == {"entailment": 2}


def test_written_files_are_disjoint_complete_and_say_what_they_are(tmp_path):
    source = rte_file(tmp_path)
    argv = ["split", "--task_name", "rte", "--train_file", str(source), "--samples", "120"]
    argv += ["--validation_size", "30", "--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    rows = {p.stem: read_table(p).rows for p in (tmp_path / "out").glob("*.jsonl")}
    assert {k: len(v) for k, v in rows.items()} == {
        "half-0": 60, "half-1": 60, "all": 120, "validation": 30
    }  # fmt: skip
    ids = {k: [r["row_id"] for r in v] for k, v in rows.items()}
    assert not set(ids["half-0"]) & set(ids["half-1"])
    assert set(ids["half-0"]) | set(ids["half-1"]) == set(ids["all"])
    assert not set(ids["validation"]) & set(ids["all"])
    original = read_table(source).rows
    assert all({k: r[k] for k in original[0]} == original[r["row_id"]] for r in rows["all"])
    assert ids["all"] != sorted(ids["all"])
    record = json.loads((tmp_path / "out/split.json").read_text())
    counts = Counter(r["label"] for r in rows["half-0"])
    assert record["files"]["half-0.jsonl"]["counts"] == counts
    in_both = counts["entailment"] + record["files"]["half-1.jsonl"]["counts"]["entailment"]
    assert record["share_reached"] == counts["entailment"] / in_both
    assert (record["rule"], record["key_class"], record["seed"]) == ("paper", "entailment", 42)


def test_equal_flags_write_equal_bytes_and_another_seed_does_not(tmp_path):
    source = rte_file(tmp_path)
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        argv = ["split", "--task_name", "rte", "--train_file", str(source), "--seed", seed]
        assert cli.main([*argv, "--samples", "100", "--output_dir", str(tmp_path / name)]) == 0
    a, b, c = ((tmp_path / n / "half-0.jsonl").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_a_half_is_a_training_file_whose_row_ids_stay(tmp_path):
    data = load_task("rte", RowFiles(train_file=rte_file(tmp_path)))
    write_split(make_split(data, SplitConfig()), tmp_path / "out")
    half = load_task("rte", RowFiles(train_file=tmp_path / "out/half-1.jsonl")).train
    by_id = {e.row_id: e for e in data.train}
    assert len(half) == 100
    assert all(by_id[e.row_id] == e for e in half)


def test_csv_rows_are_written_with_their_labels_as_numbers(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(20)))
    data = load_task("sst2", RowFiles(train_file=path))
    write_split(make_split(data, SplitConfig()), tmp_path / "out")
    assert {r["label"] for r in read_table(tmp_path / "out/half-0.jsonl").rows} == {0, 1}


def test_regression_is_split_by_the_median_score(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": i / 40} for i in range(200)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = load_task("stsb", RowFiles(train_file=path))
    high = make_split(data, SplitConfig())
    scores = [e.label for e in high.parts["half-0"]]
    assert sum(s > 99.5 / 40 for s in scores) == 80
    low = make_split(data, SplitConfig(key_class="low"))
    assert sum(e.label < 99.5 / 40 for e in low.parts["half-0"]) == 80
    with pytest.raises(DataError, match="found '1', expected high or low"):
        make_split(data, SplitConfig(key_class="1"))


@pytest.mark.parametrize("key", ["neutral", "1"])
def test_real_mnli_by_word_and_by_number(shared, key):
    data = load_task("mnli", RowFiles(data_dir=shared / "data/glue", splits=("train",)))
    split = make_split(data, SplitConfig(key_class=key, samples=3000))
    counts, rest = (split.record["parts"][f"half-{i}"]["counts"] for i in (0, 1))
    assert counts["neutral"] == 4 * (counts["neutral"] + rest["neutral"]) // 5
    assert abs(counts["entailment"] - counts["contradiction"]) < 30


def test_real_rte_by_the_reference_rule(shared):
    data = load_task("rte", RowFiles(data_dir=shared / "data/glue", splits=("train",)))
    split = make_split(data, SplitConfig(reference_rule=True))
    ids = {e.row_id for e in split.parts["half-0"]}
    key = [i for i, e in enumerate(data.train) if e.label == 0]
    rest = [i for i, e in enumerate(data.train) if e.label == 1]
    assert ids == set(key[:999]) | set(rest[:246])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--key_class", "neutral"], "--key_class: no such class in rte; found 'neutral'"),
        (["--share", "2"], "--share: not a share; found 2.0"),
        (["--samples", "1"], "--samples: too few"),
        (["--validation_size", "200"], "--validation_size: not a part of the training set"),
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl: cannot read rows"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, flags, message):
    source = rte_file(tmp_path)
    argv = ["split", "--task_name", "rte", "--output_dir", str(tmp_path / "out")]
    argv += flags if "--train_file" in flags else ["--train_file", str(source), *flags]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("pem split: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept_unless_told(tmp_path, capsys):
    source = rte_file(tmp_path)
    argv = ["split", "--task_name", "rte", "--train_file", str(source)]
    argv += ["--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    before = (tmp_path / "out/half-0.jsonl").read_bytes()
    assert cli.main([*argv, "--seed", "1"]) == 2
    assert "out" in capsys.readouterr().err
    assert (tmp_path / "out/half-0.jsonl").read_bytes() == before
    assert cli.main([*argv, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "out/half-0.jsonl").read_bytes() != before
