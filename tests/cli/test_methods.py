"""Methods, other programs' sums, expressions with methods and recipes on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.tiny_models import equal, write_modules

import pem_composition as library
from pem_composition.arithmetic.methods.registry import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(tmp_path_factory.mktemp("modules"), "roberta", {"base": 0, "f": 7, "g": 8})


def loaded(folder: Path, names: str) -> list[library.PEM]:
    return [library.load(folder / name) for name in names.split()]


def record(out: Path) -> dict:
    return json.loads((out / "pem.json").read_text())


# --- merge.py -w ---

OWN = [m.name for m in METHODS.values() if m.space == "delta" and not m.needs]


@pytest.mark.parametrize("name", OWN[1:])
def test_every_method_is_a_merge_way(name, folder, tmp_path, program):
    names = "a b" if name in ("slerp", "robustmerge", "ext_sub") else "a wide c"
    paths = [folder / n for n in names.split()]
    done = program("merge", "-a", *paths, "-p", tmp_path / "m", "-w", name)
    assert (done.code, done.err) == (0, "")
    found, method = library.load(tmp_path / "m"), record(tmp_path / "m")["method"]
    c = METHODS[name].default or 1.0 / len(paths)
    c = 1.0 if name in ("knots", "ctm") else c  # TIES inside
    modules = loaded(folder, names)
    assert equal(found, library.combine(modules, [c] * len(paths), method=name))
    assert re.fullmatch(name + r"(\(.*\))?", method)
    certificate = record(tmp_path / "m")["certificate"]
    assert certificate["against"] == "the method's own result"
    assert certificate["total"] < (1 if "form=dense" in method else 1e-6)
    assert f"error against the method's own result: {certificate['total']:.2g}" in done.out


def test_settings_coefficients_and_rank(folder, tmp_path, program):
    words = ("-w", "ties", "--setting", "density=0.5", "--setting", "election=frequency")
    paths = [folder / "a", folder / "wide"]
    done = program(
        "merge", "-a", *paths, "-p", tmp_path / "m", *words, "--coefficients", 1, -0.5, "--rank", 2
    )  # fmt: skip
    assert done.code == 0
    assert record(tmp_path / "m")["method"] == (
        "ties(density=0.5, election=frequency, form=dense), rank 2"
    )
    given = {"density": 0.5, "election": "frequency"}
    expected = library.combine(
        loaded(folder, "a wide"), [1, -0.5], method="ties", settings=given, rank=2
    )
    assert equal(library.load(tmp_path / "m"), expected)


def test_a_seed_is_recorded_and_repeats(folder, tmp_path, program):
    command = ("merge", "-a", folder / "a", folder / "b", "-w", "dare", "-p")
    for out, seed in (("x", 1), ("y", 1), ("z", 2)):
        assert program(*command, tmp_path / out, "--setting", f"seed={seed}").code == 0
    x, y, z = (library.load(tmp_path / n) for n in "xyz")
    assert equal(x, y) and not equal(x, z)
    assert record(tmp_path / "x")["method"] == "dare(density=0.5, seed=1, form=dense)"


def test_the_dense_form_says_what_its_rank_costs_and_the_core_costs_nothing(
    folder, tmp_path, program
):
    command = ("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m", "-w", "ties")
    assert program(*command).code == 0
    assert 0.1 < record(tmp_path / "m")["certificate"]["total"] < 1
    assert program(*command, "-o", "--setting", "form=core").code == 0
    assert record(tmp_path / "m")["certificate"]["total"] < 1e-6


def test_vectors_are_merged_too(folder, tmp_path, program):
    command = ("merge", "-a", folder / "i", folder / "j", "-p", tmp_path / "m", "-w")
    assert program(*command, "ties", "--merge_head").code == 0
    expected = library.combine(loaded(folder, "i j"), [1, 1], method="ties")
    assert equal(library.load(tmp_path / "m"), expected)


def test_whole_models_are_merged_around_their_base(folder, tmp_path, program):
    paths = [folder / "f", folder / "g"]
    words = ("-w", "ties", "--setting", "density=0.3")
    command = ("merge", "-a", *paths, "-p", tmp_path / "m", *words)
    refused = program(*command)
    assert refused.code == 2 and "a method merges the differences to the base" in refused.err
    done = program(*command, "-m", folder / "base")
    assert (done.code, done.err) == (0, "")
    base = folder / "base"
    x, y = (library.load(p, base=base) for p in paths)
    expected = library.combine([x, y], [1, 1], method="ties", settings={"density": 0.3})
    found = library.load(tmp_path / "m", base=base)
    for name, tensor in expected.adapter_tensors().items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=1e-6)
    assert record(tmp_path / "m")["method"] == "ties(density=0.3, election=total)"


def test_a_grid_of_a_method(folder, tmp_path, program):
    command = ("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "g", "-w", "slerp")
    assert program(*command, "--grid", 0, 0.5, 1).code == 0
    modules = loaded(folder, "a b")
    expected = library.combine(modules, [0.5, 0.5], method="slerp")
    assert equal(library.load(tmp_path / "g" / "0.5"), expected)


def test_an_analogy_by_a_method(folder, tmp_path, program):
    paths = [folder / name for name in "abc"]
    assert program("analogy", "-a", *paths, "-p", tmp_path / "m", "-w", "tsv").code == 0
    expected = library.combine(loaded(folder, "a b c"), [0.5, 0.5, -0.5], method="tsv")
    assert equal(library.load(tmp_path / "m"), expected)


# --- merge.py --as ---


@pytest.mark.parametrize("tool", ["reference", "peft-linear", "adapters-linear"])
def test_as_another_program(tool, folder, tmp_path, program):
    command = ("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m")
    done = program(*command, "--as", tool, "--coefficients", 0.3, 0.6)
    assert (done.code, done.err) == (0, "")
    modules, name = loaded(folder, "a b"), tool.replace("-", "_")
    assert equal(library.load(tmp_path / "m"), library.combine(modules, [0.3, 0.6], method=name))
    written = record(tmp_path / "m")
    assert written["space"] == "parameter" and written["method"].startswith(name)
    assert "error against sum c_i dW_i" in done.out


def test_the_reference_without_negatives_is_the_papers_sum(folder, tmp_path, program):
    command = ("merge", "-a", folder / "a", folder / "b", "-p")
    assert program(*command, tmp_path / "m", "--as", "reference", "--coefficients", 3, 7).code == 0
    assert program(*command, tmp_path / "n", "--search_step", 3, 7).code == 0
    assert equal(library.load(tmp_path / "m"), library.load(tmp_path / "n"))


REFUSALS = {
    "method": (["-w", "tise"], "--merge_way: unknown method 'tise'; did you mean ties?"),
    "density": (
        ["-w", "ties", "--setting", "density=0"],
        "--setting density: density must be in (0, 1]; found 0",
    ),
    "setting": (["-w", "ties", "--setting", "seed=1"], "--setting seed: ties has no setting"),
    "pair": (["-w", "ties", "--setting", "density"], "--setting: not a setting; found 'density'"),
    "twice": (
        ["-w", "ties", "--setting", "density=1", "--setting", "density=.5"],
        "density given twice",
    ),
    "setting of a sum": (["--setting", "density=1"], "simple has no setting 'density'"),
    "parameter space": (["-w", "ties", "--space", "parameter"], "ties merges updates"),
    "parity by -w": (["-w", "peft_linear"], "use --as peft-linear"),
    "as and way": (["--as", "reference", "-w", "ties"], "given together with a method"),
    "as and delta": (["--as", "reference", "--space", "delta"], "merges the modules' own tensors"),
    "as and rank": (["--as", "reference", "--rank", "2"], "applies to delta space only"),
    "as and sum 0": (["--as", "reference", "--coefficients", "1", "-1"], "which is 0"),
    "shares": (["-w", "karcher", "--coefficients", "1", "-1"], "only the ratios"),
}


@pytest.mark.parametrize("words", REFUSALS.values(), ids=REFUSALS)
def test_a_merge_that_cannot_be_is_refused_and_nothing_written(words, folder, tmp_path, program):
    done = program("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m", *words[0])
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words[1] in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_the_kind_lacks_is_refused_from_the_headers(folder, tmp_path, program):
    done = program("merge", "-a", folder / "i", folder / "j", "-p", tmp_path / "m", "-w", "tsv")
    assert done.code == 2 and "tsv: not defined for modules of kind ia3" in done.err
    three = [folder / n for n in "abc"]
    done = program("merge", "-a", *three, "-p", tmp_path / "m", "-w", "slerp")
    assert done.code == 2 and "found 3, expected 2; use karcher" in done.err


def test_methods_are_listed_and_described(pem):
    listed = pem("methods")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == list(METHODS)
    described = pem("methods", "iso-cts")
    assert "arXiv:2502.04959" in described.out and "common=0.8" in described.out
    unknown = pem("methods", "tise")
    assert unknown.code == 2 and "did you mean ties?" in unknown.err


# --- pem compose ---


def compose(pem, folder: Path, out: Path, text: str, *words: object):
    bound = [w for n in ("a", "b", "c", "wide", "i", "j") if re.search(rf"\b{n}\b", text)
             for w in ("--module", f"{n}={folder / n}")]  # fmt: skip
    return pem("compose", text, *bound, "-p", out, *words)


def test_methods_in_expressions(folder, tmp_path, pem):
    text = "0.5*ties(a, 0.5*wide, density=0.4) + 0.3*(b - c)"
    done = compose(pem, folder, tmp_path / "m", text)
    assert (done.code, done.err) == (0, "")
    named = {n: library.load(folder / n) for n in ("a", "b", "c", "wide")}
    assert equal(library.load(tmp_path / "m"), library.compose(text, named))
    written = record(tmp_path / "m")
    assert written["space"] == "delta"
    again = compose(pem, folder, tmp_path / "n", written["expression"])
    assert again.code == 0 and equal(library.load(tmp_path / "n"), library.load(tmp_path / "m"))


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("tise(a, b)", [], "expression, column 1: no function 'tise'; did you mean ties?"),
        ("ties(a, b, density=2)", [], "expression, column 12: ties: density must be in (0, 1]"),
        ("tsv(i, j)", [], "tsv: not defined for modules of kind ia3"),
        ("ties(a, i)", [], "kind differs; found lora in a and ia3 in i"),
        ("a + wide", [], "rank r at"),
        ("a + b", ["--rank", "2"], "--rank: applies to delta space only; found space parameter"),
        ('layers(a, "*.9.*", 2)', [], "no layer of a matches"),
    ],
)
def test_an_expression_that_cannot_be_is_refused(text, words, message, folder, tmp_path, pem):
    done = compose(pem, folder, tmp_path / "m", text, *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    assert not (tmp_path / "m").exists()


def test_no_module_may_have_the_name_of_a_function(folder, tmp_path, pem):
    done = pem("compose", "ties", "--module", f"ties={folder / 'a'}", "-p", tmp_path / "m")
    assert done.code == 2 and "the name of a function; found ties" in done.err


# --- pem compose --config ---

RECIPE = """
expression: 0.5*ties(a, wide, density=0.2) + c   # comments are fine
modules: {a: a, wide: wide, c: c}
rank: 3
head: last
dtype: bfloat16
layers:
  c: {"*.layer.[0-0].*": 0.3, "*": -1}
"""


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_says_it_all(folder, tmp_path, pem):
    done = pem("compose", "--config", recipe(folder, RECIPE), "-p", tmp_path / "m")
    assert (done.code, done.err) == (0, "")
    named = {n: library.load(folder / n) for n in ("a", "wide", "c")}
    expected = library.compose(
        "0.5*ties(a, wide, density=0.2) + c",
        named,
        rank=3,
        head="last",
        dtype="bfloat16",
        layers={"c": {"*.layer.0.*": 0.3, "*": -1}},
    )
    found = library.load(tmp_path / "m")
    assert found.config.r == 3
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor.float(), rtol=0, atol=0)
    assert 'layers(c, "*.layer.[0-0].*", 0.3, "*", -1)' in record(tmp_path / "m")["expression"]


def test_flags_add_to_a_recipe_and_never_repeat_it(folder, tmp_path, pem):
    file = recipe(folder, "expression: a + b\nmodules: {a: a}\nspace: delta\n")
    command = ("compose", "--config", file, "-p", tmp_path / "m")
    bound = ("--module", f"b={folder / 'b'}")
    assert pem(*command, *bound, "--rank", 2).code == 0
    assert library.load(tmp_path / "m").config.r == 2
    for words, name in (
        (("--space", "delta"), "space"),
        (("--module", f"a={folder / 'b'}"), "module a"),
        (("a - b",), "expression"),
    ):
        refused = pem(*command, *bound, *words, "-o")
        assert refused.code == 2
        assert f"{file}: {name} is given on the command line too" in refused.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expression: a\nmodules: {a: a}\nrnk: 3", "line 3: unknown key 'rnk'; did you mean rank?"),
        ("expression: a\nmodules: {a: a}\nrank: two", "line 3: not a rank; found two"),
        ("expression: a\nmodules: {a: a}\nrank: 2.5", "line 3: not a rank; found 2.5"),
        ("expression: a\nmodules: {a: a}\nrank: .nan", "line 3: not a rank; found .nan"),
        ("expression: a\nmodules: {a: a}\nspace: dleta", "line 3: unknown space; found dleta"),
        ("expression: a\nmodules: {a: a}\nhead: mean", "line 3: unknown head; found mean"),
        ("expression: a\nmodules: {a: a}\nexpression: b", "line 3: key 'expression' given twice"),
        ("expression: a\nmodules: {a: a, a: b}", "line 2: key 'a' given twice"),
        ("expression: a\nmodules: [a]", "line 2: modules must be a mapping"),
        ("expression: a\nmodules: {a: [b]}", "line 2: the path of a must be text"),
        ("expression: a\nmodules: {a: a}\nlayers: {a: 2}", "line 3: layers of a must be a mapping"),
        ('expression: a\nmodules: {a: a}\nlayers: {a: {"[": 2}}', "a bracket is not closed"),
        ("expression: a\nmodules: {a: a}\nlayers: {b: {x: 2}}", "does not use; found b"),
        ("expression: a", "line 1: no modules"),
        ("modules: {a: a}", "line 1: no expression"),
        ("", "line 1: the file must be a mapping"),
        ("- a", "line 1: the file must be a mapping"),
        ("expression: [", "not YAML"),
        (
            "expression: !!python/object:os.system x\nmodules: {a: a}",
            "line 1: expression has a tag",
        ),
        ("[" * 5000, "nested too deep"),
        ("expression: a + b\nmodules: {a: a}", "no module named 'b'; found names ['a']"),
        ("expression: a\nmodules: {a: nowhere}", "no such directory"),
        ("expression: a +\nmodules: {a: a}", "expression, column 4: unexpected 'the end'"),
        ("expression: ties\nmodules: {ties: a}", "the name of a function"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(text, message, folder, tmp_path, pem):
    done = pem("compose", "--config", recipe(folder, text), "-p", tmp_path / "m")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    assert not (tmp_path / "m").exists()


def test_a_recipe_that_is_no_small_text_file_is_refused(folder, tmp_path, pem):
    for content, message in ((b"\xff\xfe", "cannot be read"), (b"a" * 300_000, "too large")):
        (folder / "recipe.yaml").write_bytes(content)
        done = pem("compose", "--config", folder / "recipe.yaml", "-p", tmp_path / "m")
        assert done.code == 2 and message in done.err
    done = pem("compose", "--config", folder / "none.yaml", "-p", tmp_path / "m")
    assert done.code == 2 and "No such file" in done.err
    assert pem("compose", "-p", tmp_path / "m").code == 2
