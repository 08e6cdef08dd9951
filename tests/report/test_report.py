"""Tables and plots say what results.jsonl holds, and nothing that it does not."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pem_composition import cli
from pem_composition.errors import DataError
from pem_composition.report import plot, records, table


def record(
    key: str, score: float, *, degenerate: bool = False, split: str = "test"
) -> dict[str, Any]:
    share = {"no": 0.98, "yes": 0.02} if degenerate else {"no": 0.5, "yes": 0.5}
    return {
        "key": key, "metric": "accuracy", "score": score, "standard_error": 0.01, "n": 100,
        "auc": 0.9, "predicted_share": share, "degenerate": degenerate, "split": split,
    }  # fmt: skip


def row(
    identity: str, key: str, gain: float, name: str = "", c: tuple[float, ...] = ()
) -> dict[str, Any]:
    return {
        "id": identity, "row": name or identity, "coefficients": list(c), "key": key, "gain": gain,
        "gain_standard_error": 0.02,
    }  # fmt: skip


def write(path: Path, shift: float = 0.0, **changes: Any) -> Path:
    """A sweep of five points in two spaces."""
    ts = (0, 0.25, 0.5, 0.75, 1)
    lines = [
        record(f"v{t}{s}", 0.6 + 0.1 * t + shift, split="validation") for t in ts for s in "pd"
    ]
    lines += [record("a", 0.7 + shift), record("b", 0.5, degenerate=True), record("m", 0.8 + shift)]
    curve = {
        space: [{"coefficients": [t, 1 - t], "key": f"v{t}{space[0]}"} for t in ts]
        for space in ("parameter", "delta")
    }
    average = (0.7 + shift + 0.5) / 2
    summary = {
        "summary": 1, "modules": ["half0", "half1"], "kind": "lora", "base": "f" * 64,
        "base_name": "tiny", "task": "rte", "head": "average", "rank": None,
        "select": "validation", "report": "test", "singles": ["v1p", "v0p"],
        "selected": {"parameter": [0.5, 0.5], "delta": [0.25, 0.75]}, "curve": curve,
        "rows": [
            row("module 0", "a", 0.7 + shift - average, "half0"),
            row("module 1", "b", 0.5 - average, "half1"),
            row("merge, selected, delta space", "m", 0.8 + shift - average, c=(0.25, 0.75)),
        ],
        "average": {
            "score": average, "standard_error": 0.01, "auc": 0.9, "n": 100, "metric": "accuracy",
        },
        **changes,
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines, summary]))
    return path


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


def test_several_sweeps_give_mean_and_spread_of_rows_that_are_the_same(tmp_path):
    paths = [write(tmp_path / str(i), shift=s) for i, s in enumerate((0.0, 0.02, 0.06))]
    rows = {r["row"]: r for r in table.aggregate(paths)}
    scores, gains = [0.7, 0.72, 0.76], [0.1, 0.11, 0.13]
    assert rows["module 0"]["score"] == pytest.approx(statistics.fmean(scores))
    assert rows["module 0"]["score_spread"] == pytest.approx(statistics.stdev(scores))
    assert rows["module 0"]["gain"] == pytest.approx(statistics.fmean(gains))
    assert rows["module 0"]["gain_spread"] == pytest.approx(statistics.stdev(gains))
    assert rows["module 1"]["one_class"] == 3
    assert "predicts one class in 3 of 3" in table.aggregate_markdown(list(rows.values()))


def test_sweeps_of_other_settings_are_not_averaged_together(tmp_path):
    paths = [
        write(tmp_path / "a"),
        write(tmp_path / "b", task="cola"),
        write(tmp_path / "c", kind="ia3"),
    ]
    rows = table.aggregate(paths)
    assert {(r["task"], r["kind"], r["sweeps"]) for r in rows} == {
        ("rte", "lora", 1), ("cola", "lora", 1), ("rte", "ia3", 1),
    }  # fmt: skip


def test_the_last_summary_counts_and_torn_lines_do_not(tmp_path):
    path = write(tmp_path / "s") / "results.jsonl"
    first = path.read_text()
    later = json.loads(first.splitlines()[-1]) | {"task": "later"}
    path.write_text(first + json.dumps(later) + "\n" + '{"key": "torn')
    assert records.read(path).summary["task"] == "later"


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


def test_the_plot_shows_both_curves_the_modules_and_their_average(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    plot.draw(axes, records.read(write(tmp_path / "s")))
    lines = {line.get_label(): line for line in axes.get_lines()}
    for space in ("parameter", "delta"):
        x, y = lines[f"merge, {space} space"].get_data()
        assert list(x) == [0, 0.25, 0.5, 0.75, 1]
        assert list(y) == pytest.approx([0.6, 0.625, 0.65, 0.675, 0.7])
    assert lines["half0"].get_ydata()[0] == pytest.approx(0.7)
    assert lines["half1"].get_ydata()[0] == pytest.approx(0.6)
    assert lines["average of the two"].get_ydata()[0] == pytest.approx(0.65)
    assert "t * half0 + (1 - t) * half1" in axes.get_xlabel()
    assert len(axes.collections) == 2
    pyplot.close(figure)


def test_plots_are_png_and_pdf_and_the_same_every_time(tmp_path):
    source = write(tmp_path / "s")
    files = plot.write(source, tmp_path / "s")
    assert [f.suffix for f in files] == [".png", ".pdf"]
    first = [f.read_bytes() for f in files]
    assert first[0].startswith(b"\x89PNG")
    assert first[1].startswith(b"%PDF")
    assert [f.read_bytes() for f in plot.write(source, tmp_path / "s")] == first


def test_report_writes_one_sweep_in_place_and_several_where_told(tmp_path, capsys):
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
    assert "| rte | lora | tiny | module 0 | 2 |" in text
