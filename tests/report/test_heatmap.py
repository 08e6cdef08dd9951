"""Heat maps of comparisons: what is drawn where."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pem_composition.report import heatmap

MEASURES = (
    "norm_a", "norm_b", "norm_ratio", "cosine", "sign_conflict", "weighted_sign_conflict",
    "column_overlap", "row_overlap", "cross_term_error",
)  # fmt: skip


def pair(values: dict[str, float], **fixed: float | None) -> dict:
    rows = {n: dict.fromkeys(MEASURES, v) | fixed for n, v in values.items()}
    return {"a": "x", "b": "y", "total": dict.fromkeys(MEASURES, 0.5) | fixed, "layers": rows}


PAIR = pair(
    {
        "enc.layer.0.att.query": 0.1, "enc.layer.0.att.value": 0.2, "enc.layer.10.att.query": 0.3,
        "enc.layer.2.att.query": -0.4, "enc.layer.2.att.value": 0.5,
    }
)  # fmt: skip


def test_a_cell_stands_at_its_depth_and_target():
    rows, depths, values = heatmap.grid_of(PAIR, "cosine")
    assert rows == ["enc.layer.#.att.query", "enc.layer.#.att.value"]
    assert depths == [0, 2, 10]
    assert values[0] == [0.1, -0.4, 0.3]
    assert values[1][:2] == [0.2, 0.5]
    assert math.isnan(values[1][2])


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("bert.encoder.layer.3.output.dense", ("bert.encoder.layer.#.output.dense", 3)),
        ("decoder.block.2.layer.1.EncDecAttention.q",
         ("decoder.block.#.layer.1.EncDecAttention.q", 2)),
        ("transformer.h.11.attn.c_attn", ("transformer.h.#.attn.c_attn", 11)),
        ("classifier", ("classifier", 0)),
    ],
)  # fmt: skip
def test_depth_is_the_first_number_of_a_name(layer, place):
    assert heatmap.place_of(layer) == place


def test_panels_show_the_numbers_and_leave_out_what_there_is_not():
    whole = heatmap.draw(PAIR)
    titles = [a.get_title() for a in whole.axes if a.get_title()]
    assert len(titles) == len(heatmap.PANELS)
    assert titles[0].endswith("(total 0.5)")
    image = whole.axes[0].images[0]
    assert image.get_array()[0, 1] == pytest.approx(-0.4)
    assert image.get_clim() == (-1, 1)
    assert sorted(t.get_text() for t in whole.axes[0].texts) == [
        "-0.40", "0.10", "0.20", "0.30", "0.50",
    ]  # fmt: skip
    bare = heatmap.draw(pair({"h.0.k": 1.0, "h.1.k": 0.5}, column_overlap=None, row_overlap=None))
    assert len([a for a in bare.axes if a.get_title()]) == len(heatmap.PANELS) - 2


@pytest.mark.slow
def test_the_same_comparison_gives_the_same_files(tmp_path: Path, plots):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = heatmap.write({"pairs": [PAIR, pair({})]}, tmp_path / name)
        assert [f.name for f in files] == ["heatmap.png", "heatmap.pdf"]
    for file in ("heatmap.png", "heatmap.pdf"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_every_pair_has_its_own_files():
    assert heatmap.file_names(1) == ["heatmap"]
    assert heatmap.file_names(3) == ["heatmap-0", "heatmap-1", "heatmap-2"]


def test_cells_that_print_one_number_have_one_colour_and_small_numbers_are_told_apart():
    near = pair({"h.0.k": 0.7012, "h.1.k": 0.6993, "h.2.k": 0.71}, cross_term_error=None)
    for row, error in zip(near["layers"].values(), (0.00012, 0.00034, 0.0), strict=True):
        row["cross_term_error"] = error
    figure = heatmap.draw(near)
    cosine, cross = (axes for axes in figure.axes if "cos" in axes.get_title()[:6] or
                     "cross" in axes.get_title())  # fmt: skip
    assert [t.get_text() for t in cosine.texts] == ["0.70", "0.70", "0.71"]
    first, second, third = cosine.images[0].get_array()[0]
    assert first == second != third
    assert [t.get_text() for t in cross.texts] == ["0.00012", "0.00034", "0.00000"]
