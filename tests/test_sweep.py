"""A whole sweep on a tiny model: right numbers, nothing computed twice, nothing old believed."""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from support import pem_process, sweep_data
from support.copies import Mould
from support.training_bench import ranks

import pem_composition as library
from pem_composition import cli, json_lines
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.errors import UsageError
from pem_composition.module import HeadInfo
from pem_composition.report.records import Results, read
from pem_composition.sweep import grids
from pem_composition.sweep.result_store import ResultStore

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = ("--grid", "0", "0.25", "1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> sweep_data.Bench:
    return sweep_data.make(tmp_path_factory.mktemp("bench"))


def run(bench: sweep_data.Bench, out: Path, *words: object) -> int:
    return cli.main(["sweep", *bench.flags(), "-p", str(out), *GRID, *map(str, words)])


def points(out: Path) -> dict[str, dict]:
    return {r["key"]: r for r in json_lines.read(out / "results.jsonl") if "key" in r}


@pytest.fixture(scope="module")
def finished(bench: sweep_data.Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over both spaces with a reference module."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(bench, out, "--reference_module", bench.full_set) == 0
    return out


@functools.cache
def loaded(folder: Path) -> tuple[Mould, object]:
    """What makes newly loaded models of a folder, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return Mould(model), AutoTokenizer.from_pretrained(folder)


def fresh_score(bench: sweep_data.Bench, record: dict, rows: Path) -> float:
    """The record's module, combined anew, attached to a newly loaded base, one row at a time."""
    folders = {p.name: p for p in (*bench.modules, bench.full_set)}
    modules = [library.load(folders[n]) for n in record["names"]]
    module = modules[0]
    if record["space"]:
        module = library.combine(modules, record["coefficients"], space=record["space"])
    mould, tokenizer = loaded(bench.base)
    model = mould()
    given, gold = [], []
    with library.attach(model, module), torch.no_grad():
        for line in rows.read_text().splitlines():
            row = json.loads(line)
            ids = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
            given.append(int(model(**ids).logits.argmax()))
            gold.append(sweep_data.LABELS.index(row["label"]))
    assert "".join(map(str, given)) == record["predictions"]
    return accuracy_score(gold, given)


@pytest.mark.slow
def test_results_in_place_equal_fresh_evaluations(bench, finished):
    records = points(finished).values()
    assert {r["space"] for r in records} == {None, "parameter", "delta"}
    for record in records:
        rows = bench.validation if record["split"] == "validation" else bench.test
        assert record["score"] == pytest.approx(fresh_score(bench, record, rows))


@pytest.mark.slow
def test_a_record_says_what_was_scored(bench, finished):
    for record in points(finished).values():
        p, n = record["score"], record["n"]
        assert n == (40 if record["split"] == "validation" else 30)
        assert record["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / n))
        assert sum(record["predicted_share"].values()) == pytest.approx(1)
        assert record["degenerate"] == (max(record["predicted_share"].values()) > 0.97)
        assert len(record["modules"]) == len(record["names"]) == len(record["coefficients"])
        assert record["seconds"] >= 0


def test_each_point_is_scored_once_and_end_points_are_the_modules(finished):
    lines = [r for r in json_lines.read(finished / "results.jsonl") if "key" in r]
    assert len(lines) == len(points(finished))
    found = read(finished)
    for space in ("parameter", "delta"):
        curve = found.summary["curve"][space]
        assert [p["coefficients"][0] for p in curve] == [0, 0.25, 0.5, 0.75, 1]
        assert [p["keys"] for p in curve[::4]] == found.summary["singles"][::-1]
    # 2 modules, reference, 3 points per space; then 2 modules, reference, equal and selected.
    assert len(lines) <= 2 + 1 + 6 + 2 + 1 + 4


def test_the_selected_point_is_the_best_true_mixture_of_the_selection_split(finished):
    found = read(finished)
    for space, selected in found.summary["selected"].items():
        inner = found.summary["curve"][space][1:-1]
        scores = {tuple(p["coefficients"]): score_of(found, p) for p in inner}
        assert scores[tuple(selected)] == max(scores.values())
        best = [c for c, s in scores.items() if s == max(scores.values())]
        assert abs(selected[0] - 0.5) == min(abs(c[0] - 0.5) for c in best)
    assert {found.points[r["keys"][0]]["split"] for r in found.summary["rows"]} == {"test"}


def error_of(found: Results, entry: dict) -> dict[str, float]:
    (key,) = entry["keys"]
    return {"standard_error": found.points[key]["standard_error"]}


def score_of(found: Results, entry: dict) -> float:
    (key,) = entry["keys"]
    return found.points[key]["score"]


def test_gains_are_paired_differences_to_the_average(bench, finished):
    found = read(finished)
    gold = [sweep_data.LABELS.index(json.loads(x)["label"]) for x in bench.test.open()]
    right = {
        r["row"]: np.array([int(p) for p in found.points[r["keys"][0]]["predictions"]]) == gold
        for r in found.summary["rows"]
    }
    average = (right["half1"] + right["half2"].astype(float)) / 2
    for row in found.summary["rows"]:
        difference = right[row["row"]] - average
        (gain,) = row["gains"]
        assert gain["gain"] == pytest.approx(difference.mean())
        expected = difference.std() / math.sqrt(len(gold))
        assert gain["gain_standard_error"] == pytest.approx(expected, rel=0.2, abs=1e-9)
        assert row["mean"] == {**gain, "score": score_of(found, row), **error_of(found, row)}


def test_the_selected_modules_are_written(finished, bench):
    found = read(finished)
    for space, selected in found.summary["selected"].items():
        module = library.load(finished / f"selected_{space}")
        expected = library.combine([library.load(p) for p in bench.modules], selected, space=space)
        assert all(torch.allclose(module.tensors[n], t) for n, t in expected.tensors.items())
        assert rebuild(finished / f"selected_{space}").equal


# --- resuming ---


@pytest.fixture
def resumed(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.slow
def test_a_finished_sweep_is_not_computed_again(bench, resumed, capsys, monkeypatch):
    from pem_composition.evaluation import models

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(models, "load_base", never)
    before = (resumed / "results.jsonl").read_bytes()
    assert run(bench, resumed, "--reference_module", bench.full_set) == 0
    assert (resumed / "results.jsonl").read_bytes() == before
    assert ": 0 points scored" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finer_grid_computes_only_its_new_points(bench, resumed, capsys):
    before = points(resumed)
    words = ("--grid", "0", "0.125", "1", "--space", "delta")
    assert cli.main(["sweep", *bench.flags(), "-p", str(resumed), *words]) == 0
    new = [r for key, r in points(resumed).items() if key not in before]
    validation = sorted(r["coefficients"][0] for r in new if r["split"] == "validation")
    assert validation == [0.125, 0.375, 0.625, 0.875]
    assert {r["space"] for r in new} <= {"delta"}


@pytest.mark.slow
def test_overwrite_computes_again(bench, resumed, capsys):
    before = (resumed / "results.jsonl").read_bytes()
    assert run(bench, resumed, "--reference_module", bench.full_set, "--overwrite") == 0
    after = (resumed / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after) > 1.8 * len(before)


@pytest.mark.slow
def test_a_torn_line_costs_its_point_and_no_other(bench, resumed, capsys):
    results = resumed / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    assert run(bench, resumed, "--reference_module", bench.full_set) == 0
    assert f": {len(lines) - 1 - 3} points scored, 3 known before" in capsys.readouterr().out
    assert len(points(resumed)) == len(lines) - 1
    read(resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_killed_sweep_goes_on_where_it_was(number, code, bench, finished, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sweep", *bench.flags(), "-p", out, "--grid", "0", "0.005", "1"]
    child = pem_process.start(words, tmp_path / "log")
    child.wait_for(out / "results.jsonl", lines=3)
    assert child.send(number) == code
    assert child.errors.count("\n") == (code > 0)
    before = points(out)
    assert len(before) >= 2
    assert run(bench, out) == 0
    after = points(out)
    assert all(after[key] == record for key, record in before.items())
    same = {k: r["score"] for k, r in points(finished).items()}
    assert all(after[k]["score"] == s for k, s in same.items() if k in after)


def append_many(path: Path, writer: int) -> None:
    ledger = ResultStore(path)
    for number in range(40):
        ledger.append({"key": f"{writer}-{number}", "filler": "x" * 5000})


@pytest.mark.slow
def test_eight_writers_lose_no_line(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(path, i)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json_lines.read(path)) == 320
    assert len({r["key"] for r in json_lines.read(path)}) == 320


def launched(folder: Path, words: list[object]) -> list[str]:
    """What two processes of one launch print."""
    pair = [
        pem_process.start(words, folder / f"{i}.log", variables=rank)
        for i, rank in enumerate(ranks())
    ]
    assert [child.wait() for child in pair] == [0, 0], [child.text() for child in pair]
    return [child.log.read_text() for child in pair]


@pytest.mark.slow
def test_the_processes_of_a_launch_share_points_and_rows(bench, finished, tmp_path, capsys):
    out = tmp_path / "out"
    reference = ["--reference_module", bench.full_set]
    words = ["sweep", *bench.flags(), "-p", out, *GRID, *reference]
    first, second = launched(tmp_path, words)
    assert not second
    assert re.search(r"[1-9]\d* by other processes", first)
    assert {k: r["score"] for k, r in points(out).items()} == {
        k: r["score"] for k, r in points(finished).items()
    }
    lines = json_lines.read(out / "results.jsonl")
    assert len(lines) == len(points(out)) + 1, "each point once, and the summary"
    assert not list(out.glob(".results.jsonl.writer-*"))
    words = ["evaluate", "--adapter", bench.modules[0], *bench.flags()[3:7]]
    words += ["--validation_file", bench.validation]
    (tmp_path / "rows").mkdir()
    shared, silent = launched(tmp_path / "rows", words)
    assert not silent
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    alone = capsys.readouterr().out
    without = [[w for w in t.splitlines() if "runtime" not in w] for t in (shared, alone)]
    assert without[0] == without[1]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["fisher", "gram"])
def test_the_processes_of_a_launch_share_the_rows_of_statistics(program, bench, tmp_path, capsys):
    """Sums of float64 in another order; three rows for two processes, and one, which both read."""
    for rows in (3, 1):
        words = [program, "--adapter", bench.modules[0], *bench.flags()[3:7]]
        words += ["--train_file", bench.validation, "--max_samples", rows, "--output_dir"]
        (tmp_path / f"logs-{rows}").mkdir()
        first, second = launched(tmp_path / f"logs-{rows}", [*words, tmp_path / f"both-{rows}"])
        assert f"on {rows} rows" in first
        assert not second
        assert cli.main([str(word) for word in [*words, tmp_path / f"one-{rows}"]]) == 0
        one, both = (
            load_file(tmp_path / f"{who}-{rows}" / f"{program}.safetensors")
            for who in ("one", "both")
        )
        assert one
        assert one.keys() == both.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(both[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_processes_of_a_launch_share_the_batches_that_are_learned_from(bench, tmp_path, capsys):
    """Two batches a step, one of each task; gradients of float32 in another order."""
    words = ["learn", *bench.flags(), "--method", "cat", "--max_steps", 4, "-p"]
    words[words.index("mnli") + 1 : words.index("mnli") + 1] = ["snli"]
    place = words.index("--validation_file")
    words[place : place + 2] = ["--validation_file", bench.validation, bench.validation]
    place = words.index("--test_file")
    words[place : place + 2] = ["--test_file", bench.test, bench.test]
    first, second = launched(tmp_path, [*words, tmp_path / "both"])
    assert "in 4 steps" in first
    assert not second
    assert cli.main([str(word) for word in [*words, tmp_path / "one"]]) == 0
    one, both = (
        json.loads((tmp_path / who / "learned.json").read_text()) for who in ("one", "both")
    )
    assert one["history"] == pytest.approx(both["history"], rel=1e-5)
    assert [one["loss_before"], one["loss_after"]] == pytest.approx(
        [both["loss_before"], both["loss_after"]], rel=1e-5
    )
    for mine, theirs in zip(one["coefficients"], both["coefficients"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


# --- the other kinds, programs and refusals ---


@pytest.mark.slow
def test_ia3_has_one_sum_that_is_scored_once_and_log_space_where_it_is_asked_for(tmp_path, capsys):
    bench = sweep_data.make(tmp_path / "bench", "ia3")
    assert run(bench, tmp_path / "one") == 0
    assert list(read(tmp_path / "one").summary["curve"]) == ["parameter"]
    assert run(bench, tmp_path / "two", "--space", "log", "delta", "parameter") == 0
    assert "the same sum, scored once" in capsys.readouterr().out
    assert list(read(tmp_path / "two").summary["curve"]) == ["log", "parameter"]
    one, two = (points(tmp_path / name) for name in ("one", "two"))
    assert {record["space"] for record in two.values()} == {None, "log", "parameter"}
    for key, record in two.items():
        rows = bench.validation if record["split"] == "validation" else bench.test
        assert record["score"] == pytest.approx(fresh_score(bench, record, rows))
        same = one.get(key)
        assert (same is None) == (record["space"] == "log")
        assert same is None or same["predictions"] == record["predictions"]
    assert one.keys() <= two.keys()


@pytest.mark.slow
def test_whole_models_are_scored_as_differences_to_the_base(bench, tmp_path, capsys):
    from support.tiny_models import tiny
    from transformers import AutoModelForSequenceClassification

    for seed in (1, 2):
        tiny("roberta", seed=seed).save_pretrained(tmp_path / f"m{seed}")
    own = sweep_data.Bench(
        bench.base, (tmp_path / "m1", tmp_path / "m2"), bench.full_set, bench.validation, bench.test
    )
    assert run(own, tmp_path / "out", "-c", "fft") == 0
    found = read(tmp_path / "out")
    a, b = (tiny("roberta", seed=s).state_dict() for s in (1, 2))
    model = AutoModelForSequenceClassification.from_pretrained(bench.base)
    model.load_state_dict({n: 0.25 * t + 0.75 * b[n] for n, t in a.items()})
    model.save_pretrained(tmp_path / "mixed")
    single = sweep_data.Bench(
        bench.base,
        (tmp_path / "mixed", tmp_path / "m2"),
        bench.full_set,
        bench.validation,
        bench.test,
    )
    assert run(single, tmp_path / "single", "-c", "fft") == 0
    mixed = read(tmp_path / "single")
    expected = mixed.points[mixed.summary["singles"][0][0]]
    quarter = found.points[found.summary["curve"]["parameter"][1]["keys"][0]]
    assert quarter["coefficients"] == [0.25, 0.75]
    assert quarter["predictions"] == expected["predictions"]


@pytest.mark.slow
def test_merge_with_evaluate_is_the_same_sweep(bench, resumed, tmp_path, capsys):
    before = points(resumed)
    words = ["merge", *bench.flags(), "-p", str(resumed), *GRID, "--evaluate"]
    assert cli.main([*words, "--reference_module", str(bench.full_set)]) == 0
    assert points(resumed) == before


@pytest.mark.slow
def test_a_method_is_swept_in_its_own_space_and_is_no_module_at_the_ends(bench, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["merge", *bench.flags(), "-p", str(out), *GRID, "--evaluate", "--merge_head"]
    assert cli.main([*words, "-w", "ties", "--setting", "density=0.3"]) == 0
    method = "ties(density=0.3, election=total, form=dense)"
    assert f"{method} of +0.25*half1 +0.75*half2 in delta space" in capsys.readouterr().out
    found = read(out)
    assert found.summary["method"] == method and list(found.summary["curve"]) == ["delta"]
    curve = found.summary["curve"]["delta"]
    assert [p["coefficients"][0] for p in curve] == [0, 0.25, 0.5, 0.75, 1]
    modules = [library.load(path) for path in bench.modules]
    for point in curve:  # also (1, 0): one module trimmed is not the module
        (key,) = point["keys"]
        record = found.points[key]
        assert record["method"] == method
        merged = library.combine(
            modules, point["coefficients"], method="ties", settings={"density": 0.3}
        )
        merged.save(tmp_path / key)
        single = record | {"names": [key], "space": None}
        folder = replace(bench, modules=(tmp_path / key, tmp_path / key))
        assert fresh_score(folder, single, bench.validation) == pytest.approx(record["score"])
    selected = library.load(out / "selected_delta")
    assert any("ties(" in note for note in selected.provenance.notes)


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_a_point_beyond_float32_is_refused_before_any_is_scored(space, bench, tmp_path, capsys):
    words = ("--grid", "0", "1e39", "1e39", "--space", space)
    assert cli.main(["sweep", *bench.flags(), "-p", str(tmp_path / "out"), *words]) == 2
    out, err = capsys.readouterr()
    assert "the sum is too large for float32" in err and "accuracy" not in out


@pytest.mark.slow
def test_without_test_rows_the_table_says_so(bench, tmp_path, capsys):
    flags = bench.flags()
    del flags[flags.index("--test_file") : flags.index("--test_file") + 2]
    assert cli.main(["sweep", *flags, "-p", str(tmp_path / "out"), *GRID]) == 0
    assert "what was selected is optimistic" in capsys.readouterr().out
    assert read(tmp_path / "out").summary["report"] == "validation"


def without_head(bench: sweep_data.Bench, folder: Path) -> sweep_data.Bench:
    for path in bench.modules:
        module = library.load(path)
        library.combine([module], [1.0], head="none").save(folder / path.name)
    pair = (folder / bench.modules[0].name, folder / bench.modules[1].name)
    return sweep_data.Bench(bench.base, pair, bench.full_set, bench.validation, bench.test)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--head", "none"], "a merge without a head cannot be scored"),
        (["--test_file", "no/such.jsonl"], "no/such.jsonl"),
        (["--model_name_or_path", "no/such/model"], "no such directory"),
        (["--task_name", "sst2"], "no text column"),
        (["--rank", "2", "--space", "parameter"], "--rank: applies to delta space only"),
        (["--grid", "0", "-1", "1"], "STEP > 0"),
        (["-c", "ia3"], "is of another kind"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(
    words, reason, bench, tmp_path, capsys
):
    flags = bench.flags()
    if words[0] in flags:
        at = flags.index(words[0])
        del flags[at : at + 2]
    code = cli.main(["sweep", *flags, "-p", str(tmp_path / "out"), *words])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert reason in captured.err
    assert list(tmp_path.iterdir()) == []


def test_modules_without_a_head_are_not_scored_with_a_random_one(bench, tmp_path, capsys):
    assert run(without_head(bench, tmp_path / "bare"), tmp_path / "out") == 2
    assert "has no classification head to score" in capsys.readouterr().err


STRAIGHT, TURNED = sweep_data.LABELS, tuple(reversed(sweep_data.LABELS))


def naming(bench, folder, *orders):
    """The bench whose modules name their classes so."""
    paths = [folder / path.name for path in bench.modules]
    for path, source, order in zip(paths, bench.modules, orders, strict=True):
        module = library.load(source)
        replace(module, head=replace(module.head or HeadInfo(), labels=order)).save(path)
    return replace(bench, modules=tuple(paths))


@pytest.mark.parametrize("program", ["sweep", "search"])
def test_heads_whose_classes_stand_in_different_orders_are_refused(
    program, bench, tmp_path, capsys
):
    flags = naming(bench, tmp_path, TURNED, STRAIGHT).flags()
    code = cli.main([program, *flags, "-p", str(tmp_path / "out")])
    assert code == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert ", ".join(STRAIGHT) in message and ", ".join(TURNED) in message


@pytest.mark.slow
def test_heads_in_another_order_than_the_task_s_are_scored_by_their_words(bench, tmp_path):
    """Output i means class 2 - i, so that predictions are those of the other modules, turned."""
    grid = ("--space", "delta", "--grid", "0", "0.5", "1")
    found = []
    for number, case in enumerate((bench, naming(bench, tmp_path, TURNED, TURNED))):
        out = tmp_path / f"out{number}"
        assert cli.main(["sweep", *case.flags(), "-p", str(out), *grid]) == 0
        records = points(out).values()
        found.append({(r["split"], str(r["coefficients"])): r["predictions"] for r in records})
    plain, other = found
    assert len(plain) > 3 and plain.keys() == other.keys()
    assert all(
        other[key] == said.translate(str.maketrans("012", "210")) for key, said in plain.items()
    )


@pytest.mark.slow
def test_what_an_earlier_grid_selected_is_taken_away(bench, resumed, capsys):
    assert {p.name for p in resumed.glob("selected_*")} >= {"selected_delta", "selected_parameter"}
    (resumed / "selected_notes.txt").write_text("mine")
    assert run(bench, resumed, "--space", "parameter") == 0
    left = {p.name for p in resumed.glob("selected_*")}
    assert "selected_delta" not in left
    assert {"selected_parameter", "selected_notes.txt"} <= left


def test_a_sweep_never_writes_into_a_module(bench, capsys):
    assert run(bench, bench.full_set) == 2
    assert "the output is a module" in capsys.readouterr().err


# --- grids ---


@given(st.integers(0, 50), st.integers(1, 25), st.integers(0, 100))
def test_a_grid_holds_every_step_and_its_ends(first, step, count):
    values = grids.grid(first / 100, step / 100, (first + count * step) / 100)
    assert values == tuple(round((first + i * step) / 100, 12) for i in range(count + 1))


def test_several_ranges_are_their_union_in_rising_order():
    tenths = [round(i / 10, 12) for i in range(11)]
    fine = [round(0.8 + i / 50, 12) for i in range(11)]
    expected = sorted(set(tenths) | set(fine))
    found = grids.merges((0, 0.1, 1, 0.8, 0.02, 1), 2)
    assert [t for t, _ in found] == expected
    assert all(t + rest == pytest.approx(1, abs=1e-12) for t, rest in found)
    assert [t for t, *_ in grids.analogies((0.8, 0.02, 1, 0, 0.1, 1))] == expected


@given(st.integers(3, 5), st.integers(1, 6))
def test_the_simplex_holds_every_split_of_the_whole_once(modules, steps):
    found = grids.merges((0, 1 / steps, 1), modules)
    shares = itertools.product(range(steps + 1), repeat=modules)
    whole = {tuple(round(i / steps, 12) for i in s) for s in shares if sum(s) == steps}
    assert set(found) == whole
    assert len(found) == len(whole)


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=3))
def test_an_analogy_adds_what_it_takes_away(values):
    for value in values:
        ((t, target, source),) = grids.analogies((value, 1, value))
        assert t == pytest.approx(value, abs=1e-12)
        assert (target, source) == (pytest.approx(1 - t), pytest.approx(t - 1))
        assert target == -source


def test_a_grid_stops_before_passing_its_end():
    assert grids.grid(0, 0.3, 1) == (0, 0.3, 0.6, 0.9)
    assert grids.grid(0.5, 1, 0.5) == (0.5,)
    with pytest.raises(UsageError):
        grids.grid(0, 0, 1)


@pytest.mark.slow
def test_any_metric_of_the_task_selects(bench, resumed, capsys):
    assert run(bench, resumed, "--metric_for_best_model", "loss") == 0
    found = read(resumed)
    for space, selected in found.summary["selected"].items():
        inner = found.summary["curve"][space][1:-1]
        losses = {tuple(p["coefficients"]): found.points[p["keys"][0]]["loss"] for p in inner}
        assert losses[tuple(selected)] == min(losses.values())
    assert "selected by loss on the validation rows" in (resumed / "table.md").read_text()
    assert run(bench, resumed, "--metric_for_best_model", "f1_macro") == 0
    found = read(resumed)
    for space, selected in found.summary["selected"].items():
        points = [(p["coefficients"], found.points[p["keys"][0]]) for p in
                  found.summary["curve"][space][1:-1]]  # fmt: skip
        by = {tuple(c): point["scores"]["f1_macro"] for c, point in points}
        assert by[tuple(selected)] == max(by.values())
    assert run(bench, resumed, "--metric_for_best_model", "bleu") == 2
    assert "no metric of mnli; found bleu" in capsys.readouterr().err


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_a_point_that_the_dtype_does_not_hold_is_refused_before_any_score(
    bench, space, tmp_path, capsys
):
    words = ("--space", space, "--dtype", "float16", "--grid", "0", "1e7", "1e7")
    assert cli.main(["sweep", *bench.flags(), "-p", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert f"in {space} space" in error and "does not fit float16" in error
    assert not (tmp_path / "out").exists()


def test_what_stands_beside_the_results_is_of_the_summary_that_they_end_with(tmp_path):
    """Two sweeps of one folder: the other one ends between this one's end and its table."""
    path = tmp_path / "results.jsonl"
    mine, other = {"summary": 2, "grid": 1}, {"summary": 2, "grid": 2}
    store = ResultStore(path)
    store.conclude(mine)
    ResultStore(path).conclude(other)
    with store.finish(mine):
        assert json_lines.read(path) == [mine, other, mine]
    with store.finish(mine):
        assert len(json_lines.read(path)) == 3


WAITING = """
import pathlib, sys
from pem_composition.sweep.result_store import ResultStore
store = ResultStore(pathlib.Path(sys.argv[1]))
print("asks", flush=True)
with store.claim("x"):
    store.append({"key": "k"})
"""


def test_what_fails_before_any_result_leaves_no_lock_and_no_folder(tmp_path):
    """Who waits for it meanwhile, on a file that is gone then, computes all the same."""
    path = tmp_path / "not" / "there" / "results.jsonl"
    lock, words = path.with_name(".results.jsonl.lock"), [sys.executable, "-c", WAITING, str(path)]
    store = ResultStore(path)
    with pytest.raises(ZeroDivisionError):
        store.once({"a": 1}, lambda key: {"score": 1 / 0})
    assert list(tmp_path.iterdir()) == []
    path.parent.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), store.claim("y"), store.claim("x"):
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []  # which was there
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other, store.claim("x"):
        assert other.stdout.readline() == b"asks\n"
        time.sleep(0.2)  # it waits by now, or makes the file anew
        lock.unlink()
    assert other.wait() == 0 and lock.exists()
    assert json_lines.read(path) == [{"key": "k"}]
    with store.claim("x"):
        pass
    assert lock.exists()


@pytest.mark.slow
def test_two_sweeps_share_an_output_though_one_is_killed(bench, finished, tmp_path):
    """Each point once, and the table is that of a sweep that ran alone."""
    out = tmp_path / "out"
    words = ["sweep", *bench.flags(), "-p", out, *GRID, "--reference_module", bench.full_set]
    stays, killed = (pem_process.start(words, tmp_path / f"{i}.log") for i in range(2))
    killed.wait_for(out / "results.jsonl")
    killed.send(signal.SIGKILL)
    assert stays.wait() == 0, stays.text()
    lines = [r["key"] for r in json_lines.read(out / "results.jsonl") if "key" in r]
    assert len(lines) == len(set(lines))
    assert points(out).keys() == points(finished).keys()
    assert (out / "table.csv").read_bytes() == (finished / "table.csv").read_bytes()
