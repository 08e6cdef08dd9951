"""Sweeps over more than two modules, analogies, whole models and language models, on a tiny T5."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import sweep_data
from support.sweep_by_hand import Hand, check_by_hand, mean, points, refused, rows_of, run

from pem_composition.report import table
from pem_composition.report.records import read

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = ("--grid", "0", "0.25", "1")
SPACES = ("parameter", "delta")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> sweep_data.TextBench:
    return sweep_data.make_text(tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
def test_three_modules_are_scored_on_the_simplex(bench, tmp_path):
    out = tmp_path / "out"
    flags = bench.flags("rte", "sst2", modules=3)
    grid = ("--grid", 0, 0.25, 1, "--space", "delta")
    assert run("merge", *flags, "-p", out, *grid, "--evaluate") == 0
    found = read(out)
    curve = {tuple(p["coefficients"]): p["keys"] for p in found.summary["curve"]["delta"]}
    quarters = [c for c in itertools.product(range(5), repeat=3) if sum(c) == 4]
    assert set(curve) == {tuple(x / 4 for x in c) for c in quarters}
    for place, keys in enumerate(found.summary["singles"]):
        assert curve[tuple(float(i == place) for i in range(3))] == keys
    chosen = tuple(found.summary["selected"]["delta"])
    inner = {c: mean(found, keys) for c, keys in curve.items() if min(c) > 0}
    assert inner[chosen] == max(inner.values())
    check_by_hand(bench, [found.points[key] for key in curve[0.25, 0.5, 0.25]])
    equal = next(r for r in found.summary["rows"] if "equal" in r["id"])
    assert equal["coefficients"] == pytest.approx([1 / 3] * 3)


@pytest.mark.slow
def test_edges_are_chosen_only_where_no_point_holds_every_module(bench, tmp_path):
    flags = (*bench.flags("sst2", modules=3), "-p", tmp_path / "out", "--space", "delta")
    assert run("sweep", *flags, "--grid", 0, 0.5, 1) == 0
    assert len(read(tmp_path / "out").summary["curve"]["delta"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ia3", "full"])
def test_an_analogy_moves_the_classifier_along_the_difference(kind, bench, tmp_path):
    own = bench if kind == "lora" else sweep_data.make_text(tmp_path / "bench", kind)
    out = tmp_path / "out"
    flags = own.flags("rte", modules=3)
    words = ("-p", out, "--grid", 0, 0.5, 1, 0.9, 0.1, 1, "--evaluate")
    assert run("analogy", *flags, *words, "--reference_module", own.modules[3]) == 0
    found = read(out)
    spaces = SPACES if kind == "lora" else ("parameter",)
    assert tuple(found.summary["curve"]) == spaces
    for space in spaces:
        curve = found.summary["curve"][space]
        assert [p["coefficients"] for p in curve] == [
            [0, 1, -1], [0.5, 0.5, -0.5], [0.9, 0.1, -0.1], [1, 0, 0],
        ]  # fmt: skip
        assert curve[-1]["keys"] == found.summary["singles"][0]  # the classifier alone
        assert found.summary["selected"][space] in ([0.5, 0.5, -0.5], [0.9, 0.1, -0.1])
    middle = [found.points[k] for s in spaces for k in found.summary["curve"][s][2]["keys"]]
    check_by_hand(own, middle)
    assert all(r["names"] in (["m1"], ["m4"], ["m1", "m2", "m3"]) for r in points(out).values())
    ids = [row["id"] for row in found.summary["rows"]]
    assert ids == ["module 0", "reference", *(f"analogy, selected, {s} space" for s in spaces)]


@pytest.mark.slow
def test_the_gain_of_an_analogy_is_over_its_classifier(bench, tmp_path):
    out = tmp_path / "out"
    flags = (*bench.flags("rte", "sst2", modules=3), "-p", out, "--grid", 0, 0.5, 1)
    assert run("analogy", *flags, "--evaluate") == 0
    found = read(out)
    classifier, *others = found.summary["rows"]
    for row in others:
        for place, gain in enumerate(row["gains"]):
            keys = (row["keys"][place], classifier["keys"][place])
            expected = np.subtract(*(found.points[key]["score"] for key in keys))
            assert gain["gain"] == pytest.approx(expected)
    text = table.markdown(found)
    assert "gain of the mean over m1" in text
    assert found.summary["average"] is None
    assert "average" not in text


@pytest.mark.slow
def test_a_whole_model_merge_is_the_weighted_sum_of_the_weights(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    from pem_composition.evaluation.models import save_model

    bench = sweep_data.make_text(tmp_path / "bench", "full")
    out = tmp_path / "out"
    assert run("sweep", *bench.flags("rte"), "-p", out, "--grid", 0, 0.25, 1) == 0
    found = read(out)
    model, other = (AutoModelForSeq2SeqLM.from_pretrained(p) for p in bench.modules[:2])
    weights = other.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.mul_(0.25).add_(0.75 * weights[name])
    (tmp_path / "mixed").mkdir()
    save_model(model, tmp_path / "mixed")
    hand = Hand(bench.base)
    hand.model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mixed").eval()
    for key in found.summary["curve"]["parameter"][1]["keys"]:
        record = found.points[key]
        assert record["coefficients"] == [0.25, 0.75]
        given, _ = hand.answer(record["task"], rows_of(bench, record))
        assert record["predictions"] == given


@pytest.mark.slow
def test_language_models_are_chosen_by_the_smallest_loss(bench, tmp_path):
    out, flags = tmp_path / "out", bench.flags("sst2")
    flags = flags[: flags.index("--task_name")]
    words = ("--target", "next_block", "--block_size", 8, "--validation_file", bench.documents)
    assert run("sweep", *flags, *words, "-p", out, *GRID, "--space", "delta") == 0
    found = read(out)
    inner = found.summary["curve"]["delta"][1:-1]
    losses = {tuple(p["coefficients"]): mean(found, p["keys"]) for p in inner}
    assert losses[tuple(found.summary["selected"]["delta"])] == min(losses.values())
    record = found.points[found.summary["rows"][0]["keys"][0]]
    assert record["score"] == pytest.approx(np.mean(record["predictions"]), abs=1e-5)
    assert "Smaller is better" in table.markdown(found)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_analogy_is_of_three_modules(count, bench, tmp_path, capsys):
    flags = bench.flags("sst2", modules=count)
    message = refused(capsys, tmp_path, "analogy", *flags, *GRID, "--evaluate")
    assert f"wrong number of modules; found {count}, expected three" in message


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ((0, 0.3, 1), "1 is no multiple of STEP"),
        ((0.2, 0.1, 1), "all multiples of STEP that sum to 1"),
        ((0, 0.1, 1, 0, 0.5, 1), "all multiples of STEP that sum to 1"),
        ((0, 0.01, 1), "too many points; found 5151"),
        ((0, 1e-320, 1), "too many points; found inf"),
    ],
)
def test_a_grid_over_three_modules_is_the_whole_simplex(grid, reason, bench, tmp_path, capsys):
    flags = bench.flags("sst2", modules=3)
    assert reason in refused(capsys, tmp_path, "sweep", *flags, "--grid", *grid)
