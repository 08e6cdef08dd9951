"""No output of any program replaces, holds or lies in what the program reads."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from pathlib import Path

import pytest
import torch

import pem_composition as library
from pem_composition.checkpoint.files import check_apart
from pem_composition.cli import SUBCOMMANDS, load, paths
from pem_composition.config import IA3Config
from pem_composition.errors import CheckpointError, UsageError


@functools.cache
def named(program: str) -> dict[str, str]:
    """Flags of a program whose values are texts of the user's choice, so possibly paths: types."""
    config = load(program).Config
    hints = typing.get_type_hints(config)
    return {
        spec.name: str(hints[spec.name])
        for spec in dataclasses.fields(config)
        if spec.init
        and "choices" not in spec.metadata
        and "Literal" not in str(hints[spec.name])
        and any(word in str(hints[spec.name]) for word in ("str", "Path"))
    }


@functools.cache
def unchecked(program: str) -> type:
    """The config of a program without the checks of its own; flags that are not given are None."""
    return dataclasses.make_dataclass("Config", [(n, object, None) for n in named(program)])


def given(program: str, **values: object) -> object:
    return unchecked(program)(**values)


@pytest.mark.parametrize("program", SUBCOMMANDS)
def test_every_flag_says_whether_it_is_read_or_written(program):
    known = [*paths.READS, *paths.WORDS, *paths.WRITES]
    assert len(known) == len(set(known))
    assert set(named(program)) <= set(known)


def test_the_table_names_no_flag_that_is_gone():
    used = {name for program in SUBCOMMANDS for name in named(program)}
    assert {*paths.READS, *paths.WORDS, *paths.WRITES} <= used


@pytest.mark.parametrize("address", ["file:///tmp/out", "hf://org/name", "s3://bucket/out"])
@pytest.mark.parametrize(("program", "flag"), [("merge", "save_path"), ("pairs", "output_file")])
def test_an_output_is_no_address(program, flag, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"--{flag}: an address, where a path is needed"):
        paths.check(given(program, **{flag: Path(address)}), program)
    assert paths.check(given(program, **{flag: Path("a:b/c")}), program) == [Path("a:b/c")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """``in/model`` with weights, and rows beside it; the test runs in ``tmp_path``."""
    model = tmp_path / "in" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x")
    (tmp_path / "in" / "rows.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "up").symlink_to(tmp_path / "in")
    os.link(tmp_path / "in" / "rows.jsonl", tmp_path / "hard.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("program", [p for p in SUBCOMMANDS if set(named(p)) & set(paths.WRITES)])
def test_an_output_is_refused_where_it_cannot_be_made(place, program):
    """Before the work, not after it: a file or a link to nothing, there or on the way."""
    (place / "lost").symlink_to("nowhere")
    (place / "new").symlink_to("in")
    for flag in set(named(program)) & set(paths.WRITES):
        below = {
            "in/rows.jsonl/x/y": "in/rows.jsonl: not a directory; found a file",
            "lost/x": "lost: not a directory; found a link to nothing",
        }
        there = {
            "in/rows.jsonl": "in/rows.jsonl: the output exists; found a file, expected no such",
            "lost": "lost: the output exists; found a link to nothing, expected no such path",
        }
        for out, message in (below | (there if paths.WRITES[flag] == paths.FOLDER else {})).items():
            with pytest.raises(CheckpointError, match=message):
                paths.check(given(program, **{flag: Path(out)}), program)
        for out in ("new/x", "x/y/z", "in"):
            paths.check(given(program, **{flag: Path(out)}), program)


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is closed to root")
def test_an_output_is_refused_where_nothing_may_be_written(place):
    (place / "shut").mkdir(mode=0o555)
    for out in ("shut", "shut/x/y"):
        with pytest.raises(CheckpointError, match="shut: no right to write there"):
            paths.check(given("evaluate", output_dir=out), "evaluate")


SPELLINGS = (
    "in/model",
    "./in/model/",
    "in/../in/model",
    "link",
    "link/",
    "up/model",
    "{}/in/model",
)
WRITTEN = (*SPELLINGS, "in", "up", ".", "in/model/new", "link/new", "up/model/new")
CASES = [
    (program, flag, out)
    for program in SUBCOMMANDS
    for out in sorted(set(named(program)) & set(paths.WRITES))
    for flag in sorted(set(named(program)) & paths.READS)
    if program not in paths.ADDED and paths.WRITES[out] == paths.FOLDER
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(" ".join, CASES))
def test_a_folder_that_is_read_is_not_replaced(place, number):
    """Of 7 spellings and 13, which have no common factor, 91 cases in turn meet every pair."""
    program, flag, out = CASES[number]
    read, written = (s[number % len(s)].format(place) for s in (SPELLINGS, WRITTEN))
    assert (len(SPELLINGS), len(WRITTEN)) == (7, 13) and len(CASES) >= 91
    several = "tuple" in named(program)[flag]
    value = f"n={read}" if flag == "module" else read
    values = {flag: (value,) if several else value}
    with pytest.raises(CheckpointError, match=r"would (replace|lie in)"):
        paths.check(given(program, **values, **{out: Path(written)}), program)
    for apart in ("elsewhere", "in/other"):
        paths.check(given(program, **values, **{out: Path(apart)}), program)


@pytest.mark.parametrize("program", ["generate", "answer", "judge", "pairs", "helpfulness"])
def test_a_file_that_is_read_is_not_written(place, program):
    (out,) = {"output_file", "output"} & set(named(program))
    flag = {"generate": "prompt_file", "answer": "instruction_file", "judge": "texts"}.get(
        program, "comments" if program == "pairs" else "answers"
    )
    for written in ("in/rows.jsonl", "up/rows.jsonl", "in/./rows.jsonl", "hard.jsonl"):
        with pytest.raises(CheckpointError, match="would replace an input"):
            paths.check(given(program, **{flag: "in/rows.jsonl", out: Path(written)}), program)
    paths.check(given(program, **{flag: "in/rows.jsonl", out: Path("in/more.jsonl")}), program)


def test_texts_may_lie_beside_a_module_but_not_replace_a_part_of_it(place):
    for name in ("samples.jsonl", "new/samples.jsonl"):
        paths.check(
            given("generate", adapter="in/model", output_file=f"in/model/{name}"), "generate"
        )
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        with pytest.raises(CheckpointError, match="would lie in an input"):
            values = {"adapter": "in/model", "output_file": f"link/{name}"}
            paths.check(given("generate", **values), "generate")


def test_an_output_replaces_no_input_though_its_path_goes_by_a_folder_that_is_not_there(place):
    for written in ("gone/../in/model", "in/gone/../model", "in/model/gone/../../model"):
        values = {"adapters": ("in/model",), "save_path": Path(written)}
        for program in ("merge", "negation"):
            with pytest.raises(CheckpointError, match="would replace an input"):
                paths.check(given(program, **values), program)


def test_results_are_added_beside_what_is_read(place):
    (place / "in" / "all_results.json").write_text("{}")
    values = {"adapter": "in/model", "validation_file": "in/rows.jsonl"}
    for out in ("in", "in/model", "in/model/eval", "."):
        paths.check(given("evaluate", **values, output_dir=out), "evaluate")
    values["validation_file"] = "in/all_results.json"
    with pytest.raises(CheckpointError, match="would replace an input"):
        paths.check(given("evaluate", **values, output_dir="up"), "evaluate")


def test_rows_of_a_task_are_not_replaced_and_an_output_may_lie_beside_them(place):
    (place / "data" / "rte").mkdir(parents=True)
    for program, out, tasks in (
        ("train", "output_dir", "task_name"), ("train", "output_dir", "joint_tasks"),
        ("merge", "save_path", "task_name"),
    ):  # fmt: skip
        values = {"data_dir": ("data",), tasks: ("rte", "mnli")}
        paths.check(given(program, **values, **{out: "data/run"}), program)
        for written in ("data/rte", "data"):
            with pytest.raises(CheckpointError, match="would replace an input"):
                paths.check(given(program, **values, **{out: written}), program)


def test_names_that_make_the_output_are_part_of_it(place):
    values = {"adapters": ("in/model",), "save_path": Path("in")}
    paths.check(given("merge", **values, adatasks=("a", "b")), "merge")
    with pytest.raises(CheckpointError):
        paths.check(given("merge", **values, adatasks=("model",)), "merge")


def test_what_the_links_of_a_folder_lead_to_is_read_too(place):
    """Snapshots in the hub's cache are links to blobs."""
    snapshot, blobs = place / "hub" / "snapshots" / "1", place / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "b").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/b")
    for out in (blobs, place / "hub", snapshot, blobs / "b"):
        with pytest.raises(CheckpointError):
            check_apart(out, [snapshot])


def test_the_module_that_a_folder_stands_for_is_read_too(place):
    """A folder without a module stands for its only subfolder that has one."""
    values = {"adapters": ("in", "up/in")}
    for out in ("in/model", "link", "in/model/new"):
        with pytest.raises(CheckpointError, match=r"the output would (replace|lie in) an input"):
            paths.check(given("merge", **values, save_path=Path(out)), "merge")
        with pytest.raises(CheckpointError, match="the output would"):
            check_apart(out, ["in"])
    paths.check(given("merge", **values, save_path=Path("in/new")), "merge")
    # Of a folder of rows such a subfolder is a result.
    paths.check(given("train", data_dir="in", output_dir="in/model"), "train")


def test_the_snapshot_that_a_folder_of_the_cache_stands_for_is_read_too(place):
    snapshot = place / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    for out in (snapshot, snapshot / "new"):
        with pytest.raises(CheckpointError, match="the output would"):
            check_apart(out, ["models--org--name"])


def test_a_path_that_goes_up_does_not_pass_for_its_neighbour(place):
    check_apart("in/new", ["in/new/../model"])
    (place / "in" / "new").mkdir()
    check_apart("in/new", ["in/new/../model"])


def test_two_outputs_are_two_paths(place):
    with pytest.raises(UsageError, match="the same path"):
        paths.check(given("judge", output_dir="x", output="./x"), "judge")


@pytest.mark.parametrize("spelling", ["base", "./base/", "link", "base/new"])
def test_whole_models_keep_their_base(spelling, tmp_path, program, monkeypatch, whole):
    """Merge, negation, analogy and fold on whole models, with --overwrite."""
    monkeypatch.chdir(whole)
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    for command in (
        ("negation", "-a", "tuned", "-m", "base"),
        ("merge", "-a", "tuned", "tuned", "-m", "base", "--coefficients", 0.5, 0.2),
        ("merge", "--full_merge", "-m", "base", "tuned"),
        ("analogy", "-a", "tuned", "tuned", "tuned", "-m", "base"),
        ("fold", "a", "--module", "a=tuned", "-m", "base"),
        ("extract", "base", "tuned", "--rank", 2),
    ):
        refused = program(*command, "-p", spelling, "-o")
        assert refused.code == 2, command
        assert "the output would" in refused.err
        assert "--save_path" in refused.err
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


@pytest.fixture
def whole(tmp_path):
    """A base and a tuned model on disk, and a link to the base."""
    from support.tiny_models import tiny

    for name, seed in (("base", 0), ("tuned", 1)):
        tiny("roberta", seed=seed).save_pretrained(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    return tmp_path


def test_the_library_keeps_what_it_reads_as_well(whole):
    from pem_composition.checkpoint import combine_full
    from pem_composition.checkpoint.conversion import convert
    from pem_composition.checkpoint.streamed_fold import fold_checkpoint

    base, tuned = whole / "base", whole / "tuned"
    for out in (base, tuned, whole):
        with pytest.raises(CheckpointError, match="would replace an input"):
            combine_full([tuned], [-1.0], out, base=base, overwrite=True)
        with pytest.raises(CheckpointError, match="would replace an input"):
            fold_checkpoint("a", {"a": tuned}, base, out, overwrite=True)
    with pytest.raises(CheckpointError, match="would replace an input"):
        convert(base, base, overwrite=True)


def test_a_link_stands_for_the_directory_that_it_leads_to(tmp_path, pem):
    (tmp_path / "store" / "full").mkdir(parents=True)
    module = library.PEM({"fc.ia3": torch.ones(3)}, IA3Config(("fc",)))
    module.save(tmp_path / "in")
    for name, there in (("new", "store/full"), ("gone", "store/none"), ("loop", "loop")):
        (tmp_path / name).symlink_to(there)
    words = ("negation", "-a", tmp_path / "in", "-p")
    assert pem(*words, tmp_path / "new").code == 0
    assert (tmp_path / "new").is_symlink() and (tmp_path / "store" / "full" / "pem.json").is_file()
    done = pem(*words, tmp_path / "new")
    assert done.code == 2 and "new: the output exists; found a directory with files" in done.err
    assert pem(*words, tmp_path / "new", "--overwrite").code == 0
    for name in ("gone", "loop"):
        with pytest.raises(CheckpointError, match=f"{name}: the output exists; found a link to n"):
            module.save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gone", "in", "loop", "new", "store"]
