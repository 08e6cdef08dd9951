"""``pem evaluate --head``: one of the heads that a merge kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.sweep_data import LABELS, make

import pem_composition as library
from pem_composition.config import HeadInfo

WORDS = HeadInfo(LABELS, "classification")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """Two modules whose heads name the classes of MNLI, and their merge with both heads."""
    torch.set_num_threads(1)
    bench = make(tmp_path_factory.mktemp("heads"))
    for path in bench.modules:
        replace(library.load(path), head=WORDS).save(path, overwrite=True)
    modules = [library.load(path) for path in bench.modules]
    for policy in ("per-task", "first", "last"):
        merged = library.combine(modules, [0.5, 0.5], space="delta", head=policy)
        merged.save(bench.base.parent / policy)
    return bench


def words(bench, adapter: Path, *more: str) -> list[object]:
    return [
        "evaluate", "--model_name_or_path", bench.base, "--task_name", "mnli",
        "--validation_file", bench.validation, "--adapter", adapter, *more,
    ]  # fmt: skip


def loss(pem, bench, adapter: Path, out: Path, *more: str) -> float:
    done = pem(*words(bench, adapter, "--output_dir", out, *more))
    assert done.code == 0, done.err
    assert "newly initialised" not in done.out
    return json.loads((out / "eval_results.json").read_text())["eval_loss"]


def test_a_named_head_scores_as_the_merge_with_that_head(bench, tmp_path, pem):
    folder = bench.base.parent
    names = [path.name for path in bench.modules]
    found = [loss(pem, bench, folder / "per-task", tmp_path / n, "--head", n) for n in names]
    expected = [loss(pem, bench, folder / p, tmp_path / p) for p in ("first", "last")]
    assert found == expected
    assert found[0] != found[1]


def test_a_merge_with_several_heads_asks_which(bench, pem):
    merged, names = bench.base.parent / "per-task", [p.name for p in bench.modules]
    done = pem(*words(bench, merged))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert (
        f"has heads for several tasks; found {', '.join(names)}; name one (--head NAME)" in done.err
    )
    done = pem(*words(bench, merged, "--head", "other"))
    assert f"head 'other': no head of that name; found {', '.join(names)}" in done.err
    done = pem(*words(bench, bench.modules[0], "--head", names[0]))
    assert "found no named heads" in done.err


def test_a_head_without_a_module_is_refused(bench, pem):
    flags = words(bench, bench.modules[0], "--head", "x")
    flags[flags.index("--adapter") + 1] = "none"
    assert "--head: is a module's; add --adapter DIR" in pem(*flags).err


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("concat", "a merge whose head is of several tasks cannot be scored; found concat"),
        ("per-task", "--head per-task: task i is scored with the head of module i; found 1 tasks"),
    ],
)
def test_a_sweep_on_one_task_cannot_score_heads_of_several(bench, tmp_path, pem, policy, reason):
    done = pem("sweep", *bench.flags(), "-p", tmp_path / "s", "--head", policy)
    assert done.code == 2
    assert reason in done.err
