"""Tables and plots say what results.jsonl holds, and nothing that it does not."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pem_composition import cli, json_lines
from pem_composition.errors import DataError
from pem_composition.report import frames, plot, records, table, text, tracking


def record(
    key: str, score: float, *, degenerate: bool = False, split: str = "test", **changes: Any
) -> dict[str, Any]:
    share = {"no": 0.98, "yes": 0.02} if degenerate else {"no": 0.5, "yes": 0.5}
    return {
        "key": key, "metric": "accuracy", "score": score, "standard_error": 0.01, "n": 100,
        "auc": 0.9, "predicted_share": share, "degenerate": degenerate, "split": split,
        "invalid_share": None, **changes,
    }  # fmt: skip


def row(
    identity: str, keys: list[str], gain: float, name: str = "", c: tuple[float, ...] = ()
) -> dict[str, Any]:
    gains = [{"gain": gain, "gain_standard_error": 0.02} for _ in keys]
    mean = {"score": 0.0, "standard_error": 0.0, "gain": gain, "gain_standard_error": 0.02}
    return {
        "id": identity, "row": name or identity, "coefficients": list(c), "keys": keys,
        "gains": gains, "mean": mean,
    }  # fmt: skip


TS = (0, 0.25, 0.5, 0.75, 1)
CURVES = {"parameter": "p", "delta": "d"}


def save(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def points(shift: float) -> list[dict[str, Any]]:
    """Five points in two spaces, two modules and a merge."""
    lines = [
        record(f"v{t}{s}", 0.6 + 0.1 * t + shift, split="validation") for t in TS for s in "pd"
    ]
    lines += [record("a", 0.7 + shift), record("b", 0.5, degenerate=True), record("m", 0.8 + shift)]
    return lines


def write(path: Path, shift: float = 0.0, **changes: Any) -> Path:
    """A sweep of five points in two spaces."""
    curve = {
        space: [{"coefficients": [t, 1 - t], "keys": [f"v{t}{s}"]} for t in TS]
        for space, s in CURVES.items()
    }
    average = (0.7 + shift + 0.5) / 2
    own = {
        "score": average, "standard_error": 0.01, "auc": 0.9, "n": 100, "metric": "accuracy",
    }  # fmt: skip
    summary = {
        "summary": 2, "composition": "merge", "modules": ["half0", "half1"], "kind": "lora",
        "base": "f" * 64, "base_name": "tiny", "tasks": ["rte"], "signs": [1],
        "head": "average", "rank": None, "select": "validation", "report": "test",
        "singles": [["v1p"], ["v0p"]], "reference": None,
        "selected": {"parameter": [0.5, 0.5], "delta": [0.25, 0.75]}, "curve": curve,
        "baseline": "average",
        "rows": [
            row("module 0", ["a"], 0.7 + shift - average, "half0"),
            row("module 1", ["b"], 0.5 - average, "half1"),
            row("merge, selected, delta space", ["m"], 0.8 + shift - average, c=(0.25, 0.75)),
        ],
        "average": {"tasks": [own], "mean": {"score": average, "standard_error": 0.01}},
        **changes,
    }  # fmt: skip
    return save(path, [*points(shift), summary])


def write_two(path: Path, shift: float = 0.0, **changes: Any) -> Path:
    """Two tasks; one space; module 0 is good at the first, module 1 at the second."""
    lines = []
    for t in TS:
        lines.append(record(f"r{t}", 0.5 + 0.2 * t + shift, split="validation"))
        lines.append(record(f"s{t}", 0.9 - 0.4 * t, split="validation", invalid_share=t, n=200))
    lines += [record("R", 0.75 + shift, split="validation"), record("S", 0.85, n=200)]
    curve = [{"coefficients": [t, 1 - t], "keys": [f"r{t}", f"s{t}"]} for t in TS]
    mean = {"score": 0.65, "standard_error": 0.005}
    own = {"metric": "accuracy", "standard_error": 0.01, "auc": None, "n": 100}
    summary = {
        "summary": 2, "composition": "merge", "modules": ["rte", "sst2"], "kind": "lora",
        "base": "f" * 64, "base_name": "tiny", "tasks": ["rte", "sst2"],
        "signs": [1, 1], "head": None, "rank": None, "select": "validation",
        "report": "validation", "singles": [["r1", "s1"], ["r0", "s0"]], "reference": ["R", "S"],
        "selected": {"delta": [0.75, 0.25]}, "curve": {"delta": curve}, "baseline": "average",
        "rows": [
            row("module 0", ["r1", "s1"], -0.05, "rte"),
            row("module 1", ["r0", "s0"], 0.05, "sst2"),
            row("reference", ["R", "S"], 0.15, "both (reference)"),
            row("merge, selected, delta space", ["r0.75", "s0.75"], 0.01 + shift, c=(0.75, 0.25)),
        ],
        "average": {"tasks": [own | {"score": 0.6}, own | {"score": 0.7}], "mean": mean},
        **changes,
    }  # fmt: skip
    return save(path, [*lines, summary])


def test_the_table_has_every_row_with_errors_gains_and_notes(tmp_path):
    text = table.write(write(tmp_path / "s"), tmp_path / "s")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4
    assert rows[1].startswith("| half0 |  | 0.7000 +- 0.0100 | +0.1000 +- 0.0200 | 0.9000 |")
    assert rows[2].endswith("| predicts one class (no, 98%) |")
    assert rows[3].startswith("| average of the modules |  | 0.6000 +- 0.0100 |  |")
    assert rows[4].startswith(
        "| merge, selected, delta space | 0.25 0.75 | 0.8000 +- 0.0100 | +0.2000"
    )
    assert (tmp_path / "s" / "table.md").read_text() == text + "\n"
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_csv_holds_the_numbers_in_full(tmp_path):
    table.write(write(tmp_path / "s", shift=1 / 3), tmp_path / "s")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "s" / "table.csv").read_text())))
    assert [r["row"] for r in rows][2] == table.AVERAGE
    assert float(rows[0]["score"]) == 0.7 + 1 / 3
    assert rows[3]["coefficients"] == "0.25 0.75"


def lines_of(paths: list[Path] | tuple[Path, ...]) -> list[dict[str, Any]]:
    return table.aggregate(paths).to_dict("records")


def test_several_sweeps_give_mean_and_spread_of_rows_that_are_the_same(tmp_path):
    paths = [write(tmp_path / str(i), shift=s) for i, s in enumerate((0.0, 0.02, 0.06))]
    rows = {r["row"]: r for r in lines_of(paths)}
    assert {r["task"] for r in rows.values()} == {"rte"}
    scores, gains = [0.7, 0.72, 0.76], [0.1, 0.11, 0.13]
    assert rows["module 0"]["score"] == pytest.approx(statistics.fmean(scores))
    assert rows["module 0"]["score_spread"] == pytest.approx(statistics.stdev(scores))
    assert rows["module 0"]["gain"] == pytest.approx(statistics.fmean(gains))
    assert rows["module 0"]["gain_spread"] == pytest.approx(statistics.stdev(gains))
    assert (rows["module 0"]["auc"], rows["module 0"]["auc_spread"]) == pytest.approx((0.9, 0))
    assert rows["module 1"]["one_class"] == 3
    assert rows["module 0"]["name"] == "half0"
    named = json_lines.read(paths[0] / "results.jsonl")[-1]["rows"]
    changed(paths[0], rows=[r | {"row": f"{r['row']}-s42"} for r in named])
    assert {r["row"]: r["name"] for r in lines_of(paths)}["module 0"] == "module 0"
    assert "predicts one class in 3 of 3" in table.aggregate_markdown(table.aggregate(paths))


def test_sweeps_of_other_settings_are_not_averaged_together(tmp_path):
    paths = [
        write(tmp_path / "a"),
        write(tmp_path / "b", tasks=["cola"]),
        write(tmp_path / "c", kind="ia3"),
    ]
    rows = lines_of(paths)
    assert {(r["task"], r["kind"], r["sweeps"]) for r in rows} == {
        ("rte", "lora", 1), ("cola", "lora", 1), ("rte", "ia3", 1),
    }  # fmt: skip


def test_the_last_summary_counts_and_torn_lines_do_not(tmp_path):
    path = write(tmp_path / "s") / "results.jsonl"
    first = path.read_text()
    later = json.loads(first.splitlines()[-1]) | {"tasks": ["later"]}
    path.write_text(first + json.dumps(later) + "\n" + '{"key": "torn')
    assert records.read(path).summary["tasks"] == ["later"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.unlink(), "no such results file"),
        (
            lambda p: p.write_text(p.read_text().rpartition('{"summary"')[0]),
            "holds no finished sweep",
        ),
        (lambda p: p.write_text(p.read_text().replace('"key": "a"', '"key": "z"', 1)), "1 missing"),
    ],
)
def test_results_without_their_points_are_refused(damage, reason, tmp_path):
    path = write(tmp_path / "s") / "results.jsonl"
    damage(path)
    with pytest.raises(DataError, match=reason):
        records.read(path)


def test_a_summary_that_lacks_a_field_is_named_and_nothing_is_written(tmp_path, capsys):
    """Each field in turn: the report does without it, or says whose fault it is (no KeyError)."""
    path = write(tmp_path / "s") / "results.jsonl"
    whole, summary = path.read_text(), json.loads(path.read_text().splitlines()[-1])
    refused = []
    for name in summary["rows"][0]:
        rows = [{k: v for k, v in row.items() if k != name} for row in summary["rows"]]
        path.write_text(whole.rpartition('{"summary"')[0] + json.dumps({**summary, "rows": rows}))
        code = cli.main(["report", "-r", str(path.parent), "-p", str(tmp_path / name)])
        if (said := capsys.readouterr().err) or code:
            assert code == 2 and f"found no {name} in it" in said
            refused.append(name)
    assert {"id", "row", "keys", "gains"} <= set(refused)
    for name in summary:
        kept = json.dumps({k: v for k, v in summary.items() if k != name})
        path.write_text(whole.rpartition('{"summary"')[0] + kept + "\n")
        code = cli.main(["report", "-r", str(path.parent), "-p", str(tmp_path / name)])
        if said := capsys.readouterr().err:
            assert code == 2 and not (tmp_path / name).exists()
            if f"its summary cannot be read; found no {name} in it" in said:
                refused.append(name)
    assert {"rows", "composition", "modules", "base_name"} <= set(refused)


@pytest.fixture
def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def drawn(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_plot_shows_both_curves_the_modules_and_their_average(tmp_path, pyplot):
    (axes,) = plot.curves(records.read(write(tmp_path / "s"))).axes
    lines = drawn(axes)
    for space in ("parameter", "delta"):
        x, y = lines[f"merge, {space} space"].get_data()
        assert list(x) == [0, 0.25, 0.5, 0.75, 1]
        assert list(y) == pytest.approx([0.6, 0.625, 0.65, 0.675, 0.7])
    assert lines["half0"].get_ydata()[0] == pytest.approx(0.7)
    assert lines["half1"].get_ydata()[0] == pytest.approx(0.6)
    assert lines["average of the modules"].get_ydata()[0] == pytest.approx(0.65)
    assert "t * half0 + (1 - t) * half1" in axes.get_xlabel()
    assert len(axes.collections) == 2


def test_several_tasks_have_a_panel_each_and_one_for_their_mean(tmp_path, pyplot):
    first, second, mean = plot.curves(records.read(write_two(tmp_path / "s"))).axes
    expected = {
        first: [0.5, 0.55, 0.6, 0.65, 0.7],
        second: [0.9, 0.8, 0.7, 0.6, 0.5],
        mean: [0.7, 0.675, 0.65, 0.625, 0.6],
    }
    for axes, scores in expected.items():
        assert list(drawn(axes)["merge, delta space"].get_ydata()) == pytest.approx(scores)
        (band,) = axes.collections
        heights = band.get_paths()[0].vertices[:, 1]
        error = 0.01 if axes is not mean else 0.01 / 2**0.5
        assert max(heights) == pytest.approx(max(scores) + error)
    assert drawn(mean)["both (reference)"].get_ydata()[0] == pytest.approx(0.8)
    assert [axes.get_title() for axes in (first, second, mean)] == [
        "rte",
        "sst2",
        "mean of 2 tasks",
    ]
    assert "n = 200" in second.get_ylabel()


def test_the_frontier_is_one_task_against_the_other(tmp_path, pyplot):
    _, axes = pyplot.subplots()
    plot.draw_frontier(axes, records.read(write_two(tmp_path / "s")))
    lines = drawn(axes)
    x, y = lines["merge, delta space"].get_data()
    assert list(x) == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    assert list(y) == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    spots = {"rte": (0.7, 0.5), "sst2": (0.5, 0.9), "both (reference)": (0.75, 0.85)}
    for name, spot in {**spots, "average of the modules": (0.6, 0.7)}.items():
        assert [v[0] for v in lines[name].get_data()] == pytest.approx(spot)
    hollow = [line for line in axes.get_lines() if line.get_fillstyle() == "none"]
    circled = [line for line in hollow if line.get_label() != "average of the modules"]
    assert [line.get_xydata()[0].tolist() for line in circled] == [pytest.approx([0.65, 0.6])]
    assert axes.get_xlabel().startswith("rte: accuracy")


def test_more_modules_have_profiles_of_the_best_score(tmp_path, pyplot):
    scores = {
        (1, 0, 0): 0.5,
        (0, 1, 0): 0.6,
        (0, 0, 1): 0.7,
        (0.5, 0.5, 0): 0.8,
        (0.5, 0, 0.5): 0.9,
    }
    lines = [record(str(c), s, split="validation") for c, s in scores.items()]
    curve = [{"coefficients": list(c), "keys": [str(c)]} for c in scores]
    changes = {
        "modules": ["x", "y", "z"], "curve": {"delta": curve},
        "singles": [[str((1, 0, 0))], [str((0, 1, 0))], [str((0, 0, 1))]],
        "selected": {"delta": [0.5, 0, 0.5]},
    }  # fmt: skip
    path = write(tmp_path / "s", **changes) / "results.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + path.read_text())
    for sign, best in ((1, max), (-1, min)):
        found = records.read(path)
        found.summary["signs"] = [sign]
        (axes,) = plot.curves(found).axes
        for place, name in enumerate("xyz"):
            x, y = drawn(axes)[f"{name}, delta space"].get_data()
            reached = [best(s for c, s in scores.items() if c[place] == share) for share in x]
            assert list(x) == sorted({c[place] for c in scores})
            assert list(y) == pytest.approx(reached)


def test_a_sweep_with_and_without_controls_counts_once_and_others_have_no_difference(tmp_path):
    rich, plain, other = (write(tmp_path / n, s) for n, s in (("a", 0.0), ("b", 0.0), ("c", 0.02)))
    *lines, summary = json_lines.read(rich / "results.jsonl")
    summary["controlled"] = "merge, selected, delta space"
    summary["rows"].append({**row("control base", ["b"], -0.1), "control": "base"})
    for one in summary["rows"]:
        one["gains"][0] |= {"difference": 0.25, "difference_standard_error": 0.1}
    rich = save(tmp_path / "rich", [*lines, summary])
    for paths in ([rich, plain, other], [other, plain, rich]):
        rows = {r["row"]: r for r in lines_of(paths)}
        assert {name: r["sweeps"] for name, r in rows.items() if name[0] != "a"} == {
            "module 0": 2, "module 1": 2, "merge, selected, delta space": 2, "control base": 1,
        }  # fmt: skip
        assert rows["module 0"]["difference"] == 0.25
        shown = table.aggregate_markdown(table.aggregate(paths)).splitlines()
        said = [x.split("|")[6].strip() for x in shown if "the difference of 1 of 2" in x]
        assert said == ["half0", "half1"]


def test_sweeps_whose_new_last_layers_saw_other_rows_have_no_common_mean(tmp_path):
    paths = [write(tmp_path / n, shift) for n, shift in (("x", 0.0), ("y", 0.0), ("z", 0.02))]
    for path, rows in zip(paths, "xyy", strict=True):
        lines = json_lines.read(path / "results.jsonl")
        lines[-1]["rows"][0]["refit_keys"] = [f"on {rows}"]
        lines.insert(0, {**record(f"on {rows}", 0.9), "refit": {"rows": rows}})
        (path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    frame = table.aggregate(paths)
    assert {row["setting"]: row["sweeps"] for row in lines_of(paths)} == {
        "refit x": 1,
        "refit y": 2,
    }
    assert "| refit x |" in table.aggregate_markdown(frame)


def test_only_measures_in_one_unit_have_a_mean_and_a_panel_of_it(tmp_path):
    for name, other in (("one", "word_perplexity"), ("two", "byte_perplexity")):
        folder = write_two(tmp_path / name, signs=[-1, -1])
        lines = json_lines.read(folder / "results.jsonl")
        metrics = dict(zip("rs", ("word_perplexity", other), strict=True))
        for line in lines[:-1]:
            line["metric"] = metrics[line["key"][0].lower()]
        (folder / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        found, text = records.read(folder), table.markdown(records.read(folder))
        one = name == "one"
        assert ("| mean |" in text) == one == ("by the mean over the tasks" in text)
        assert ("by the mean rank over the tasks" in text) != one
        assert len(plot.curves(found).axes) == 2 + one


@pytest.mark.slow
def test_two_tasks_give_a_frontier_and_one_none(tmp_path, plots):
    names = {
        n: [f.name for f in plot.write(make(tmp_path / n), tmp_path / n)]
        for n, make in (("one", write), ("two", write_two))
    }
    assert names["one"] == ["curve.png", "curve.pdf"]
    assert names["two"] == ["curve.png", "curve.pdf", "frontier.png", "frontier.pdf"]


def test_the_table_of_two_tasks_has_their_mean_and_what_is_invalid(tmp_path):
    text = table.write(write_two(tmp_path / "s"), tmp_path / "s")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| rte accuracy (n = 100) | sst2 accuracy (n = 200) | mean |" in rows[0]
    assert rows[1].startswith("| rte |  | 0.7000 +- 0.0100 | 0.5000 +- 0.0100 |")
    assert rows[1].endswith("| - 1.00 | sst2: 100% invalid answers |")
    assert rows[2].endswith("| - 0.00 |  |")
    assert rows[3].startswith("| average of the modules |  | 0.6000 +- 0.0100 | 0.7000 +- 0.0100 |")
    assert "0.6500 +- 0.0050 |  |" in rows[3]  # no gain over itself
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    lines = list(csv.DictReader(io.StringIO((tmp_path / "s" / "table.csv").read_text())))
    assert [x["task"] for x in lines] == ["rte", "sst2", "mean"] * 5
    assert [x["invalid_share"] for x in lines[:3]] == ["", "1", ""]


def test_seeds_are_averaged_per_task_and_in_the_mean(tmp_path):
    shifts = (0.0, 0.03, 0.09)
    paths = [write_two(tmp_path / str(i), shift=s) for i, s in enumerate(shifts)]
    rows = {(r["row"], r["task"]): r for r in lines_of(paths)}
    identity = "merge, selected, delta space"
    found = rows[identity, "rte"]
    assert found["score"] == pytest.approx(0.65 + 0.04)
    assert found["score_spread"] == pytest.approx(statistics.stdev(shifts))
    assert rows[identity, "sst2"]["score_spread"] == 0
    assert rows[identity, "sst2"]["invalid_share"] == 0.75
    mean = rows[identity, "mean of rte, sst2"]
    assert mean["gain"] == pytest.approx(0.01 + 0.04)
    text = table.aggregate_markdown(table.aggregate(paths))
    row = f"| sst2 | lora | tiny | validation | 200 | {identity} | 3 "
    assert f"{row}| 0.6000 +- 0.0000 accuracy |" in text
    assert "75% invalid answers" in text


def test_an_analogy_is_compared_with_its_classifier(tmp_path):
    changes = {
        "composition": "analogy", "modules": ["cls", "target", "source"], "average": None,
        "baseline": "module 0", "singles": [["v1p"]],
    }  # fmt: skip
    text = table.write(write(tmp_path / "s", **changes), tmp_path / "s")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| gain over cls |" in rows[0]
    assert rows[1].startswith("| half0 |  | 0.7000 +- 0.0100 |  | 0.9000 |")
    assert len(rows) == 1 + 3
    assert "cls + (target - source)" in text


def write_first_release(path: Path) -> Path:
    """The summary as version 1 had it: one task, keys and gains without lists."""
    found = write(path) / "results.jsonl"
    *lines, summary = map(json.loads, found.read_text().splitlines())
    new = ("composition", "tasks", "signs", "reference", "baseline")
    old = {k: v for k, v in summary.items() if k not in new}
    old |= {"summary": 1, "task": "rte", "singles": [k for (k,) in summary["singles"]]}
    old["average"] = summary["average"]["tasks"][0]
    old["curve"] = {
        space: [{"coefficients": p["coefficients"], "key": p["keys"][0]} for p in curve]
        for space, curve in summary["curve"].items()
    }
    old["rows"] = [
        {"id": r["id"], "row": r["row"], "coefficients": r["coefficients"], "key": r["keys"][0]}
        | r["gains"][0]
        for r in summary["rows"]
    ]
    plain = [{k: v for k, v in x.items() if k != "invalid_share"} for x in lines]
    found.write_text("".join(json.dumps(x) + "\n" for x in [*plain, old]))
    return path


def test_results_of_the_first_release_are_still_read(tmp_path):
    old, new = write_first_release(tmp_path / "old"), write(tmp_path / "new")
    assert table.markdown(records.read(old)) == table.markdown(records.read(new))
    assert table.aggregate([old]).equals(table.aggregate([new]))
    plot.write(old, old)


def test_results_of_a_later_release_are_refused(tmp_path):
    with pytest.raises(DataError, match="found summary version 3, expected at most 2"):
        records.read(write(tmp_path / "s", summary=3))


@pytest.mark.slow
def test_plots_are_png_and_pdf_and_the_same_every_time(tmp_path, plots):
    source = write(tmp_path / "s")
    files = plot.write(source, tmp_path / "s")
    assert [f.suffix for f in files] == [".png", ".pdf"]
    first = [f.read_bytes() for f in files]
    assert first[0].startswith(b"\x89PNG")
    assert first[1].startswith(b"%PDF")
    assert [f.read_bytes() for f in plot.write(source, tmp_path / "s")] == first


def test_report_writes_one_sweep_in_place_and_several_where_told(tmp_path, plots, capsys):
    paths = [write(tmp_path / str(i), shift=0.01 * i) for i in range(2)]
    assert cli.main(["report", "-r", str(paths[0])]) == 0
    assert {p.name for p in paths[0].iterdir()} >= {
        "table.md",
        "table.csv",
        "curve.png",
        "curve.pdf",
    }
    assert cli.main(["report", "-r", *map(str, paths), "-p", str(tmp_path / "t")]) == 0
    text = (tmp_path / "t" / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| rte | lora | tiny | test | 100 | half0 | 2 |" in text


def changed(path: Path, **summary: object) -> Path:
    """The same results with another summary."""
    file = path / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[-1] |= summary
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_several_sweeps_are_their_union_in_any_order_and_each_counts_once(tmp_path):
    whole = write(tmp_path / "a")
    rows = json.loads((whole / "results.jsonl").read_text().splitlines()[-1])["rows"]
    part = changed(write(tmp_path / "b", shift=0.01), rows=rows[:-1])

    def found(*paths: Path) -> dict:
        return {r["row"]: (r["sweeps"], r["score"]) for r in lines_of(paths)}

    assert found(part, whole) == found(whole, part) == found(whole, part, whole)
    assert found(part, whole)[rows[-1]["id"]][0] == 1
    assert found(part, whole)[rows[0]["id"]][0] == 2


def test_selection_rows_and_test_rows_are_never_averaged(tmp_path):
    paths = [write(tmp_path / "a"), changed(write(tmp_path / "b", shift=0.01), report="validation")]
    assert {(r["rows"], r["sweeps"]) for r in lines_of(paths)} == {
        ("test", 1),
        ("validation", 1),
    }


ASKED_OTHERWISE = {
    "max_seq_length": 8, "bf16": True, "prompt": {"template": "other"}, "base": "f" * 64,
    "answers": "free", "num_fewshot": 1, "task_hash": "e" * 64,
}  # fmt: skip
BY_HARNESS = {"num_fewshot": 0, "task_hash": "f" * 64}
CHOSEN_OTHERWISE = {
    "selected_by": ["loss"], "select": "train", "head": "first", "constraints": ["rte>=0.5"],
    "sampler": "cma", "baseline": "own module", "penalty": 0.1,
}  # fmt: skip


def asked(path: Path, **settings: Any) -> Path:
    """Every result of the sweep asked so."""
    file = path / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line | settings if "key" in line else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("baseline", [*table.BASELINES])
def test_several_sweeps_say_what_their_gains_are_over(baseline, tmp_path):
    paths = [
        changed(write(tmp_path / n, shift=s), baseline=baseline) for n, s in (("a", 0), ("b", 0.1))
    ]
    text = table.aggregate_markdown(table.aggregate(paths))
    assert text.endswith(f"Gains are over {table.BASELINES[baseline]}.")


def test_a_further_metric_improves_in_its_own_direction(tmp_path):
    path = write(tmp_path / "a")
    asked(path, scores={"accuracy": 0.5, "f1": 0.5, "bits_per_byte": 2.0}, loss=1.0)
    changed(path, smaller_is_better=["bits_per_byte"])
    assert frames.points(records.read(path)).signs == {
        "rte": 1, "rte f1": 1, "rte bits_per_byte": -1, "rte loss": -1,
    }  # fmt: skip


def test_no_mean_of_several_sweeps_is_said_where_none_of_them_has_one(tmp_path):
    none = dict.fromkeys(("score", "standard_error", "gain", "gain_standard_error"))
    paths = [write_two(tmp_path / str(i), shift=0.1 * i) for i in range(2)]
    assert "mean of rte, sst2" in {r["task"] for r in lines_of(paths)}
    for path in paths:
        summary = json.loads((path / "results.jsonl").read_text().splitlines()[-1])
        rows = [row | {"mean": none} for row in summary["rows"]]
        average = summary["average"] | {"mean": none}
        changed(path, rows=rows, average=average, signs=[1, -1])
    assert {r["task"] for r in lines_of(paths)} == {"rte", "sst2"}


@pytest.mark.parametrize("name", [*ASKED_OTHERWISE, *CHOSEN_OTHERWISE])
def test_sweeps_of_different_settings_are_not_averaged_and_say_what_differs(name, tmp_path):
    first, again, other = (write(tmp_path / n, shift=0.01 * i) for i, n in enumerate("abc"))
    if name in BY_HARNESS:
        for path in (first, again, other):
            asked(path, harness=BY_HARNESS)
        asked(other, harness=BY_HARNESS | {name: ASKED_OTHERWISE[name]})
    elif name in ASKED_OTHERWISE:
        asked(other, **{name: ASKED_OTHERWISE[name]})
    else:
        changed(other, **{name: CHOSEN_OTHERWISE[name]})
    rows = lines_of([first, other, again])
    assert {r["sweeps"] for r in rows if name in r["setting"]} == {1, 2}
    modules = {r["sweeps"]: r["score"] for r in rows if r["row"] == "module 0"}
    assert modules == {2: pytest.approx(0.705), 1: pytest.approx(0.72)}
    assert f"| {name} " in table.aggregate_markdown(table.aggregate([first, other, again]))
    assert "setting" not in table.aggregate_markdown(table.aggregate([first, again]))


@pytest.mark.parametrize(
    ("shared", "words"), [(0, None), (7, "7 of the 100 rte rows"), (100, "100 of the 100 rte rows")]
)
def test_rows_that_were_selected_on_are_named_by_their_content(shared, words, tmp_path):
    text = table.markdown(records.read(changed(write(tmp_path / "a"), shared_rows=[shared])))
    assert words in text if words else "optimistic" not in text


def test_without_what_draws_the_table_stands_and_one_line_says_how_to_get_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "o"
    assert cli.main(["report", "-r", str(write(tmp_path / "a")), "-p", str(out)]) == 0
    captured = capsys.readouterr()
    (said,) = [line for line in captured.out.splitlines() if line.startswith("no plot")]
    python = f"{sys.executable} -m pip install 'matplotlib>=3.9'"
    assert said.startswith(f"no plot: matplotlib is not installed; {python}, then")
    assert not captured.err
    assert {p.name for p in out.iterdir()} == {"table.md", "table.csv", "report.html"}


def test_equal_curves_are_both_seen_and_the_ring_of_the_selected_point_is_explained(tmp_path):
    figure = plot.curves(records.read(write(tmp_path / "a")))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words.count("selected") == 1
    spaces = [line for line in figure.axes[0].get_lines() if "space" in str(line.get_label())]
    below, above = sorted(spaces, key=lambda line: line.get_zorder())[:2]
    assert below.get_linewidth() > above.get_linewidth()
    assert (below.get_linestyle(), above.get_linestyle()) == ("-", "--")


def write_search(path: Path, goals: dict[str, int], values: list[list[float]]) -> Path:
    """A search with one study of three trials on one task; values are maximised."""
    lines = [record(str(i), 0.5 + 0.1 * i, loss=0.7) for i in range(len(values))]
    study = {
        "study": "ties", "number": 1, "candidate": {"c": 1.0, "density": 0.2}, "method": "ties",
        "coefficients": [1.0, 1.0], "values": values[1], "violation": 0, "keys": ["1"],
        "space": "delta", "tried": len(values), "violations": [0] * len(values),
        "values_of_trials": values, "keys_of_trials": [[str(i)] for i in range(len(values))],
    }  # fmt: skip
    summary = {
        "search": 1, "composition": "search", "modules": ["x", "y"], "kind": "lora", "base": "f",
        "base_name": "tiny", "tasks": ["rte"], "signs": [1], "head": None, "goals": list(goals),
        "goal_signs": list(goals.values()), "constraints": [], "sampler": "tpe", "seed": 1,
        "select": "validation", "report": "test", "studies": [study], "best": "ties", "front": [],
        "paths": ["m/x", "m/y"], "baseline": "average", "average": None, "costs": [None] * 2,
        "rows": [row("module 0", ["0"], 0.0, "x"), row("best ties", ["1"], 0.1, c=(1.0, 1.0))],
    }  # fmt: skip
    return save(path, [*lines, summary])


def test_controls_of_what_a_search_found_are_compared_with_a_merge(tmp_path, pyplot):
    path = write_search(tmp_path / "plain", {"mean": 1}, [[0.5], [0.6]])
    *lines, summary = json_lines.read(path / "results.jsonl")
    for one in summary["rows"]:
        one["gains"][0] |= {"difference": -0.1, "difference_standard_error": 0.01}
    summary["controlled"] = "best ties"
    path = save(tmp_path / "controlled", [*lines, summary])
    assert "| minus the merge |" in table.markdown(records.read(path))
    assert "| minus the merge |" in table.aggregate_markdown(table.aggregate([path]))
    (axes,) = plot.controls(records.read(path)).axes
    assert axes.get_xlabel() == "rte minus that of the merge, two standard errors"


@pytest.mark.parametrize("goals", [{"loss": -1}, {"yelp": -1}, {"mean": 1}])
def test_a_goal_is_shown_as_the_number_that_a_reader_knows(goals, tmp_path, pyplot):
    """A metric that is better when smaller is kept with a minus sign; nobody knows it so."""
    ((goal, sign),) = goals.items()
    kept = [[sign * 0.7], [sign * 0.5], [sign * 0.6]]
    found = records.read(write_search(tmp_path / "s", goals, kept))
    _, axes = pyplot.subplots()
    plot.draw_progress(axes, frames.points(found))
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == [0.7, 0.5, 0.5] if sign < 0 else [0.7, 0.7, 0.7]
    assert axes.get_ylabel() == f"best goal {goal} (validation rows) so far"


def test_the_front_of_two_goals_knows_the_direction_of_each(tmp_path, pyplot):
    """Accuracy against loss: better to the right and below."""
    kept = [[0.8, -0.9], [0.6, -0.5], [0.5, -0.7]]
    found = frames.points(records.read(write_search(tmp_path / "s", {"mean": 1, "loss": -1}, kept)))
    _, axes = pyplot.subplots()
    plot.draw_pareto(axes, found)
    front = {line.get_label(): line for line in axes.get_lines()}["front"]
    assert front.get_xydata().tolist() == [[0.8, 0.9], [0.6, 0.5]]


def test_a_search_whose_trials_all_miss_a_condition_is_reported(tmp_path):
    path = write_search(tmp_path / "s", {"mean": 1}, [[0.7], [0.5], [0.6]])
    study = records.read(path).summary["studies"][0]
    changed(path, studies=[{**study, "violations": [0.1] * 3, "violation": 0.1}])
    assert frames.points(records.read(path)).frame.empty
    assert cli.main(["report", "-r", str(path)]) == 0
    assert "(misses a condition)" in (path / "report.html").read_text()


def test_a_file_of_an_earlier_release_says_no_directions_and_is_still_drawn(tmp_path):
    path = write_search(tmp_path / "s", {"loss": -1}, [[-0.7], [-0.5], [-0.6]])
    changed(path)
    lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    for name in ("signs", "goal_signs", "paths"):
        del lines[-1][name]
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = frames.points(records.read(path))
    assert found.of(frames.CURVE)["goal loss"].tolist() == [0.7, 0.5, 0.6]
    assert found.of(frames.CURVE)["command"].tolist() == ["", "", ""]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """A path that is no text is written as escapes; a full disk leaves what was there."""
    frame = pd.DataFrame({"a": [1.0]})
    text.write(tmp_path, "caf\udce9", frame, ["a"])
    assert (tmp_path / "table.md").read_text() == "caf\\udce9\n"

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        text.write(tmp_path, "new", frame, ["a"])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "table.md": "caf\\udce9\n", "table.csv": "a\n1.0\n",
    }  # fmt: skip


def test_a_run_of_a_tracker_has_the_coefficients_and_the_scores_of_its_point(tmp_path):
    found = list(tracking.runs(records.read(write_two(tmp_path / "s"))))
    assert len({run.name for run in found}) == len(found)
    curve = {run.config["rte"]: run for run in found if run.config["role"] == "curve"}
    assert sorted(curve) == list(TS)
    for t, run in curve.items():
        assert run.config["sst2"] == 1 - t
        assert run.metrics["rte"] == pytest.approx(0.5 + 0.2 * t)
        assert run.metrics["sst2"] == pytest.approx(0.9 - 0.4 * t)
        assert run.metrics["rte stderr"] == 0.01


def test_points_are_logged_to_a_tracker_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = records.read(write(tmp_path / "s"))
    asked = list(tracking.runs(results))
    assert tracking.track(results, tmp_path / "s", "tensorboard") == len(asked)
    assert tracking.track(results, tmp_path / "s", "tensorboard") == 0
    logged = {}
    for folder in (tmp_path / "s" / "runs").iterdir():
        if folder.is_dir():
            events = EventAccumulator(str(folder)).Reload()
            logged[folder.name] = {k: events.Scalars(k)[-1].value for k in events.Tags()["scalars"]}
    assert logged == {run.name: pytest.approx(run.metrics) for run in asked}
