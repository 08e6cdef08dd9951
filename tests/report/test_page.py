"""The page of a sweep or a search: complete, closed, and the same in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import browser, sweep_data, unlearning_data

import pem_composition as library
from pem_composition import cli
from pem_composition.report import frames, page, svg, text
from pem_composition.report.records import read

NASTY = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>\"&amp;"


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sweep of two modules, one of three, a search, and a sweep over strengths."""
    folder = tmp_path_factory.mktemp("pages")
    bench = sweep_data.make(folder / "cls")
    a, b, *_ = bench.modules
    c = folder / "cls" / "half3"
    rows = bench.flags()[bench.flags().index("--model_name_or_path") :]
    grid = ("--grid", 0, 0.5, 1)
    assert run("compare", a, b, "-p", folder / "two") == 0
    assert run("sweep", "-a", a, b, *rows, "-p", folder / "two", *grid) == 0
    assert run("sweep", "-a", a, b, c, *rows, "-p", folder / "three", *grid) == 0
    methods = ("--methods", "sum", "ties", "--search", "density=0.2:0.4:0.2", "rank=4,8")
    assert run("search", "-a", a, b, *rows, "-p", folder / "search", *methods, "--trials", 3) == 0
    text = unlearning_data.make(folder / "lm")
    words = (*text.words(), "-p", folder / "strengths", "--grid", 0.5, 0.5, 1)
    assert run("negation", *words) == 0
    return {name: folder / name for name in ("two", "three", "search", "strengths")}


def tree(path: Path, **options: Any) -> Element:
    found = read(path)
    return page.page(found, frames.points(found), **options)


def write(path: Path, file: Path) -> list[Path]:
    return page.write(page.document(read(path)), file)


def words_of(element: Element) -> str:
    return "".join(element.itertext())


def headings(element: Element) -> list[str]:
    return [words_of(h) for h in element.iter("h2")]


def titles(element: Element) -> list[str]:
    """What the points say."""
    return [words_of(g.find("title")) for g in element.iter("g") if g.get("class") == "point"]


# --- what is on it ---


@pytest.mark.slow
def test_each_kind_of_results_has_its_sections(results):
    common = ["Table", "Frontier", "Layers", "How it was made"]
    own = {
        "two": ["Curves over the coefficient"], "three": ["Shares of three modules"],
        "search": ["Best so far"], "strengths": ["Curves over the strength", "Texts"],
    }  # fmt: skip
    for name, path in results.items():
        assert sorted(headings(tree(path))) == sorted([*common, *own[name]]), name
        assert (path / page.FILE).read_text().startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_every_point_says_its_measures_and_the_page_every_number_of_the_table(results):
    found = read(results["two"])
    said = titles(tree(results["two"]))
    for curve in found.summary["curve"].values():
        for point in curve:
            (record,) = found.scored(point["keys"])
            shown = f"mnli: {record['score']:.4f} \N{PLUS-MINUS SIGN}"
            assert any(shown in words for words in said)
    whole = words_of(tree(results["two"]))
    for line in (results["two"] / "table.md").read_text().splitlines()[4:-2]:
        for cell in line.split(" | "):
            assert cell.strip("| ").replace("+-", "\N{PLUS-MINUS SIGN}") in whole


@pytest.mark.slow
def test_the_command_of_a_point_makes_the_module_that_was_scored(results, tmp_path):
    """The selected ones were written by the programs: the commands write the same tensors."""
    pairs = []
    for name, written in (
        ("two", "selected_{space}"),
        ("search", "best"),
        ("strengths", "negated_{at:g}"),
    ):
        found = frames.points(read(results[name])).of(frames.CURVE)
        best = read(results[name]).summary.get("best")
        for line in found[found["chosen"].astype(bool)].to_dict("records"):
            if best is None or line["series"] == best:
                pairs.append((line["command"], results[name] / written.format(**line)))
    assert len(pairs) == 4
    for n, (command, written) in enumerate(pairs):
        _, *words = shlex.split(command)
        assert run(*(tmp_path / str(n) if word == "OUT" else word for word in words)) == 0
        own, other = library.load(tmp_path / str(n)), library.load(written)
        assert own.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(own.tensors[k], t) for k, t in other.tensors.items())


@pytest.mark.slow
def test_the_page_names_the_command_the_versions_and_the_checksums(results):
    for name, path in results.items():
        text, s = words_of(tree(path)), read(path).summary
        program = {"strengths": "negation", "search": "search"}.get(name, "sweep")
        assert f"pem {program} " in text
        for digest in (s["base"], library.__version__, torch.__version__):
            assert digest in text
        modules = [r["modules"] for r in read(path).points.values() if "modules" in r]
        assert all(digest in text for own in modules for digest in own)


@pytest.mark.slow
def test_any_two_measures_are_axes_and_another_one_is_refused(results, tmp_path, capsys):
    out = ("-r", results["strengths"], "-p", tmp_path / "t", "--html", tmp_path / "a.html")
    assert run("report", *out, "--axes", "increase", "distinct_1") == 0
    assert ">increase</text>" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "t" / "table.md").is_file()
    capsys.readouterr()
    assert run("report", *out, "--axes", "increase", "perplexit") == 2
    error = capsys.readouterr().err
    assert "--axes: nothing of that name; found 'perplexit'" in error
    assert "did you mean perplexity?" in error
    new = tmp_path / "new"
    assert run("report", "-r", results["two"], "-p", new, "--comparison", "nowhere") == 2
    assert "nowhere: no comparison; expected comparison.json" in capsys.readouterr().err
    assert not new.exists(), "nothing is written before everything is known"
    own = results["two"] / "results.jsonl"
    before = own.read_bytes()
    assert run("report", "-r", results["two"], "--html", own) == 2
    assert "--html: the results themselves" in capsys.readouterr().err
    assert own.read_bytes() == before
    several = ("-r", results["two"], results["three"], "--html", tmp_path / "b.html")
    assert run("report", *several) == 2
    assert "--html: a page shows one sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_the_texts_are_those_of_base_and_chosen_strength_hidden_until_asked_for(results):
    s = read(results["strengths"]).summary
    (hidden,) = tree(results["strengths"]).iter("details")
    assert hidden.get("open") is None
    shown = [words_of(quote) for quote in hidden.iter("blockquote")]
    of = {row["strength"]: row["file"] for row in s["rows"]}
    files = [results["strengths"] / of[key] for key in (0.0, s["selected"])]
    texts = [[json.loads(x)["text"] for x in f.read_text().splitlines()] for f in files]
    assert shown == [text for pair in zip(*texts, strict=True) for text in pair]


@pytest.mark.slow
def test_the_comparison_beside_the_results_is_a_heat_map(results):
    facts = json.loads((results["two"] / "comparison.json").read_text())
    cells = [c for c in tree(results["two"], comparison=facts).iter("td") if c.get("bgcolor")]
    values = [row["cosine"] for row in facts["pairs"][0]["layers"].values()]
    assert {f"{v:.2f}" for v in values} <= {words_of(c) for c in cells}
    of_one_map = cells[: len(values)]
    colours: dict[str, set[str]] = {}
    for cell in of_one_map:
        colours.setdefault(words_of(cell), set()).add(str(cell.get("bgcolor")))
    assert all(len(found) == 1 for found in colours.values()), "one number, one colour"


@pytest.mark.slow
def test_an_error_that_is_unknown_is_called_so_and_has_no_cell(results, tmp_path):
    shutil.copytree(results["search"], tmp_path / "search")
    record = tmp_path / "search" / "best" / "pem.json"
    facts = json.loads(record.read_text())
    known, *_ = errors = facts["certificate"]["layers"]
    facts["certificate"] |= {"total": None, "layers": dict.fromkeys(errors) | {known: 0.125}}
    record.write_text(json.dumps(facts))
    shown = tree(tmp_path / "search")
    assert "best: unknown in total" in words_of(shown)
    assert [words_of(c) for c in shown.iter("td") if c.get("bgcolor")] == ["0.12"]


@pytest.mark.slow
def test_the_same_results_give_the_same_page(results, tmp_path):
    for name in ("a", "b"):
        write(results["three"], tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# --- nothing that a file holds becomes markup ---


class Tags(HTMLParser):
    """What a reader of HTML takes for tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def poisoned(path: Path, out: Path) -> Path:
    """The same results with every name and text made hostile."""
    lines = [json.loads(x) for x in (path / "results.jsonl").read_text().splitlines()]
    s = lines[-1]
    s |= {"base_name": NASTY, "command": NASTY, "paths": [NASTY] * len(s["paths"])}
    if "tasks" in s:
        s |= {"tasks": [NASTY] * len(s["tasks"]), "modules": [NASTY] * len(s["modules"])}
    else:
        s |= {"module": NASTY, "asked": {**s["asked"], "name": NASTY}}
        s["text"]["name"] = NASTY
    out.mkdir(parents=True)
    (out / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for row in s["rows"]:
        if "file" in row:
            texts = [json.loads(x) for x in (path / row["file"]).read_text().splitlines()]
            (out / row["file"]).parent.mkdir(exist_ok=True)
            (out / row["file"]).write_text(
                "".join(json.dumps({**x, "prompt": NASTY, "text": NASTY}) + "\n" for x in texts)
            )
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "three", "search", "strengths"])
def test_a_task_or_a_text_named_script_stays_text(name, results, tmp_path):
    bad = poisoned(results[name], tmp_path / "bad")
    (file,) = write(bad, tmp_path / "p.html")
    assert NASTY in words_of(tree(bad))
    seen = Tags()
    seen.feed(file.read_text())
    assert seen.tags.count("script") == 1 and "img" not in seen.tags
    assert seen.attributes & {"src", "href", "onerror", "onload", "srcset"} == set()


# --- scales ---


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_within_the_range(low, width):
    assume(width > 1e-6 * abs(low))  # a narrower range has no digits to tell its ticks apart
    high = low + width
    found = svg.ticks(low, high)
    slack = 1e-6 * width
    assert 2 <= len(found) <= svg.TICKS + 1
    assert all(low - slack <= x <= high + slack for x in found)
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) - min(steps) <= 1e-6 * max(abs(low), abs(high), width)


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=8, unique=True), st.booleans())
def test_a_chart_keeps_the_order_of_values_and_all_within_its_frame(values, log):
    chart = svg.Chart("t", "x", values, values, log=log)
    spots = [chart.at(v, v) for v in sorted(values)]
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in pairwise(spots))
    for x, y in spots:
        assert svg.LEFT <= x <= svg.WIDTH - svg.RIGHT
        assert svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=10),
    st.sampled_from([(1, 1), (1, -1), (-1, 1), (-1, -1)]),
)
def test_the_front_is_what_no_point_beats_in_the_directions_of_the_measures(values, signs):
    lines = [{"role": frames.CURVE, "a": float(a), "b": float(b)} for a, b in values]
    found = frames.Points(text.frame_of(lines), dict(zip("ab", signs, strict=True)), {}, "")
    front = set(zip(*(found.front("a", "b")[n] for n in "ab"), strict=True))

    def beats(v: tuple[int, int], w: tuple[int, int]) -> bool:
        return v != w and all(s * x >= s * y for s, x, y in zip(signs, v, w, strict=True))

    assert front == {v for v in values if not any(beats(w, v) for w in values)}


# --- in a browser ---


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.found() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browser.started(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "three", "search", "strengths"])
def test_a_browser_shows_the_page_and_what_a_point_is(name, chromium, results, tmp_path):
    (file,) = write(poisoned(results[name], tmp_path / "bad"), tmp_path / "p.html")
    for shown in (results[name] / page.FILE, file):
        chromium.open(shown)
        assert chromium.complaints() == [] and chromium.asked() == []
        assert chromium.run("window.broken") is None
        assert chromium.run("getComputedStyle(said).display") == "none"
        expected = chromium.run("document.querySelector('.point').ariaLabel")
        chromium.point_at(".point .reach, .point .disc")
        assert expected in chromium.run("said.textContent").split("\n\n")
        assert chromium.run("getComputedStyle(said).display") == "block"
        assert chromium.run("document.querySelectorAll('.point title').length") == 0
        assert chromium.complaints() == []


@pytest.mark.slow
def test_it_is_light_and_dark_narrow_and_wide_and_prints(chromium, results):
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for dark in (False, True):
        chromium.open(results["strengths"] / page.FILE, width=360, dark=dark)
        seen[dark] = chromium.run(paper)
        assert chromium.run("document.documentElement.scrollWidth") <= 360
    brightness = {k: sum(map(int, re.findall(r"\d+", v)[:3])) for k, v in seen.items()}
    assert brightness[False] > 700 and brightness[True] < 100
    printed = base64.b64decode(chromium("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 10_000
    chromium("Emulation.setEmulatedMedia", media="print", features=[])
    assert chromium.run(paper) == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_a_point_is_reached_by_key_and_left_with_escape(chromium, results):
    chromium.open(results["two"] / page.FILE)
    chromium.run("document.querySelector('.point').focus()")
    assert chromium.run("getComputedStyle(said).display") == "block"
    chromium.run("document.activeElement.blur()")
    assert chromium.run("getComputedStyle(said).display") == "block", "its words can be copied"
    for kind in ("keyDown", "keyUp"):
        chromium("Input.dispatchKeyEvent", type=kind, key="Escape")
    assert chromium.run("getComputedStyle(said).display") == "none"
