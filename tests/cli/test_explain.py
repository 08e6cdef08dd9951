"""inspect, check, compare, rebuild and convert: what they print, write, refuse and return."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import write_modules

import pem_composition as library
from pem_composition.arithmetic.comparison import compare, profile
from pem_composition.cli.columns import WIDTH, short_names, table
from pem_composition.cli.convert import size
from pem_composition.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(
        tmp_path_factory.mktemp("modules"), "bert", {"base": 10, "m1": 11, "m2": 12}
    )


def fits(text: str) -> bool:
    return all(len(line) <= WIDTH for line in text.splitlines())


# --- inspect ---


def test_inspect_takes_directories_with_or_without_the_flag(folder, pem):
    done = pem("inspect", folder / "a", folder / "wide")
    assert (done.code, done.err) == (0, "")
    assert pem("inspect", "-a", folder / "a", folder / "wide").out == done.out
    assert (
        pem("inspect").err
        == "pem inspect: error: DIR: no module directory; expected at least one\n"
    )


def test_what_the_exact_sum_is_called_by_a_program_is_what_it_takes(folder, tmp_path, pem):
    """Of modules with other ranks, which no sum of tensors takes."""
    a, wide = folder / "a", folder / "wide"
    apart = pem("inspect", a, "--init", wide)
    assert apart.code == 2 and "give the module that training began with" in apart.err
    out = tmp_path / "out"
    refused = pem("detoxify", "-a", a, wide, "-p", out, "--form", "parameter")
    assert refused.code == 2 and "use the exact form (--form exact)" in refused.err
    assert pem("detoxify", "-a", a, wide, "-p", out, "--form", "exact").code == 0
    refused = pem("merge", "-a", a, wide, "-p", tmp_path / "merged")
    assert refused.code == 2 and "(--space delta)" in refused.err


def test_inspect_values_are_those_of_the_profile(folder, pem):
    done = pem("inspect", folder / "a", "--values", "--json")
    facts = json.loads(done.out)
    expected = profile(library.load(folder / "a"))
    assert facts["schema"] == "pem.inspect/1"
    assert facts["values"]["norm"] == expected.norm
    for layer, measured in expected.layers.items():
        assert facts["values"]["layers"][layer] == vars(measured)
    text = pem("inspect", folder / "a", "--values").out
    assert fits("\n".join(x for x in text.splitlines() if str(folder) not in x))
    assert "layer of bert.encoder.layer" in text
    assert f"{expected.norm:.4g}" in text
    assert "stable ||dW||_F^2 / ||dW||_2^2" in text


def test_inspect_of_whole_models_needs_their_base_for_values_only(folder, pem):
    assert pem("inspect", folder / "m1").code == 0
    refused = pem("inspect", folder / "m1", "--values")
    assert (refused.code, "no base model" in refused.err) == (2, True)
    done = pem("inspect", folder / "m1", "--values", "-m", folder / "base", "--json")
    facts = json.loads(done.out)
    module = library.load(folder / "m1", base=folder / "base")
    norm = sum(float((t.double() ** 2).sum()) for t in module.adapter_tensors().values()) ** 0.5
    assert facts["values"]["norm"] == pytest.approx(norm)
    assert all(row["rank"] is None for row in facts["values"]["layers"].values())


def test_what_a_module_says_of_itself_gives_a_terminal_no_commands(folder, tmp_path, pem):
    clear = "\x1b[2J"
    a = library.load(folder / "a")
    origin = replace(a.provenance, notes=(f"from {clear}",), training={"flags": {"seed": clear}})
    base = replace(a.base, name=f"base{clear}")
    replace(a, name="said", provenance=origin, base=base).save(tmp_path / "said")
    asked = pem("inspect", tmp_path / "said")
    merged = pem("merge", "-a", tmp_path / "said", tmp_path / "said", "-p", tmp_path / "out")
    for done in (asked, merged, pem("inspect", tmp_path / "out")):
        assert done.code == 0 and "\x1b" not in done.out + done.err
        assert r"\x1b[2J" in done.out


def test_inspect_shows_where_a_composition_comes_from(folder, tmp_path, pem):
    a, b = (library.load(folder / n) for n in "ab")
    library.combine([a, b], [0.3, 0.7], head="per-task").save(tmp_path / "m")
    facts = json.loads(pem("inspect", tmp_path / "m", "--json").out)
    assert facts["expression"] == "+0.3*a +0.7*b"
    assert facts["rebuildable"] is True
    assert facts["heads"] == {"a": ["LABEL_0", "LABEL_1", "LABEL_2"], "b": ["LABEL_0", "LABEL_1",
                              "LABEL_2"]}  # fmt: skip
    assert [s["name"] for s in facts["sources"]] == ["a", "b"]
    assert facts["certificate"] == library.combine([a, b], [0.3, 0.7]).provenance.certificate.total
    text = pem("inspect", tmp_path / "m").out
    assert "heads            a (LABEL_0, LABEL_1, LABEL_2), b (" in text
    assert facts["sources"][0]["sha256"][:16] in text


# --- check ---


def test_check_says_yes_with_0_and_no_with_2(folder, pem):
    done = pem("check", folder / "a", folder / "b")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("compatible\n")
    wide = pem("check", folder / "a", folder / "wide")
    assert (wide.code, wide.err) == (0, "")
    assert "warning: rank r differs\n    a: 4\n    wide: 6\n    -> combine in delta" in wide.out
    assert "merge.py --space delta" in wide.out
    only = pem("check", folder / "a", folder / "wide", "--space", "parameter")
    assert (only.code, only.out.splitlines()[-1]) == (2, "not compatible")
    kinds = pem("check", folder / "a", folder / "i")
    assert (kinds.code, "error: kind differs" in kinds.out) == (2, True)
    for text in (done.out, wide.out, only.out, kinds.out):
        assert fits(text)


def test_check_as_json(folder, pem):
    done = pem("check", folder / "a", folder / "wide", "-t", "x", "y", "--json")
    facts = json.loads(done.out)
    assert (facts["schema"], facts["compatible"]) == ("pem.check/1", True)
    assert [m["name"] for m in facts["modules"]] == ["x", "y"]
    assert facts["spaces"]["delta"] == {"accepts": True, "reason": None}
    assert "rank r" in facts["spaces"]["parameter"]["reason"]
    finding = next(f for f in facts["findings"] if f["what"] == "rank r differs")
    assert finding["values"] == {"x": "4", "y": "6"}
    assert finding["severity"] == "warning"


def test_check_names_programs_that_take_the_modules(folder, pem):
    def programs(*names: str) -> list[str]:
        return json.loads(pem("check", *(folder / n for n in names), "--json").out)["programs"]

    assert programs("a") == ["merge.py", "pem compose", "negation.py"]
    assert programs("a", "b", "c") == [
        "merge.py", "analogy.py", "pem compose", "pem sweep", "negation.py (each alone)",
    ]  # fmt: skip
    assert programs("a", "i") == []


def test_check_reads_values_only_if_asked(folder, tmp_path, pem):
    shutil.copytree(folder / "a", tmp_path / "nan")
    (tmp_path / "nan" / "pem.json").unlink()
    path = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    assert pem("check", folder / "b", tmp_path / "nan").code == 0
    asked = pem("check", folder / "b", tmp_path / "nan", "--values")
    assert (asked.code, "is not finite" in " ".join(asked.out.split())) == (2, True)
    zero = {k: t * ("lora_B" not in k) for k, t in load_file(folder / "a" / path.name).items()}
    save_file(zero, path)
    idle = pem("check", folder / "b", tmp_path / "nan", "--values")
    assert idle.code == 0
    assert "warning: its update is zero" in idle.out


def test_check_reads_values_of_whole_models_as_differences_to_the_base(folder, pem):
    words = ("check", folder / "base", folder / "m1", "--values", "--model")
    told = json.loads(pem(*words, folder / "base", "--json").out)
    assert told["compatible"] and "pem compose" not in told["programs"]  # it takes no base
    idle = [f["values"] for f in told["findings"] if f["what"] == "its update is zero"]
    assert [list(values) for values in idle] == [["base"]]
    asked = pem(*words[:-1])
    assert asked.code == 2 and "pem fold" in asked.out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "inspect"])
def test_headers_are_answered_without_torch(command, folder, repository):
    words = [
        command,
        folder / "a",
        folder / "wide",
        *(["-m", folder / "base"] * (command == "check")),
    ]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pem_composition", *map(str, words)],
        capture_output=True, text=True, cwd=repository, check=True,
    )  # fmt: skip
    imported = {x.rpartition("|")[2].strip().split(".")[0] for x in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & {"torch", "numpy", "transformers", "matplotlib"} == set()


# --- compare ---


def test_compare_prints_totals_and_layers_and_their_legend(folder, pem):
    done = pem("compare", folder / "a", folder / "b")
    assert (done.code, done.err) == (0, "")
    assert fits(done.out)
    expected = compare([library.load(folder / n) for n in "ab"]).pairs[0]
    first = done.out.splitlines()[1].split()
    assert first[:3] == ["a", "b", f"{expected.total.cosine:.3f}"]
    assert first[-1] == f"{expected.total.cross_term_error:.3f}"
    for layer, row in expected.layers.items():
        assert f"{layer.removeprefix('bert.encoder.layer.')}  " in done.out
        assert f"{row.weighted_sign_conflict:.3f}" in done.out


def test_compare_several_modules_without_layers_unless_asked(folder, pem):
    paths = [folder / n for n in "abc"]
    done = pem("compare", *paths, "--coefficients", 0.5, 0.2, -0.3)
    assert [x.split()[:2] for x in done.out.splitlines()[1:4]] == [
        list(p) for p in ("ab", "ac", "bc")
    ]
    assert "layer of" not in done.out
    assert "cross terms of the sum of all, coefficients 0.5, 0.2, -0.3: " in done.out
    assert pem("compare", *paths, "--layers").out.count("layer of bert.encoder.layer") == 3
    assert "layer of" not in pem("compare", *paths[:2], "--no-layers").out


def test_compare_as_json_is_the_comparison(folder, pem):
    done = pem("compare", folder / "a", folder / "wide", "--json")
    facts = json.loads(done.out)
    found = compare([library.load(folder / "a"), library.load(folder / "wide")])
    (pair,) = facts["pairs"]
    assert facts["schema"] == "pem.compare/1"
    assert [m["path"] for m in facts["modules"]] == [str(folder / "a"), str(folder / "wide")]
    assert pair["total"] == vars(found.pairs[0].total)
    assert pair["layers"].keys() == found.pairs[0].layers.keys()
    assert pair["refused"] == found.pairs[0].refused is not None
    assert facts["cross_term_error"] is None
    assert (
        "no sum in parameter space: a and wide: rank r"
        in pem("compare", folder / "a", folder / "wide").out
    )


@pytest.mark.parametrize(("a", "b"), [("i", "j"), ("m1", "m2")])
def test_compare_where_there_are_no_factors(a, b, folder, pem):
    words = ["-m", folder / "base"] if a == "m1" else []
    done = pem("compare", folder / a, folder / b, *words)
    assert (done.code, done.err) == (0, "")
    total = done.out.splitlines()[1].split()
    assert total[4:6] == ["-", "-"]
    header = next(x for x in done.out.splitlines() if x.startswith("layer"))
    assert "columns" not in header


@pytest.mark.slow
def test_compare_writes_json_and_heat_maps(folder, plots, tmp_path, pem):
    done = pem("compare", folder / "a", folder / "b", "-p", tmp_path / "out")
    assert done.code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "comparison.json", "heatmap.pdf", "heatmap.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["pairs"][0]["a"] == "a"
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert f"written: {tmp_path / 'out' / 'heatmap.pdf'}" in done.out


@pytest.mark.parametrize(
    ("names", "words", "reason"),
    [
        ("a", [], "wrong number of modules; found 1"),
        ("ai", [], "kind differs"),
        ("ab", ["--coefficients", "1"], "one coefficient per module"),
        ("ab", ["-t", "x"], "one name per module"),
        ("ab", ["-p", "FILE"], "the output exists; found a file"),
    ],
)
def test_compare_refuses_in_one_line(names, words, reason, folder, tmp_path, pem):
    (tmp_path / "file").write_text("")
    words = [str(tmp_path / "file") if w == "FILE" else w for w in words]
    done = pem("compare", *(folder / n for n in names), *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert reason in done.err


# --- rebuild ---

PROGRAMS = {
    "merge": ["merge", "-a", "a", "b", "--coefficients", "0.3", "0.7"],
    "steps": ["merge", "-a", "a", "b", "c", "--search_step", "1", "2", "3", "--merge_head"],
    "delta": ["merge", "-a", "a", "wide", "--space", "delta", "--dtype", "bfloat16"],
    "rank": ["merge", "-a", "a", "wide", "--space", "delta", "--rank", "3"],
    "per task": ["merge", "-a", "a", "b", "-t", "x", "y", "--head", "per-task"],
    "concat": ["merge", "-a", "a", "b", "--head", "concat"],
    "names": ["merge", "-a", "a", "b", "-t", "rte", "mnli"],
    "negation": ["negation", "-a", "i", "--strength", "0.6"],
    "negation, delta": ["negation", "-a", "a", "--space", "delta", "--dtype", "float16"],
    "analogy": ["analogy", "-a", "a", "b", "c", "--coefficient", "0.8"],
    "compose": [
        "compose", "0.5*a + negate(mean(b, c) - 2*a, 0.3)", "--module", "a=a", "--module", "b=b",
        "--module", "c=c",
    ],
    "models": ["merge", "-a", "m1", "m2", "-c", "fft", "--coefficients", "0.3", "0.7"],
    "models around a base": [
        "merge", "-a", "m1", "m2", "--coefficients", "1", "-0.4", "-m", "base",
        "--dtype", "float64",
    ],
    "convert": ["convert", "a", "OUT", "--dtype", "float16"],
}  # fmt: skip


def resolved(words: list[str], folder: Path, out: Path) -> list[str]:
    def place(word: str) -> str:
        name, equals, path = word.partition("=")
        if equals and (folder / path).is_dir():
            return f"{name}={folder / path}"
        return (
            str(out) if word == "OUT" else str(folder / word) if (folder / word).is_dir() else word
        )

    return [place(w) for w in words]


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_every_program_writes_is_rebuilt(name, folder, tmp_path, pem):
    words = resolved(PROGRAMS[name], folder, tmp_path / "out")
    names = "-t" in words
    if name != "convert":
        words += ["-p", str(tmp_path / "out")]
    assert pem(*words).code == 0
    out = next((tmp_path / "out").iterdir()) if names else tmp_path / "out"
    done = pem("rebuild", out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}: equal, bit for bit\n")
    facts = json.loads(pem("rebuild", out, "--json").out)
    assert (facts["schema"], facts["equal"], facts["differences"]) == ("pem.rebuild/1", True, [])


def test_every_point_of_a_grid_is_rebuilt(folder, tmp_path, pem):
    a, b = folder / "a", folder / "b"
    assert pem("merge", "-a", a, b, "-p", tmp_path / "g", "--grid", 0, 0.5, 1).code == 0
    for point in (tmp_path / "g").iterdir():
        assert pem("rebuild", point).code == 0


def test_analogies_of_the_reference_are_rebuilt_in_its_layout(shared, tmp_path, pem):
    golden = shared / "golden" / "adapter_transformers"
    inputs = [golden / f"t5_lora_{i}" / f"task{i}" for i in (1, 2, 3)]
    words = ["-t", "a", "b", "c", "-p", tmp_path, "--format", "adapter-transformers"]
    assert pem("analogy", "-a", *inputs, *words, "--coefficient", 0.4).code == 0
    done = pem("rebuild", tmp_path / "a_b_c")
    assert done.out.startswith(f"{tmp_path / 'a_b_c'}: equal, bit for bit\n  recipe  as_reference(")


def test_rebuild_says_what_differs_and_returns_2(folder, tmp_path, pem):
    pem("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m")
    path = tmp_path / "m" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("lora_B.weight"))
    tensors[key][0, 0] += 0.5
    save_file(tensors, path)
    done = pem("rebuild", tmp_path / "m")
    assert done.code == 2
    assert "differs from what its recipe gives" in done.out
    line = " ".join(done.out.split())
    assert f"differs adapter_model.safetensors, {key}: other values (largest 0.5, relative" in line


def test_rebuild_of_moved_and_trained_modules(folder, tmp_path, pem):
    shutil.copytree(folder / "a", tmp_path / "rte-0")
    pem("merge", "-a", tmp_path / "rte-0", folder / "b", "-p", tmp_path / "m")
    (tmp_path / "rte-0").rename(tmp_path / "away")
    refused = pem("rebuild", tmp_path / "m")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "input rte-0: is missing" in refused.err
    assert pem("rebuild", tmp_path / "m", "--module", f"rte-0={tmp_path / 'away'}").code == 0
    twice = ["--module", "x=a", "--module", "x=b"]
    assert "a name given twice" in pem("rebuild", tmp_path / "m", *twice).err
    assert "no record of how it was made" in pem("rebuild", folder / "a").err


# --- convert ---


def test_convert_prints_what_it_wrote(folder, tmp_path, pem):
    done = pem("convert", folder / "a", tmp_path / "at", "--format", "adapter-transformers")
    assert done.code == 2  # a BERT head of two layers is what that layout has
    assert "head modules ['classifier']" in done.err
    assert list(tmp_path.iterdir()) == []
    done = pem("convert", folder / "a", tmp_path / "b", "--dtype", "bfloat16")
    assert done.out == f"{tmp_path / 'b'}: {folder / 'a'} in peft layout (10 tensors, bfloat16)\n"
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}


def test_convert_never_replaces_its_input_or_an_output(folder, tmp_path, pem):
    assert "would replace an input" in pem("convert", folder / "a", folder, "-o").err
    assert pem("convert", folder / "a", tmp_path / "b").code == 0
    assert "the output exists" in pem("convert", folder / "a", tmp_path / "b").err
    assert pem("convert", folder / "a", tmp_path / "b", "--overwrite").code == 0


def test_convert_makes_shards(folder, tmp_path, pem):
    done = pem("convert", folder / "m1", tmp_path / "s", "--max_shard_size", "20KB")
    assert done.code == 0
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2


def test_sizes():
    assert [size(t) for t in ("5GB", "200 MB", "7", "1kb")] == [5 * 10**9, 2 * 10**8, 7, 1000]
    for text in ("", "0GB", "-1", "5TB", "1.5GB", "GB"):
        with pytest.raises(UsageError, match="not a size"):
            size(text)


# --- tables ---


def test_tables_fit_and_names_lose_what_they_share():
    assert short_names(["a.b.0.q", "a.b.1.q"]) == ("a.b.", ["0.q", "1.q"])
    assert short_names(["a.b"]) == ("", ["a.b"])
    assert short_names(["x.q", "y.q"]) == ("", ["x.q", "y.q"])
    text = table(("name", "other", "n"), [("x" * 90, "y" * 90, 1.23456), ("z", "z", None)], words=2)
    assert fits(text)
    assert text.splitlines()[1].endswith("1.235")
    assert text.splitlines()[2].endswith("-")
