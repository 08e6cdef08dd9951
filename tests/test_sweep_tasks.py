"""Sweeps over several tasks: text to text on a tiny T5, and encoders whose tasks share a head."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import sweep_data
from support.sweep_by_hand import LABELS, check_by_hand, mean, points, refused, rows_of, run

from pem_composition import json_lines
from pem_composition.errors import DataError
from pem_composition.report import records, table
from pem_composition.report.records import read
from pem_composition.sweep import engine
from pem_composition.sweep.goals import Goal, Scored

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = ("--grid", "0", "0.25", "1")
SPACES = ("parameter", "delta")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> sweep_data.TextBench:
    return sweep_data.make_text(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def finished(bench: sweep_data.TextBench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merges of two modules on two tasks in both spaces, with a reference module."""
    out = tmp_path_factory.mktemp("finished") / "out"
    words = ["merge", *bench.flags("rte", "sst2"), "-p", out, *GRID, "--evaluate"]
    assert run(*words, "--reference_module", bench.modules[3]) == 0
    return out


@pytest.fixture
def resumed(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


# --- several tasks ---


@pytest.mark.slow
def test_points_in_place_equal_scoring_by_hand(bench, finished):
    found = list(points(finished).values())
    assert {(r["task"], r["space"]) for r in found} == set(
        itertools.product(("rte", "sst2"), (None, *SPACES))
    )
    chosen = [r for r in found if r["coefficients"] == [0.25, 0.75] or r["names"] == ["m2"]]
    assert len(chosen) >= 2 * (2 + 2)
    check_by_hand(bench, chosen)


@pytest.mark.slow
def test_a_point_is_scored_once_per_task_and_end_points_are_the_modules(finished):
    lines = [r for r in json_lines.read(finished / "results.jsonl") if "key" in r]
    assert len(lines) == len(points(finished))
    summary = read(finished).summary
    assert summary["tasks"] == ["rte", "sst2"]
    for space in SPACES:
        curve = summary["curve"][space]
        assert [p["coefficients"] for p in curve] == [
            [t, 1 - t] for t in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert [p["keys"] for p in curve[::4]] == summary["singles"][::-1]
    # 2 modules, 3 points per space, reference; then 2 modules, reference, equal and selected.
    assert len(lines) <= 2 * (2 + 6 + 1) + 2 * (2 + 1 + 4)


@pytest.mark.slow
def test_model_and_rows_are_prepared_once(bench, tmp_path, monkeypatch):
    from pem_composition.evaluation import models
    from pem_composition.objectives.answers import Answers

    calls = []
    for module, name in ((models, "load_seq2seq"), (Answers, "evaluator")):
        original = getattr(module, name)

        def counted(*a, original=original, name=name, **k):
            calls.append(name)
            return original(*a, **k)

        monkeypatch.setattr(module, name, counted)
    assert run("sweep", *bench.flags("rte", "sst2"), "-p", tmp_path / "out", *GRID) == 0
    assert sorted(calls) == ["evaluator"] * 4 + ["load_seq2seq"]  # two tasks, two splits


@pytest.mark.slow
def test_the_point_of_the_best_mean_is_selected(finished):
    found = read(finished)
    for space, selected in found.summary["selected"].items():
        inner = found.summary["curve"][space][1:-1]
        means = {tuple(p["coefficients"]): mean(found, p["keys"]) for p in inner}
        assert means[tuple(selected)] == max(means.values())


@pytest.mark.slow
def test_the_best_of_the_points_that_keep_the_format_is_a_row_of_its_own(bench, tmp_path):
    flags = [*bench.flags("rte"), "-p", tmp_path / "out", *GRID]
    assert run("sweep", *flags, "--max_invalid", "1") == 0
    summary = read(tmp_path / "out").summary
    assert summary["selected_valid"] == summary["selected"]
    rows = {row["row"]: row["keys"] for row in summary["rows"]}
    for space in summary["selected"]:
        same = rows[f"merge, selected, {space} space"]
        assert rows[f"merge, selected, valid, {space} space"] == same
    assert "at most 100% invalid" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, None), (0.0, None), (0.1, 0.6), (0.2, 0.4), (1.0, 0.2)]
)
def test_no_task_of_a_valid_point_breaks_the_format_more_often(limit, expected):
    """Scores fall with t, and so does the share of invalid answers of one of the two tasks."""
    points = [(0.2, 0.9, 0.8), (0.4, 0.8, 0.2), (0.6, 0.7, 0.1), (0.8, 0.6, 0.05)]
    record = {"metric": "accuracy", "standard_error": 0.0}
    curve = [
        (
            [t, 1 - t],
            [record | {"score": score, "invalid_share": share} for share in (invalid, 0.01)],
        )
        for t, score, invalid in points
    ]
    plan = engine.Plan((), (), (), max_invalid=limit)
    found = engine._selected_valid({"delta": curve}, plan)
    assert found == ({} if expected is None else {"delta": (expected, 1 - expected)})


@pytest.mark.slow
def test_measures_in_different_units_are_chosen_by_their_ranks():
    """A perplexity of 500 would outweigh every accuracy in a mean."""
    curve = [
        ([t, 1 - t], [
            {"metric": "accuracy", "score": accuracy, "standard_error": 0.0},
            {"metric": "perplexity", "score": perplexity, "standard_error": 0.0},
        ])
        for t, accuracy, perplexity in [(0.2, 0.5, 500.0), (0.4, 0.9, 502.0), (0.6, 0.8, 600.0)]
    ]  # fmt: skip
    assert engine._selected(curve, engine.MERGE) == (0.4, 0.6)
    scored = Scored(("a", "b"), curve[0][1])
    for goal in ("mean", "worst"):
        with pytest.raises(DataError, match=f"goal {goal}: measures in different units"):
            Goal(goal).value(scored)


def correct(found: records.Results, key: str, bench: sweep_data.TextBench) -> np.ndarray:
    record = found.points[key]
    gold = [json.loads(x)["label"] for x in rows_of(bench, record).open()]
    given = [LABELS[record["task"]][int(p)] for p in record["predictions"]]
    return np.array([g == p for g, p in zip(gold, given, strict=True)], dtype=float)


@pytest.mark.slow
def test_gains_are_paired_within_each_task_and_independent_between_them(bench, finished):
    found = read(finished)
    singles = {r["id"]: r for r in found.summary["rows"] if r["id"].startswith("module")}
    generator = np.random.default_rng(5)
    for row in found.summary["rows"]:
        differences = []
        for place, key in enumerate(row["keys"]):
            alone = [correct(found, s["keys"][place], bench) for s in singles.values()]
            differences.append(correct(found, key, bench) - np.mean(alone, axis=0))
            gain = row["gains"][place]
            expected = differences[-1].std() / math.sqrt(len(differences[-1]))
            assert gain["gain"] == pytest.approx(differences[-1].mean())
            assert gain["gain_standard_error"] == pytest.approx(expected, rel=0.2, abs=1e-9)
        draws = [d[generator.integers(len(d), size=(4000, len(d)))].mean(1) for d in differences]
        together = np.mean(draws, axis=0)
        assert row["mean"]["gain"] == pytest.approx(np.mean([d.mean() for d in differences]))
        assert row["mean"]["gain_standard_error"] == pytest.approx(
            together.std(), rel=0.2, abs=1e-9
        )
        assert row["mean"]["score"] == pytest.approx(mean(found, row["keys"]))


@pytest.mark.slow
def test_the_table_has_a_column_per_task_and_says_what_is_invalid(finished):
    found = read(finished)
    text = table.markdown(found)
    header = next(line for line in text.splitlines() if line.startswith("| module"))
    for part in ("rte accuracy (n = 10)", "sst2 accuracy (n = 14)", "| mean |", "gain of the mean"):
        assert part in header
    assert "invalid (rte, sst2)" in header
    row = next(line for line in text.splitlines() if line.startswith("| m1 |"))
    shares = [found.points[k]["invalid_share"] for k in found.summary["rows"][0]["keys"]]
    assert " ".join(f"{s:.2f}" for s in shares) in row
    assert max(shares) > table.NOTED_INVALID
    assert "invalid answers" in row
    lines = table.rows(found).to_dict("records")
    assert [x["task"] for x in lines] == ["rte", "sst2", "mean"] * 8


# --- resuming ---


@pytest.mark.slow
def test_a_second_task_costs_its_own_points_only(bench, resumed, tmp_path, capsys):
    one = tmp_path / "one"
    grid = ("--grid", 0, 0.5, 1, "--space", "delta")
    assert run("sweep", *bench.flags("sst2"), "-p", one, *grid) == 0
    before = points(one)
    assert run("sweep", *bench.flags("rte", "sst2"), "-p", one, *grid) == 0
    new = [r for key, r in points(one).items() if key not in before]
    curves = {k for p in read(one).summary["curve"]["delta"] for k in p["keys"]}
    assert {r["task"] for r in new if r["split"] == "validation"} == {"rte"}
    assert curves & before.keys()
    assert curves <= points(resumed).keys()  # the same keys, whatever was scored beside them
    assert run("sweep", *bench.flags("sst2", "rte"), "-p", one, *grid) == 0
    assert read(one).summary["tasks"] == ["sst2", "rte"]
    assert ": 0 points scored" in capsys.readouterr().out


@pytest.mark.slow
def test_a_prompt_counts_by_what_it_says(bench, tmp_path, capsys):
    out, prompts = tmp_path / "out", [tmp_path / "a.json", tmp_path / "b.json"]
    words = {"template": "{sentence} is", "answers": {"negative": "No", "positive": "Yes"}}
    for path in prompts:
        path.write_text(json.dumps(words))

    def sweep(prompt: Path) -> int:
        grid = ("--grid", 0, 0.5, 1, "--space", "delta")
        flags = (*bench.flags("sst2"), "-p", out, *grid, "--prompt", prompt)
        assert run("sweep", *flags) == 0
        return int(capsys.readouterr().out.partition(f"{out}: ")[2].split()[0])

    assert sweep(prompts[0]) > 0
    assert sweep(prompts[1]) == 0
    prompts[1].write_text(json.dumps(words | {"template": "{sentence} was"}))
    assert sweep(prompts[1]) > 0


@pytest.mark.slow
def test_bfloat16_is_part_of_the_key_where_it_is_set(bench, resumed, capsys):
    before = points(resumed)
    flags = (*bench.flags("sst2"), "-p", resumed, "--grid", 0, 0.5, 1, "--space", "delta")
    assert run("sweep", *flags, "--bf16") == 0
    new = [r for key, r in points(resumed).items() if key not in before]
    assert all(r["bf16"] is True for r in new)
    assert all("bf16" not in r for r in before.values())
    assert len(new) >= 2 * 2 + 1
    capsys.readouterr()
    assert run("sweep", *flags, "--bf16", "false") == 0
    new = [r for key, r in points(resumed).items() if key not in before and "bf16" not in r]
    assert f": {len(new)} points scored" in capsys.readouterr().out
    assert all(r["split"] == "test" for r in new)  # another grid may select another point


# --- classification ---


@pytest.mark.slow
def test_tasks_with_the_same_classes_share_a_head(tmp_path):
    bench = sweep_data.make(tmp_path / "bench")
    flags = bench.flags()
    at = flags.index("--task_name")
    words = [
        "--task_name", "mnli", "snli", "--validation_file", bench.validation, bench.test,
    ]  # fmt: skip
    assert run("sweep", *flags[:at], *words, "-p", tmp_path / "out", *GRID) == 0
    both = read(tmp_path / "out")
    assert run("sweep", *flags, "-p", tmp_path / "one", *GRID) == 0
    alone = read(tmp_path / "one")
    for space in SPACES:
        pairs = zip(both.summary["curve"][space], alone.summary["curve"][space], strict=True)
        assert all(p["keys"][0] == q["keys"][0] for p, q in pairs)


# --- refusals ---


def without(flags: list[str], name: str) -> list[str]:
    """The flags without one of them and its values."""
    start = flags.index(name)
    stop = next((i for i in range(start + 1, len(flags)) if flags[i][0] == "-"), len(flags))
    return flags[:start] + flags[stop:]


REFUSALS = {
    "files": (["--validation_file", "x.jsonl"], "--validation_file: one value per task"),
    "tasks": (["--task_name", "rte"], "--validation_file: one value per task"),
    "prompts": (["--prompt", "rte", "sst2", "rte"], "--prompt: one value per task"),
    "template": (["--prompt", "rtte"], "--prompt: unknown template; found 'rtte'"),
    "placeholder": (["--prompt", "mnli"], "prompt mnli: does not fit task rte"),
    "numbers": (["--grid", "0", "0.5"], "--grid: not a range; found 2 numbers"),
    "two ranges": (["--grid", "0", "0.1", "1", "0.5"], "--grid: not a range; found 4 numbers"),
    "one head": (["--objective", "classification"], "need different heads"),
    "block": (["--block_size", "8"], "--target next_block"),
    "target": (["--objective", "classification", "--target", "label"], "--objective seq2seq"),
    "batch": (["--per_device_eval_batch_size", "0"], "expected a number >= 1"),
    "reference": (["--reference_module", "no/such"], "no/such"),
}


@pytest.mark.parametrize("words", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_scored_is_refused_before_anything_is_written(
    words, bench, tmp_path, capsys
):
    flags, reason = words
    own = bench.flags("rte", "sst2")
    for name in (f for f in flags if f.startswith("--") and f in own):
        own = without(own, name)
    assert run("sweep", *own, "-p", tmp_path / "out", *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert reason in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_another_architecture_is_refused(bench, tmp_path, capsys):
    other = sweep_data.make(tmp_path / "roberta")
    capsys.readouterr()  # what writing models prints
    flags = ["-a", *other.modules, *bench.flags("sst2")[3:]]
    assert "base model type differs" in refused(capsys, tmp_path, "sweep", *flags)
    reference = ("--reference_module", other.full_set)
    message = refused(capsys, tmp_path, "sweep", *bench.flags("sst2"), *reference)
    assert "base model type differs" in message
    flags = [*other.flags(), "--objective", "seq2seq"]
    assert "needs a model that writes" in refused(capsys, tmp_path, "sweep", *flags)
    flags = without(bench.flags("sst2"), "--objective")
    assert "--objective seq2seq" in refused(capsys, tmp_path, "sweep", *flags)
