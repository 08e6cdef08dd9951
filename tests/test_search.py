"""Searches on a tiny encoder with a head per task: right values, resumable, nothing run twice."""

from __future__ import annotations

import csv
import json
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sqlalchemy.exc import OperationalError
from support import own_heads, pem_process
from support.sweep_by_hand import points, refused, run
from test_module import dense, expected

import pem_composition as library
from pem_composition import json_lines
from pem_composition.errors import DataError, RunFailed
from pem_composition.report import frames
from pem_composition.report import records as report
from pem_composition.sweep import goals, samplers, space, studies
from pem_composition.sweep.goals import Goal, Scored

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = ("--head", "per-task")
WIDE = ("--coefficients_range", "-0.5", "1.5")


@pytest.fixture(scope="module", autouse=True)
def migrations_are_read_once():
    """Optuna reads its scripts of migration three times for every store that it makes."""
    from optuna.storages._rdb.storage import _VersionManager as Manager

    make, made = Manager._create_alembic_script, []

    def script(manager):
        return made[0] if made else made.append(make(manager)) or made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manager, "_create_alembic_script", script)
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> own_heads.Bench:
    return own_heads.make(tmp_path_factory.mktemp("bench"), tasks=("mnli", "rte"))


def search(bench: own_heads.Bench, out: Path, *words: object) -> dict:
    assert run("search", *bench.flags(), "-p", out, *OWN, *words) == 0
    return report.read(out).summary


def trials(out: Path) -> list[dict]:
    return [r for r in json_lines.read(out / "results.jsonl") if "trial" in r]


METHODS = ("--methods", "sum", "ties", "--search", "density=0.1:0.9", "rank=4,0.9")


@pytest.fixture(scope="module")
def finished(bench: own_heads.Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three studies of five trials each."""
    out = tmp_path_factory.mktemp("finished") / "out"
    search(bench, out, *METHODS, *WIDE, "--trials", 5)
    return out


def test_a_leaderboard_takes_the_test_scores_of_every_method_and_grows(
    finished, bench, tmp_path, capsys
):
    file = tmp_path / "methods.csv"
    assert run("report", "-r", finished, "--leaderboard", file) == 2  # every study has a rank
    assert "no run with an exact sum" in capsys.readouterr().err and not file.exists()
    grid = ("--sampler", "grid", "--coefficients", "shared", "--grid", 0.5, 0.5, 1)
    other = own_heads.Bench(bench.base, bench.tasks[::-1], bench.modules[::-1], bench.rows)
    search(other, tmp_path / "sums", "--methods", "sum", *grid)  # in another order: the same run
    found = (tmp_path / "sums", finished)
    assert run("report", "-r", *found, "--leaderboard", file) == 0
    first = file.read_bytes()
    assert run("report", "-r", finished, "--leaderboard", file) == 0
    assert sorted(file.read_bytes().splitlines()) == sorted(first.splitlines())
    assert "a run; 1 run." in capsys.readouterr().out
    with file.open(newline="") as lines:
        found = {(line["method"], line["task"]): line for line in csv.DictReader(lines)}
    summary = report.read(finished)
    (name,) = {line["run"] for line in found.values()}
    assert name.startswith("base lora ")
    chosen = summary.summary["studies"]
    sums = {"exact sum", "sum in parameter space"}
    assert {m for m, _ in found} == {"own modules", *sums, *(s["study"] for s in chosen)}
    rows = {row["id"]: row for row in summary.summary["rows"]}
    for study in (s["study"] for s in chosen):
        for task, record in zip(
            bench.tasks, summary.scored(rows[f"best {study}"]["keys"]), strict=True
        ):
            assert record["split"] == "test"
            assert float(found[study, task]["score"]) == record["score"]
    own = summary.points[rows["module 1"]["keys"][1]]["score"]
    assert float(found["own modules", "rte"]["score"]) == pytest.approx(own, abs=1e-6)
    assert run("report", "-r", finished, "--leaderboard", file, "--html", "x.html") == 2
    assert "--html: has no effect with --leaderboard" in capsys.readouterr().err


def own_scores(found: dict, bench: own_heads.Bench) -> list[dict]:
    """Records of module i alone on task i, on the validation rows."""
    alone = {(r["names"][0], r["task"]): r for r in found.values()
             if r["space"] is None and r["split"] == "validation"}  # fmt: skip
    return [alone[task, task] for task in bench.tasks]


# --- values ---


@pytest.mark.slow
def test_every_study_has_its_trials_within_its_space(finished):
    found = trials(finished)
    studies = {t["study"] for t in found}
    assert studies == {"sum in parameter space", "sum in delta space", "ties"}
    for study in studies:
        own = [t for t in found if t["study"] == study]
        assert sorted(t["number"] for t in own) == list(range(5))
        expected = {"c0", "c1"}
        expected |= {"rank"} if study != "sum in parameter space" else set()
        expected |= {"density"} if study == "ties" else set()
        for t in own:
            assert t["candidate"].keys() == expected
            assert all(-0.5 <= c <= 1.5 for c in t["coefficients"])
            assert t["candidate"].get("rank", 4) in (4, 0.9)
            assert 0.1 <= t["candidate"].get("density", 0.5) <= 0.9


@pytest.mark.slow
def test_a_trial_is_the_merge_it_says_scored_as_in_a_sweep(bench, finished):
    hand = own_heads.Hand(bench)
    modules = [library.load(p) for p in bench.modules]
    found = points(finished)
    for t in [t for t in trials(finished) if t["number"] in (0, 3)]:
        c = t["candidate"]
        if t["study"] == "ties":
            options = {"method": "ties", "settings": {"density": c["density"]}, "rank": c["rank"]}
        else:
            options = {"space": t["study"].split()[2], "rank": c.get("rank")}
        merged = library.combine(modules, [c["c0"], c["c1"]], head="none", **options)
        for task, key in zip(bench.tasks, t["keys"], strict=True):
            outputs = hand.outputs(task, "validation", merged).argmax(1).tolist()
            assert found[key]["predictions"] == "".join(map(str, outputs))
        scores = [found[key]["score"] for key in t["keys"]]
        assert t["values"] == [pytest.approx(np.mean(scores))]


def stored(module: Path) -> dict[str, torch.Tensor]:
    return load_file(module / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_rank_holds_at_every_point_and_the_page_names_what_makes_its_modules(bench, tmp_path):
    """Also where one module stands alone in the sum; ranks by NumPy, files by PEM.save."""
    stats = [tmp_path / f"seen{i}" for i in range(2)]
    model = ("--model_name_or_path", bench.base)
    others = bench.modules[::-1]
    for task, module, other, out in zip(bench.tasks, bench.modules, others, stats, strict=True):
        rows = ("--task_name", task, "--train_file", bench.rows[task, "validation"])
        words = ("--adapter", module, "--merge_with", other, *rows, "--output_dir", out)
        assert run("gram", *model, *words) == 0
    methods = ("--methods", "sum", "ssr", "--subspace_list", *stats, "--rank", 2)
    grid = ("--sampler", "grid", "--grid", 0, 0.5, 1, "--dtype", "float16", "--space", "delta")
    summary = search(bench, tmp_path / "out", *methods, *grid)
    found = frames.points(report.read(tmp_path / "out"))
    assert sorted(found.of(frames.CURVE)["series"].value_counts()) == [3, 3]
    modules = [library.load(p) for p in bench.modules]
    assert {r["rank"] for r in points(tmp_path / "out").values() if r["space"]} == {2}
    for n, line in enumerate(found.of(frames.CURVE).to_dict("records")):
        out = tmp_path / f"m{n}"
        words = shlex.split(line["command"])[1:]
        assert run(*(out if word == "OUT" else word for word in words)) == 0
        made = library.load(out)
        ranks = {np.linalg.matrix_rank(dw) for dw in dense(made).values()}
        assert max(ranks) == 2
        assert {t.dtype for t in stored(out).values()} == {torch.float16}
        if line["series"].startswith("sum"):
            sums = expected(modules, line["coefficients"])
            for layer, dw in sums.items():
                u, s, vh = np.linalg.svd(dw)
                best = u[:, :2] * s[:2] @ vh[:2]
                np.testing.assert_allclose(dense(made)[layer], best, atol=2e-3)
        if line["chosen"] and line["series"] == summary["best"]:
            written = stored(tmp_path / "out" / "best")
            assert all(torch.equal(stored(out)[k], t) for k, t in written.items())
            known, again = (
                json.loads((folder / "pem.json").read_text())["certificate"]
                for folder in (tmp_path / "out" / "best", out)
            )
            assert known == again and 0 < known["total"] < 1


@pytest.mark.slow
def test_the_best_of_each_study_and_of_all_are_chosen_on_the_selection_rows(finished):
    summary = report.read(finished).summary
    best = {}
    for study in summary["studies"]:
        own = [t for t in trials(finished) if t["study"] == study["study"]]
        best[study["study"]] = max(t["values"][0] for t in own)
        assert study["values"][0] == best[study["study"]]
        assert study["number"] == min(
            t["number"] for t in own if t["values"][0] == study["values"][0]
        )
    assert best[summary["best"]] == max(best.values())
    splits = {
        report.read(finished).points[k]["split"] for row in summary["rows"] for k in row["keys"]
    }
    assert splits == {"test"}


@pytest.mark.slow
def test_the_best_module_is_written(bench, finished):
    summary = report.read(finished).summary
    chosen = next(s for s in summary["studies"] if s["study"] == summary["best"])
    module, c = library.load(finished / "best"), chosen["candidate"]
    options: dict = {"space": chosen["space"], "rank": c.get("rank")}
    if chosen["method"] == "ties":
        options |= {"method": "ties", "settings": {"density": c["density"]}}
    expected = library.combine(
        [library.load(p) for p in bench.modules], [c["c0"], c["c1"]], head="none", **options
    )
    assert module.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(module.tensors[n], t) for n, t in expected.tensors.items())


@pytest.mark.slow
def test_the_table_has_baselines_and_costs(finished):
    text = (finished / "table.md").read_text()
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:5] == [
        "mnli",
        "rte",
        "equal weights, parameter space",
        "equal weights, delta space",
    ]
    assert sum(row.endswith("*") for row in rows) == 1
    assert "15 trials (tpe, seed 42), chosen by mean on the validation rows" in text
    summary = report.read(finished).summary
    ranks = {
        row["row"]: c and c["rank"]
        for row, c in zip(summary["rows"], summary["costs"], strict=True)
    }
    assert ranks["equal weights, parameter space"] == 4 and ranks["equal weights, delta space"] == 8
    assert summary["peak_memory"] > 10**7
    assert (finished / "table.csv").read_text().startswith("row,coefficients,task,metric,score")


@pytest.mark.slow
def test_a_grid_is_the_sweep(bench, tmp_path, capsys):
    grid = ("--grid", 0, 0.5, 1)
    search(bench, tmp_path / "out", "--sampler", "grid", *grid)
    assert not (tmp_path / "out" / samplers.STORE).exists()
    before = points(tmp_path / "out")
    capsys.readouterr()
    assert run("sweep", *bench.flags(), "-p", tmp_path / "out", *OWN, *grid) == 0
    new = [r for k, r in points(tmp_path / "out").items() if k not in before]
    assert {r["split"] for r in new} <= {"test"}  # a sweep selects among true mixtures
    assert len(trials(tmp_path / "out")) == 2 * 3


@pytest.mark.slow
def test_a_grid_goes_through_every_range_and_every_setting(bench, tmp_path):
    words = ["--sampler", "grid", "--methods", "ties", "--coefficients", "shared"]
    words += ["--grid", 0.5, 0.5, 1, 2, 1, 2]
    words += ["--search", "density=0.2:0.4:0.2", "election=total,frequency"]
    search(bench, tmp_path / "out", *words)
    found = {tuple(t["candidate"].items()) for t in trials(tmp_path / "out")}
    assert found == {
        (("c", c), ("density", d), ("election", e))
        for c in (0.5, 1.0, 2.0) for d in (0.2, 0.4) for e in ("total", "frequency")
    }  # fmt: skip


@pytest.mark.slow
def test_lorahub_minimises_the_loss_of_the_plain_sum_with_its_penalty(bench, tmp_path):
    """Published: loss((sum w_i A_i)(sum w_i B_i)) + 0.05 mean |w|, w within 1.5."""
    words = ("--methods", "adapters_linear", "--search", "normalize=false", "--goal", "loss")
    flags = (
        "--penalty",
        0.05,
        "--coefficients_range",
        -1.5,
        1.5,
        "--sampler",
        "cma",
        "--trials",
        3,
    )
    search(bench, tmp_path / "out", *words, *flags)
    hand = own_heads.Hand(bench)
    modules = [library.load(p) for p in bench.modules]
    for t in trials(tmp_path / "out"):
        w = t["coefficients"]
        plain = {
            n: sum(c * m.tensors[n] for c, m in zip(w, modules, strict=True))
            for n in modules[0].adapter_tensors()
        }
        merged = own_heads.replace(modules[0], tensors=plain, head=None)
        losses = []
        for task in bench.tasks:
            rows = map(json.loads, bench.rows[task, "validation"].read_text().splitlines())
            gold = torch.tensor([own_heads.LABELS[task].index(r["label"]) for r in rows])
            outputs = hand.outputs(task, "validation", merged)
            losses.append(float(torch.nn.functional.cross_entropy(outputs, gold)))
        expected = np.mean(losses) + 0.05 * np.mean(np.abs(w))
        assert -t["values"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_searches_of_several_seeds_are_averaged(bench, finished, tmp_path, capsys):
    search(bench, tmp_path / "other", *METHODS, *WIDE, "--trials", 2, "--seed", 1)
    found = [report.read(path) for path in (finished, tmp_path / "other")]
    capsys.readouterr()
    assert run("report", "-r", finished, tmp_path / "other", "-p", tmp_path / "table") == 0
    text = capsys.readouterr().out
    assert (tmp_path / "table" / "table.md").read_text() in text
    lines = [x for x in text.splitlines() if "| best ties | 2 |" in x]
    (line,) = [x for x in lines if x.startswith("| mean of mnli, rte |")]
    rows = [next(w for w in f.summary["rows"] if w["row"] == "best ties") for f in found]
    means = [row["mean"]["score"] for row in rows]
    assert f"| {np.mean(means):.4f} +- {np.std(means, ddof=1):.4f} |" in line
    before = (finished / "table.md").read_text()
    assert run("report", "-r", finished) == 0
    assert (finished / "table.md").read_text() == before


# --- goals ---


def test_a_task_whose_own_module_learned_nothing_does_not_count_in_the_normalised_mean():
    records = [{"score": s, "metric": "accuracy"} for s in (0.4, 0.1, 0.3)]
    own = [{"score": s, "standard_error": e} for s, e in ((0.8, 0.1), (0.0, 0.0), (0.19, 0.1))]
    tasks = ("rte", "cola", "qnli")
    assert Goal("normalised").value(Scored(tasks, records, own)) == pytest.approx(0.5)
    note = goals.check_normalised(["mean", "normalised"], tasks, own)
    assert "cola (0.0000 +- 0.0000), qnli (0.1900 +- 0.1000)" in note
    assert goals.check_normalised(["mean"], tasks, own) == ""
    assert goals.check_normalised(["normalised"], tasks[:1], own[:1]) == ""
    with pytest.raises(DataError, match="no task's own module scores above 0; found cola"):
        goals.check_normalised(["normalised"], tasks[1:], own[1:])


def test_goals_are_what_they_are_called():
    records = [{"score": s, "metric": "accuracy", "loss": x, "invalid_share": i}
               for s, x, i in ((0.6, 0.5, None), (0.3, 1.5, 0.2))]  # fmt: skip
    own = [{"score": s, "standard_error": 0.1} for s in (0.8, 0.4)]
    scored = Scored(("rte", "mnli"), records, own, size=2.0)
    values = {name: Goal(name, 0.05).value(scored) for name in (*goals.NAMES, "mnli")}
    assert values == pytest.approx(
        {"mean": 0.45, "worst": 0.3, "normalised": 0.75, "loss": -1.1, "mnli": 0.3}
    )
    for text, missed in (
        ("rte>=0.55", 0), ("rte >= 0.7", 0.1), ("mean<=0.4", 0.05), ("invalid<=0.1", 0.1)
    ):  # fmt: skip
        found = goals.condition(text, ("rte", "mnli"), own=True)
        assert found.violation(scored) == pytest.approx(missed)


def test_what_is_better_when_smaller_is_turned_round_once():
    """By the loss: the goal is maximised, conditions and readers see the loss itself."""
    records = [{"score": s, "metric": "accuracy", "loss": x} for s, x in ((0.6, 0.5), (0.3, 2.0))]
    own = [{"score": 0.5, "standard_error": 0.1, "loss": 1.0} for _ in range(2)]
    scored = Scored(("rte", "mnli"), records, own, metrics=("loss", "loss"))
    numbers = {name: Goal(name).number(scored) for name in (*goals.NAMES, "mnli")}
    # worst is the largest loss; normalised is the mean of 1 / .5 and 1 / 2, greater is better
    assert numbers == pytest.approx(
        {"mean": 1.25, "worst": 2.0, "normalised": 1.25, "loss": 1.25, "mnli": 2.0}
    )
    assert {n: Goal(n).sign(scored) for n in numbers} == {
        "mean": -1, "worst": -1, "normalised": 1, "loss": -1, "mnli": -1,
    }  # fmt: skip
    for text, missed in (("loss<=1", 0.25), ("worst<=2", 0), ("mean<=0.25", 1), ("mnli>=2.5", 0.5)):
        found = goals.condition(text, ("rte", "mnli"), own=True)
        assert found.violation(scored) == pytest.approx(missed)
    mixed = Scored(("rte", "mnli"), records, metrics=("accuracy", "loss"))
    with pytest.raises(DataError, match="goal mean: measures in different units"):
        Goal("mean").number(mixed)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_front_is_what_no_other_point_beats(values):
    found = goals.front(values)
    for i, v in enumerate(values):
        beaten = any(w != v and all(a >= b for a, b in zip(w, v, strict=True)) for w in values)
        assert (not beaten and values.index(v) == i) == (i in found)


@pytest.mark.slow
def test_a_condition_decides_before_the_goal(bench, tmp_path):
    words = ("--space", "delta", "--trials", 6, *WIDE)
    search(bench, tmp_path / "a", *words, "--goal", "rte")
    scores = [points(tmp_path / "a")[t["keys"][0]]["score"] for t in trials(tmp_path / "a")]
    assert min(scores) < max(scores), "the rows must tell the trials apart"
    bound = round((min(scores) + max(scores)) / 2, 3)
    condition = ("--constraint", f"mnli>={bound}")
    (study,) = search(bench, tmp_path / "b", *words, "--goal", "rte", *condition)["studies"]
    assert study["violation"] == 0
    assert points(tmp_path / "b")[study["keys"][0]]["score"] >= bound
    assert f"with mnli>={bound:g}" in (tmp_path / "b" / "table.md").read_text()
    none = ("--constraint", "mnli>=0.99")
    (study,) = search(bench, tmp_path / "c", *words, "--goal", "rte", *none)["studies"]
    assert study["violation"] > 0
    assert "(misses a condition)" in (tmp_path / "c" / "table.md").read_text()


@pytest.mark.slow
def test_two_goals_give_a_front(bench, plots, tmp_path):
    words = ("--goal", "mnli", "rte", "--sampler", "random", "--trials", 6, "--space", "delta")
    summary = search(bench, tmp_path / "out", *words)
    found = trials(tmp_path / "out")
    expected = {found[i]["number"] for i in goals.front([t["values"] for t in found])}
    assert {number for _, number in summary["front"]} == expected
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 5000


# --- resuming ---


def same(a: Path, b: Path) -> None:
    def content(out: Path) -> list:
        key = lambda t: (t["study"], t["number"])  # noqa: E731
        return [(t["study"], t["candidate"], t["values"]) for t in sorted(trials(out), key=key)]

    assert content(a) == content(b)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "cma", "random"])
def test_a_search_in_two_parts_is_the_search_at_once(sampler, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "STARTUP", 2)
    words = ("--space", "delta", "--sampler", sampler)
    search(bench, tmp_path / "once", *words, "--trials", 8)
    search(bench, tmp_path / "parts", *words, "--trials", 3)
    search(bench, tmp_path / "parts", *words, "--trials", 8)
    same(tmp_path / "once", tmp_path / "parts")
    assert len({tuple(t["coefficients"]) for t in trials(tmp_path / "once")}) == 8
    search(bench, tmp_path / "three", *words, "--trials", 3)
    search(bench, tmp_path / "parts", *words, "--trials", 3)  # fewer than are there
    three, parts = (report.read(tmp_path / n).summary["studies"] for n in ("three", "parts"))
    assert three == parts and three[0]["tried"] == 3


@pytest.mark.slow
def test_a_study_of_one_candidate_is_one_trial(bench, tmp_path):
    words = ("--methods", "ties", "--coefficients", "fixed", "--trials", 5)
    search(bench, tmp_path / "out", *words)
    (trial,) = trials(tmp_path / "out")
    assert (trial["candidate"], trial["coefficients"]) == ({}, [1.0, 1.0])


@pytest.mark.slow
def test_a_finished_search_loads_no_model(bench, finished, tmp_path, monkeypatch, capsys):
    from pem_composition.evaluation import models

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base model was loaded")

    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(models, "load_base", never)
    search(bench, tmp_path / "out", *METHODS, *WIDE, "--trials", 5)
    assert ": 0 points scored" in capsys.readouterr().out
    assert len(trials(tmp_path / "out")) == 15


@pytest.mark.slow
def test_a_trial_whose_process_died_is_drawn_again(bench, tmp_path):
    """As SIGKILL leaves it: running in the store, without a line."""
    import optuna

    samplers.need_optuna()
    words = ("--space", "delta", "--trials", 4)
    search(bench, tmp_path / "once", *words)
    search(bench, tmp_path / "killed", "--space", "delta", "--trials", 2)
    store = studies.open_store(tmp_path / "killed")
    (name,) = optuna.study.get_all_study_names(store)
    study = optuna.load_study(study_name=name, storage=store)
    studies.ask(store, study, [space.Dimension(f"c{i}", 0.0, 1.0) for i in (0, 1)], 4)
    search(bench, tmp_path / "killed", *words)

    def values(out: Path) -> list:
        return [(t["candidate"], t["values"]) for t in trials(out)]

    assert values(tmp_path / "killed") == values(tmp_path / "once")


@pytest.mark.slow
def test_two_workers_share_the_trials(bench, tmp_path):
    words = ("--space", "delta", "--sampler", "random", "--trials", 6)
    search(bench, tmp_path / "two", *words, "--workers", 2)
    found = trials(tmp_path / "two")
    assert len(found) == len({tuple(t["coefficients"]) for t in found}) == 6
    lines = [r["key"] for r in json_lines.read(tmp_path / "two" / "results.jsonl") if "key" in r]
    search(bench, tmp_path / "one", *words)
    drawn = {tuple(t["coefficients"]) for t in trials(tmp_path / "one")}
    assert {tuple(t["coefficients"]) for t in found} == drawn
    assert set(lines) >= {k for t in found for k in t["keys"]}


@pytest.mark.slow
def test_the_store_holds_numbers_and_no_pickle(bench, tmp_path):
    search(bench, tmp_path / "out", "--space", "delta", "--sampler", "cma", "--trials", 8)
    with sqlite3.connect(tmp_path / "out" / samplers.STORE) as store:
        for table in ("trial_system_attributes", "study_system_attributes"):
            assert store.execute(f"select count(*) from {table}").fetchone() == (0,)
        keys = {key for (key,) in store.execute("select key from trial_user_attributes")}
    assert keys == {samplers.PLACE, studies.HOST}


def test_cma_es_gets_nearer_than_chance():
    """A bowl in three dimensions, values alone: the mean of the last draws against random ones."""
    import optuna

    samplers.need_optuna()
    study = space.Study(
        "simple", "delta", 3, "lora", tuple(space.Dimension(f"c{i}", -1.0, 2.0) for i in range(3))
    )
    centre, means = np.array([1.2, -0.4, 0.3]), {}
    for sampler in (samplers.CMA, samplers.RANDOM):
        store = optuna.storages.InMemoryStorage()
        stored = studies.open_study(store, sampler, study, sampler, 1, 1)
        values = []
        for _ in range(80):
            trial = studies.ask(store, stored, study.dimensions, 80)
            value = -float(np.sum((np.array(list(trial.params.values())) - centre) ** 2))
            stored.tell(trial, [value])
            values.append(value)
        assert studies.ask(store, stored, study.dimensions, 80) is None
        means[sampler] = np.mean(values[-20:])
    assert means[samplers.CMA] > 0.2 * means[samplers.RANDOM]
    assert means[samplers.RANDOM] < -1


# --- refusals ---

REFUSALS = {
    "method": (["--methods", "tiess"], "did you mean ties?"),
    "goal": (["--goal", "best"], "--goal: nothing of that name; found best"),
    "goals": (["--goal", "mean", "rte", "mnli"], "--goal: too many"),
    "condition": (["--constraint", "rte=0.5"], "--constraint: not a condition"),
    "condition of two points": (["--constraint", "rte>=1.2.3"], "--constraint: not a condition"),
    "condition without end": (["--constraint", "rte>=1e999"], "--constraint: not a condition"),
    "goal twice": (["--goal", "mean", "mean"], "--goal: given twice"),
    "penalty": (["--penalty", "0.5"], "--penalty: has no effect without --goal loss"),
    "condition on": (["--constraint", "cola>=0.5"], "--constraint: nothing of that name"),
    "dimension": (["--search", "densty=0.1:0.9"], "no method of the search has 'densty'"),
    "dimension of another": (["--search", "density=0.1:0.9"], "no method of the search has"),
    "range": (["--methods", "ties", "--search", "density=0.9:0.1"], "LOW must be below HIGH"),
    "out of range": (["--methods", "ties", "--search", "density=0.5:2"], "must be in (0, 1]"),
    "rank": (["--search", "rank=0,4"], "--search rank: not a rank"),
    "ranks and shares": (["--search", "rank=0.5:1.5:0.5"], "all of the energy needs no rank"),
    "step": (
        ["--methods", "ties", "--search", "density=0.1:0.9", "--sampler", "grid"], "needs a step",
    ),
    "coefficients": (["--coefficients_range", "1", "0"], "--coefficients_range: not a range"),
    "endless": (["--coefficients_range", "-1e308", "1e308"], "two finite numbers"),
    "too fine": (
        ["--methods", "ties", "--search", "density=0.1:0.9:1e-320", "--sampler", "grid"],
        "--search density: too many points; found inf",
    ),
    "no way": (
        ["--methods", "ties", "--search", "density=0.1:0.9:0", "--sampler", "grid"],
        "--search density: the step does not lead from start to stop",
    ),
    "trials": (["--trials", "0"], "--trials: cannot be used"),
    "cma": (["--coefficients", "shared", "--sampler", "cma"], "CMA-ES needs two numbers"),
    "cma goals": (["--goal", "mnli", "rte", "--sampler", "cma"], "CMA-ES has one goal"),
    "fisher": (["--methods", "fisher"], "--fisher_list: goes with --methods fisher"),
    "ssr": (["--methods", "ssr"], "--subspace_list: goes with --methods ssr"),
    "pairs only": (["--methods", "simple"], "unknown method 'simple'"),
    "sampler": (["--sampler", "bayes"], "invalid choice: 'bayes'"),
    "storage": (["--storage", "redis://here"], "--storage: no such storage; found redis://here"),
    "password": (["--storage", "postgresql://me:word@here/db"], "would stand in the results"),
    "join": (["--join", "runs/search"], "--join: brings the flags of the search"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    words, reason, bench, tmp_path, capsys
):
    assert reason in refused(capsys, tmp_path, "search", *bench.flags(), *OWN, *words)


@pytest.mark.slow
def test_without_optuna_one_line_says_what_to_install(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("search", *bench.flags(), *OWN, "-p", tmp_path / "out") == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{sys.executable} -m pip install 'optuna>=4.4' 'cmaes>=0.11'" in err
    assert not (tmp_path / "out").exists()


def _of_the_system(program: str) -> str | None:
    """Where a program of the system is, though its folder be on the path of few users."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture
def postgresql(tmp_path_factory):
    """A database server of its own, on a socket in a folder."""
    pytest.importorskip("psycopg2")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") if not found else str(found[-1])
    if initdb is None:
        pytest.skip("no PostgreSQL server is installed (Debian: postgresql)")
    # A socket's path is short, and the server's own user has to reach it; it refuses root.
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    runuser = _of_the_system("runuser") or "runuser"
    own = [runuser, "-u", "postgres", "--"] if os.getuid() == 0 else []
    if own:
        shutil.chown(folder, "postgres")
    control = [*own, str(Path(initdb).with_name("pg_ctl")), "-D", str(folder / "data"), "-w"]
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    command = [*own, initdb, "-A", "trust", "-U", "pem", "-D", str(folder / "data")]
    subprocess.run(command, **quiet)
    subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], **quiet)
    yield f"postgresql+psycopg2://pem@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)


@pytest.fixture
def mysql(tmp_path_factory):
    """A MariaDB server of its own, on a socket in a folder; it speaks MySQL's protocol."""
    pytest.importorskip("pymysql")
    server, install = map(_of_the_system, ("mariadbd", "mariadb-install-db"))
    if server is None or install is None:
        pytest.skip("no MariaDB server is installed (Debian: mariadb-server)")
    import pymysql

    folder = Path(tempfile.mkdtemp(prefix="my", dir="/tmp"))
    own = ["--user=mysql"] if os.getuid() == 0 else []
    if own:
        shutil.chown(folder, "mysql")
    where = [*own, f"--datadir={folder / 'data'}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    trust = "--auth-root-authentication-method=normal"
    subprocess.run([install, "--no-defaults", *where, trust, "--skip-test-db"], check=True, **quiet)
    socket = folder / "socket"
    options = [f"--socket={socket}", "--skip-networking", f"--pid-file={folder / 'pid'}"]
    process = subprocess.Popen([server, "--no-defaults", *where, *options], **quiet)
    try:
        for _ in range(600):
            with suppress(pymysql.err.OperationalError):
                pymysql.connect(unix_socket=str(socket), user="root").query("CREATE DATABASE pem")
                break
            assert process.poll() is None, "the server stopped"
            time.sleep(0.1)
        yield f"mysql+pymysql://root@/pem?unix_socket={socket}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


SHARED = ("--space", "delta", "--sampler", "random", "--trials", "12")
REPETITIONS = int(os.environ.get("REPETITIONS", "1"))  # of killing at random moments


@pytest.fixture(scope="module")
def alone(bench, tmp_path_factory):
    """The summary of the search that the processes share, by one process."""
    return search(bench, tmp_path_factory.mktemp("alone") / "out", *SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize("kind", ["journal", "postgresql", "mysql"])
def test_of_four_processes_two_are_killed_and_no_trial_is_lost_or_doubled(
    bench, alone, tmp_path, request, kind, repetition
):
    """Two by the command and two that join; the first one is among the killed."""
    out, random_ones = tmp_path / "out", random.Random(f"{kind} {repetition}")
    place = tmp_path / "journal" if kind == "journal" else None
    storage = f"journal:{place}" if place else request.getfixturevalue(kind)
    command = ["search", *bench.flags(), "-p", out, *OWN, *SHARED, "--storage", storage]
    first = pem_process.start(command, tmp_path / "first.log")
    first.wait_for(out / "search.json")
    others = [pem_process.start(["search", "--join", out], tmp_path / f"{i}.log") for i in range(2)]
    first.wait_for(out / "results.jsonl")
    second = pem_process.start(command, tmp_path / "second.log")
    for killed in (first, others.pop()):
        time.sleep(random_ones.random())
        with suppress(ProcessLookupError):  # a fast machine is done by then
            killed.send(signal.SIGKILL)
    left = (second, *others)
    assert [child.wait() for child in left] == [0, 0], [child.text()[-2000:] for child in left]
    found = trials(out)
    assert sorted(t["number"] for t in found) == list(range(12))
    lines = [r["key"] for r in json_lines.read(out / "results.jsonl") if "key" in r]
    assert len(lines) == len(set(lines))
    assert not list(out.glob(".results.jsonl.writer-*"))
    (one,), (many,) = alone["studies"], report.read(out).summary["studies"]
    for name in ("number", "candidate", "values", "tried"):
        assert many[name] == one[name], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_process_that_dies_while_it_draws_leaves_nothing_to_wait_for(
    bench, alone, tmp_path, request, kind
):
    """A trial without a machine or a heartbeat, which Optuna never takes for dead."""
    import optuna

    storage = request.getfixturevalue(kind)
    words = ("--storage", storage, *SHARED)
    search(bench, tmp_path / "out", *words[:-1], 2)
    store = studies.open_store(tmp_path, storage)
    (name,) = optuna.study.get_all_study_names(store)
    optuna.load_study(study_name=name, storage=store).ask()
    (many,) = search(bench, tmp_path / "out", *words)["studies"]
    assert many["values"] == alone["studies"][0]["values"]
    assert sorted(t["number"] for t in trials(tmp_path / "out")) == list(range(12))


@pytest.mark.slow
def test_a_sum_that_the_dtype_does_not_hold_is_a_trial_without_a_result(bench, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--sampler", "grid", "--grid", "0", "1e7", "1e7", "--space", "delta")
    assert run("search", *bench.flags(), "-p", out, *OWN, *words, "--dtype", "float16") == 0
    printed = capsys.readouterr().out
    assert "left out: " in printed and "does not fit float16" in printed
    fits, too_large = sorted(trials(out), key=lambda t: t["number"])
    assert fits["keys"] and not fits["violation"]
    assert not too_large["keys"] and too_large["violation"] > 0
    assert library.load(out / "best").tensors


@pytest.mark.slow
def test_a_grid_of_a_method_that_needs_statistics_is_referred_to_a_search(bench, tmp_path, capsys):
    words = ("-w", "fisher", "-f", "a", "b", "--grid", 0, 0.5, 1, "--evaluate")
    assert run("merge", *bench.flags(), "-p", tmp_path / "out", *words) == 2
    assert "pem search --methods fisher --sampler grid" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_store_that_can_be_written_no_more_is_said_in_one_line(tmp_path):
    full = OperationalError("INSERT", {}, Exception("database or disk is full"))
    with (
        pytest.raises(RunFailed, match="database or disk is full") as error,
        studies.said_of(tmp_path, samplers.SQLITE),
    ):
        raise full
    assert str(error.value).startswith(f"{tmp_path / samplers.STORE}: the study cannot be kept")
    assert "\n" not in str(error.value) and "it goes on" in str(error.value)
