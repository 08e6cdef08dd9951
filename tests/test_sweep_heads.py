"""Tasks of different classes in one sweep: one merged encoder, each task's own head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from support import own_heads
from support.sweep_by_hand import points, refused, run

import pem_composition as library
from pem_composition.config import HeadInfo
from pem_composition.report import table
from pem_composition.report.records import read

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = ("--grid", "0", "0.5", "1", "--head", "per-task")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> own_heads.Bench:
    return own_heads.make(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def finished(bench: own_heads.Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run("sweep", *bench.flags(), "-p", out, *GRID) == 0
    return out


def predicted(task: str, outputs) -> list:
    return outputs[:, 0].tolist() if task == "stsb" else outputs.argmax(1).tolist()


@pytest.mark.slow
def test_every_task_is_scored_with_its_own_head_on_the_shared_encoder(bench, finished):
    hand = own_heads.Hand(bench)
    folders = dict(zip(bench.tasks, bench.modules, strict=True))
    found = points(finished).values()
    assert {r["task"] for r in found} == set(bench.tasks)
    for record in found:
        modules = [library.load(folders[name]) for name in record["names"]]
        module = modules[0]
        if record["space"]:
            module = library.combine(
                modules, record["coefficients"], space=record["space"], head="none"
            )
        outputs = hand.outputs(record["task"], record["split"], module)
        expected = predicted(record["task"], outputs)
        assert [float(p) for p in record["predictions"]] == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
def test_gains_and_shares_are_against_the_own_module_of_each_task(bench, finished):
    found = read(finished)
    rows = {row["row"]: row for row in found.summary["rows"]}
    alone = [found.points[rows[task]["keys"][i]] for i, task in enumerate(bench.tasks)]
    own = [record["score"] for record in alone]
    counted = [o["score"] > 2 * o["standard_error"] for o in alone]
    assert found.summary["baseline"] == "own module"
    for row in rows.values():
        scores = [found.points[key]["score"] for key in row["keys"]]
        gains = [g["gain"] for g in row["gains"]]
        assert gains == pytest.approx(np.subtract(scores, own).tolist())
        shares = np.divide(scores, own)[counted]
        expected = pytest.approx(shares.mean()) if any(counted) else None
        assert row["mean"]["normalised"] == expected
    for i, task in enumerate(bench.tasks):
        assert rows[task]["gains"][i] == {"gain": 0.0, "gain_standard_error": 0.0}


@pytest.mark.slow
def test_the_regression_task_is_scored_by_its_correlation(bench, finished):
    record = next(r for r in points(finished).values() if r["task"] == "stsb")
    rows = bench.rows["stsb", record["split"]].read_text().splitlines()
    labels = [json.loads(line)["label"] for line in rows]
    expected = pearsonr(labels, [float(p) for p in record["predictions"]]).statistic
    assert record["score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_table_says_whose_head_scores(finished):
    text = table.markdown(read(finished))
    assert "gain of the mean over the task's own module" in text
    assert "Each task is scored with the head of its own module" in text


@pytest.mark.slow
def test_another_head_is_another_point(bench, finished, tmp_path, capsys):
    """The encoder's module stays as it is; what a task scores depends on its head as well."""
    other = own_heads.make(tmp_path / "bench")
    module = library.load(other.modules[1])
    tensors = {n: t * 1.5 if n.endswith(".head") else t for n, t in module.tensors.items()}
    replace(module, tensors=tensors).save(other.modules[1], overwrite=True)
    before = points(finished)
    out = tmp_path / "out"
    assert run("sweep", *other.flags(), "-p", out, *GRID) == 0
    same = points(out).keys() & before.keys()
    assert {before[key]["task"] for key in same} == {"mnli", "stsb"}


def test_tasks_of_different_classes_have_no_common_head(bench, tmp_path, capsys):
    message = refused(capsys, tmp_path, "sweep", *bench.flags())
    assert "need different heads" in message and "--head per-task" in message


def test_a_head_of_another_task_is_refused(bench, tmp_path, capsys):
    flags = bench.flags()
    flags[1:3] = flags[2:0:-1]
    message = refused(capsys, tmp_path, "sweep", *flags, *GRID)
    assert "rte for mnli: the module's head does not answer the task" in message


def test_a_head_of_other_outputs_is_refused_whether_their_classes_have_names(
    bench, tmp_path, capsys
):
    """PEFT's modules do not name their classes; the number of outputs says enough."""
    folders = dict(zip(bench.tasks, bench.modules, strict=True))
    for task, problem, said in (
        ("mnli", "classification", "found LABEL_0, LABEL_1, LABEL_2"),
        ("stsb", "regression", "found a score"),
    ):
        module = library.load(folders[task])
        unnamed = replace(module, head=HeadInfo((), problem))
        unnamed.save(tmp_path / task)
        flags = bench.flags((bench.tasks.index("rte"),))
        flags[1:2] = [str(tmp_path / task)] * 2
        for head in ("first", "average"):
            message = refused(
                capsys, tmp_path / "out", "sweep", *flags, "--grid", "0", "0.5", "1", "--head", head
            )
            assert f"{said}, expected" in message


def test_one_task_per_module_is_needed(bench, tmp_path, capsys):
    flags = bench.flags((0, 1))
    flags[3:3] = [str(bench.modules[2])]
    message = refused(capsys, tmp_path, "sweep", *flags, *GRID)
    assert "2 tasks for 3 modules" in message


@pytest.mark.slow
def test_rows_that_a_head_answers_in_another_order_are_other_results():
    """The words of a known task stay the same, whatever the head calls its outputs."""
    from pem_composition.objectives.classification import Classification
    from pem_composition.sweep.rows import Rows
    from pem_composition.tasks.data import Example
    from pem_composition.tasks.glue import get_task

    def identity(order: tuple[int, ...]) -> dict:
        return Rows(get_task("mnli"), [Example("a", "b", 0, 0)], Classification(order)).identity

    found = [identity(order) for order in ((), (2, 1, 0), (1, 0, 2))]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
