"""merge, negation, analogy and compose: every flag, on modules written here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import pem_process
from support.tiny_models import equal, tiny, write_modules

import pem_composition as library
from pem_composition.cli import flags
from pem_composition.cli.common import labels
from pem_composition.errors import UsageError
from scripts import follow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(tmp_path_factory.mktemp("modules"), "roberta", {"base": 0})


def loaded(*paths: Path) -> list[library.PEM]:
    return [library.load(p) for p in paths]


# --- coefficients ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (0.5, 0.5)),
        (["--coefficients", "1.5", "-0.5"], (1.5, -0.5)),
        (["--coefficients", "1", "-7e-1"], (1.0, -0.7)),
        (["--search_step", "30", "70"], (0.3, 0.7)),
        (["--search_step", "0", "2"], (0.0, 1.0)),
        (["--search_step", "1e308", "1e308"], (0.5, 0.5)),
    ],
)
def test_coefficients_are_taken_as_the_flag_says(words, expected, folder, tmp_path, program):
    a, b = folder / "a", folder / "b"
    done = program("merge", "-a", a, b, "-p", tmp_path / "m", *words)
    assert (done.code, done.err) == (0, "")
    assert equal(library.load(tmp_path / "m"), library.combine(loaded(a, b), expected))
    terms = json.loads((tmp_path / "m" / "pem.json").read_text())["terms"]
    assert [t["coefficient"] for t in terms] == pytest.approx(expected)


def test_a_sum_without_coefficients_names_its_rule(folder, tmp_path, program):
    a, b, space = folder / "a", folder / "b", ("--space", "delta")
    for words, told, c in (
        ((), "coefficients 1/T = 0.5 each", 0.5),
        (("--coefficient_rule", "sqrt"), "coefficients 1/sqrt(T) = 0.707 each", 2**-0.5),
    ):
        out = tmp_path / told.replace("/", "")
        done = program("merge", "-a", a, b, "-p", out, *space, *words)
        assert done.code == 0 and done.out.splitlines()[0].endswith(f", {told})")
        expected = library.combine(loaded(a, b), (c, c), space="delta")
        assert equal(library.load(out), expected)
    for words in (("--coefficients", "1", "1"), ("-w", "ties")):
        done = program(
            "merge", "-a", a, b, "-p", tmp_path / "m", "--coefficient_rule", "sqrt", *words
        )
        assert done.code == 2 and "--coefficient_rule: the coefficients are given" in done.err


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(lambda x: sum(x) > 1e-3))
def test_search_steps_are_divided_by_their_sum(steps):
    assert sum(flags.normalised(steps)) == pytest.approx(1)
    assert flags.normalised(steps) == pytest.approx([s / sum(steps) for s in steps])


def test_a_search_step_of_sum_zero_or_below_names_the_remedy():
    for steps in ([0.0, 0.0], [1.0, -1.0], [100.0, -40.0]):
        with pytest.raises(UsageError, match="use --coefficients"):
            flags.normalised(steps)


def test_one_module_and_the_same_module_twice_are_sums_too(folder, tmp_path, program):
    a = folder / "a"
    assert program("merge", "-a", a, "-p", tmp_path / "one").code == 0
    assert equal(library.load(tmp_path / "one"), library.load(a))
    assert program("merge", "-a", a, a, "-p", tmp_path / "two", "--coefficients", 1, 1).code == 0
    assert equal(library.load(tmp_path / "two"), 2 * library.load(a))


# --- space, rank, format, dtype ---


def test_delta_space_takes_different_ranks_and_parameter_space_names_both(
    folder, tmp_path, program
):
    a, wide = folder / "a", folder / "wide"
    refused = program("merge", "-a", a, wide, "-p", tmp_path / "m")
    assert refused.code == 2
    assert "found 4 in a and 6 in wide" in refused.err
    assert "--space delta" in refused.err
    done = program("merge", "-a", a, wide, "-p", tmp_path / "m", "--space", "delta", "--rank", 3)
    assert (done.code, done.err) == (0, "")
    module = library.load(tmp_path / "m")
    assert module.config.r == 3
    assert equal(module, library.combine(loaded(a, wide), [0.5, 0.5], space="delta", rank=3))
    recorded = json.loads((tmp_path / "m" / "pem.json").read_text())["certificate"]["total"]
    assert f"error against sum c_i dW_i: {recorded:.2g}" in done.out
    assert 0 < recorded < 1


@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
def test_format_decides_the_layout(layout, folder, tmp_path, program):
    a, b = folder / "a", folder / "b"
    assert program("merge", "-a", a, b, "-p", tmp_path / "m", "--format", layout).code == 0
    weights = {"peft": "adapter_model.safetensors", "adapter-transformers": "pytorch_adapter.bin"}
    assert (tmp_path / "m" / weights[layout]).is_file()
    assert equal(library.load(tmp_path / "m"), library.combine(loaded(a, b), [0.5, 0.5]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_dtype_is_that_of_the_file(dtype, folder, tmp_path, program):
    from safetensors.torch import load_file

    done = program("negation", "-a", folder / "a", "-p", tmp_path / "m", "--dtype", dtype)
    assert done.code == 0
    written = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert {str(t.dtype) for t in written.values()} == {f"torch.{dtype}"}


# --- heads ---


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], "average"),
        (["--merge_head", "false"], "last"),
        (["--no-merge_head"], "last"),
        (["--merge_head"], "average"),
        (["--merge_head", "true"], "average"),
        (["--head", "average"], "average"),
        (["--head", "first"], "first"),
        (["--head", "none"], "none"),
    ],
)
def test_the_head_of_a_merge(words, policy, folder, tmp_path, program):
    a, b = loaded(folder / "a", folder / "b")
    done = program(
        "merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m",
        "--coefficients", 0.3, 0.7, *words,
    )  # fmt: skip
    assert done.code == 0
    assert (f"head {policy}" if policy != "none" else "no head") in done.out
    head = library.load(tmp_path / "m").head_tensors()
    expected = {
        "last": b.head_tensors(),
        "first": a.head_tensors(),
        "none": {},
        "average": {n: 0.3 * t + 0.7 * b.head_tensors()[n] for n, t in a.head_tensors().items()},
    }[policy]
    assert head.keys() == expected.keys()
    assert all(torch.allclose(head[n], expected[n], atol=1e-6) for n in head)


# --- names and checks ---


def test_tasks_name_the_output_and_the_terms(folder, tmp_path, program):
    done = program("merge", "-a", folder / "a", folder / "b", "-p", tmp_path, "-t", "rte", "mnli")
    assert done.out.startswith(f"{tmp_path / 'rte_mnli'} = +0.5*rte +0.5*mnli  (")
    assert (tmp_path / "rte_mnli" / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b", ".", "a..b", " "])
def test_a_task_name_never_becomes_a_path(name, folder, tmp_path, program):
    done = program("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m", "-t", "x", name)
    assert done.code == 2
    assert "--adatasks: not a name" in done.err
    assert not (tmp_path / "m").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "modules", "code"),
    [("lora", "ab", 0), ("ia3", "ij", 0), ("ia3", "ab", 2), ("fft", "ij", 2)],
)
def test_adaconfig_is_checked_against_the_modules(kind, modules, code, folder, tmp_path, program):
    done = program("merge", "-a", *(folder / m for m in modules), "-p", tmp_path / "m", "-c", kind)
    assert done.code == code


def test_the_model_is_checked_against_the_modules(folder, tmp_path, program):
    tiny("bert").save_pretrained(tmp_path / "bert")
    command = ("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m")
    assert program(*command, "-m", folder / "base").code == 0
    refused = program(*command, "-o", "-m", tmp_path / "bert")
    assert refused.code == 2
    assert "found bert in --model" in refused.err
    assert "and roberta in a" in refused.err
    assert program(*command, "-o", "-m", tmp_path / "bert", "--allow_base_mismatch").code == 0


REFUSALS = {
    "one coefficient": (["--coefficients", "1"], "--coefficients: one coefficient per module"),
    "both": (["--coefficients", "1", "2", "--search_step", "1", "2"], "given together"),
    "steps": (["--search_step", "1"], "--search_step: one entry per module"),
    "negative step": (["--search_step", "100", "-40"], "use --coefficients"),
    "zero steps": (["--search_step", "0", "0"], "which is 0"),
    "nan": (["--coefficients", "nan", "1"], "expected a finite number"),
    "way": (
        ["--merge_way", "zipit"],
        "--merge_way: unknown method 'zipit'; expected simple, magnitude, ties, dare",
    ),
    "fisher": (["-w", "fisher", "-f", "x", "y"], "x: no fisher file"),
    "fisher list": (["-f", "x", "y"], "--merge_way fisher, regmean and ssr only"),
    "dropout count": (["-d", "0.1"], "--dropout_list: one probability per module"),
    "dropout": (["-d", "0.1", "1.5"], "--dropout_list: cannot be used; found 1.5"),
    "rank": (["--rank", "2"], "add --space delta"),
    "rank 0": (["--space", "delta", "--rank", "0"], "not a rank; found 0"),
    "names": (["-t", "x"], "--adatasks: one name per module"),
    "head twice": (["--head", "first", "--merge_head"], "--head: contradicts --merge_head true"),
    "two spaces": (["--space", "delta", "parameter"], "two spaces make two modules"),
    "models": (["-m", "x", "y"], "several base models"),
    "no evaluation": (["--test_file", "x"], "has no effect without --evaluate"),
    "grid and coefficients": (
        ["--grid", "0", "1", "1", "--coefficients", "1", "2"],
        "given together",
    ),
    "no step": (["--grid", "0", "0", "1"], "STEP > 0"),
    "backwards": (["--grid", "1", "0.1", "0"], "START <= STOP"),
    "many": (["--grid", "0", "1e-6", "1"], "too many points"),
    "endless": (["--grid", "0", "1e-320", "1"], "too many points; found inf"),
    "wide": (["--grid", "-1e308", "1", "1e308"], "too many points; found inf"),
    "evaluate": (["--evaluate"], "add --grid"),
    "no model": (["--evaluate", "--grid", "0", "1", "1"], "--model_name_or_path"),
}


@pytest.mark.parametrize("words", REFUSALS.values(), ids=REFUSALS)
def test_a_merge_that_cannot_be_is_refused_and_nothing_written(words, folder, tmp_path, program):
    done = program("merge", "-a", folder / "a", folder / "b", "-p", tmp_path / "m", *words[0])
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert words[1] in done.err
    assert list(tmp_path.iterdir()) == []


def test_dropout_is_accepted_and_changes_nothing(folder, tmp_path, program):
    command = ("merge", "-a", folder / "a", folder / "b", "-p")
    assert program(*command, tmp_path / "m").code == 0
    assert program(*command, tmp_path / "n", "-d", 0.1, 0).code == 0
    assert equal(*loaded(tmp_path / "m", tmp_path / "n"))


# --- outputs ---


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_an_existing_output_is_left_alone_without_overwrite(folder, tmp_path, program):
    command = ("negation", "-a", folder / "a", "-p", tmp_path / "m")
    assert program(*command).code == 0
    before = contents(tmp_path / "m")
    refused = program(*command, "--strength", 2)
    assert refused.code == 2
    assert "the output exists" in refused.err
    assert "--overwrite" in refused.err
    assert contents(tmp_path / "m") == before
    assert program(*command, "--strength", 2, "-o", "true").code == 0
    assert contents(tmp_path / "m") != before


def test_an_output_never_replaces_an_input(folder, tmp_path, program):
    shutil.copytree(folder / "a", tmp_path / "in" / "a")
    before = contents(tmp_path)
    for out in (tmp_path / "in" / "a", tmp_path / "in"):
        refused = program("negation", "-a", tmp_path / "in" / "a", "-p", out, "--overwrite")
        assert refused.code == 2
        assert "would replace an input" in refused.err
        assert contents(tmp_path) == before


def test_a_grid_writes_every_point_or_none(folder, tmp_path, program):
    a, b = folder / "a", folder / "b"
    done = program("merge", "-a", a, b, "-p", tmp_path / "g", "--grid", 0, 0.25, 1, "--merge_head")
    assert (done.code, done.err) == (0, "")
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == ["0", "0.25", "0.5", "0.75", "1"]
    expected = library.combine(loaded(a, b), [0.25, 0.75])
    assert equal(library.load(tmp_path / "g" / "0.25"), expected)
    assert len(done.out.splitlines()) == 5
    before = contents(tmp_path / "g")
    assert program("merge", "-a", a, b, "-p", tmp_path / "g", "--grid", 0, 1, 1).code == 2
    assert contents(tmp_path / "g") == before
    assert program("merge", "-a", a, "-p", tmp_path / "h", "--grid", 0, 1, 1).code == 2
    assert not (tmp_path / "h").exists()


def test_a_grid_over_three_modules_writes_the_simplex(folder, tmp_path, program):
    paths = [folder / name for name in "abc"]
    done = program("merge", "-a", *paths, "-p", tmp_path / "g", "--grid", 0, 0.5, 1, "--merge_head")
    assert (done.code, done.err) == (0, "")
    names = {"0_0_1", "0_1_0", "1_0_0", "0.5_0.5_0", "0.5_0_0.5", "0_0.5_0.5"}
    assert {p.name for p in (tmp_path / "g").iterdir()} == names
    expected = library.combine(loaded(*paths), [0.5, 0, 0.5])
    assert equal(library.load(tmp_path / "g" / "0.5_0_0.5"), expected)


def test_a_grid_of_analogies_writes_one_module_per_coefficient(folder, tmp_path, program):
    paths = [folder / name for name in "abc"]
    grid = ("--grid", 0.5, 0.5, 1, 0.9, 0.05, 1)
    done = program("analogy", "-a", *paths, "-p", tmp_path / "g", *grid)
    assert (done.code, done.err) == (0, "")
    assert {p.name for p in (tmp_path / "g").iterdir()} == {"0.5", "0.9", "0.95", "1"}
    expected = library.analogy(*loaded(*paths), 0.9)
    assert equal(library.load(tmp_path / "g" / "0.9"), expected)


def test_modules_of_different_initialisation_are_said_to_be(folder, tmp_path, program):
    for name in "ab":
        shutil.copytree(folder / name, tmp_path / name)
        record = json.loads((tmp_path / name / "pem.json").read_text())
        record["init"] = name * 64
        (tmp_path / name / "pem.json").write_text(json.dumps(record))
    done = program("merge", "-a", tmp_path / "a", tmp_path / "b", "-p", tmp_path / "m")
    assert done.code == 0
    assert [x for x in done.out.splitlines() if "different initialisations" in x]
    assert len(done.out.splitlines()) == 2


# --- negation, analogy, compose ---


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0, -0.7])
@pytest.mark.parametrize("name", ["a", "i"])
@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_negation_scales_the_reversed_effect(strength, name, space, folder, tmp_path, program):
    done = program(
        "negation", "-a", folder / name, "-p", tmp_path / "n",
        "--strength", strength, "--space", space,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    expected = library.negate(library.load(folder / name), strength)
    found = library.load(tmp_path / "n")
    if space == "parameter" or name == "i":
        assert equal(found, expected)
    for layer in expected.layers:
        torch.testing.assert_close(effect(found, layer), effect(expected, layer), rtol=0, atol=1e-6)


def effect(module: library.PEM, layer: str) -> torch.Tensor:
    """dW of a LoRA layer, l - 1 of an (IA)^3 layer."""
    if module.kind == "ia3":
        return module.tensors[f"{layer}.ia3"] - 1
    A, B = (module.tensors[f"{layer}.{role}"] for role in ("lora_A", "lora_B"))
    return module.config.scaling(layer) * B @ A


def test_negation_takes_one_module(folder, tmp_path, program):
    done = program("negation", "-a", folder / "a", folder / "b", "-p", tmp_path / "n")
    assert (done.code, "expected one" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "lam"),
    [
        ([], 0.5),
        (["--coefficient", "0.9"], 0.9),
        (["--coefficient", "-0.5"], -0.5),
        (["--search_step", "90", "10"], 0.9),
    ],
)
@pytest.mark.parametrize(
    ("flags", "head"),
    [([], "average"), (["--head", "first"], "first"), (["--no-merge_head"], "first")],
)
def test_analogy_weighs_the_classifier_and_the_difference(
    words, lam, flags, head, folder, tmp_path, program
):
    paths = [folder / name for name in "abc"]
    done = program("analogy", "-a", *paths, "-p", tmp_path / "x", *words, *flags)
    assert (done.code, done.err) == (0, "")
    a, b, c = loaded(*paths)
    expected = library.combine([a, b, c], [lam, 1 - lam, lam - 1], head=head)
    assert equal(library.load(tmp_path / "x"), expected)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--search_step", "1", "2", "3"], "--search_step: wrong number of entries; found 3"),
        (["--search_step", "1", "-1"], "use --coefficient, taken as given"),
        (["--coefficient", "0.5", "--search_step", "1", "1"], "given together"),
        (["--coefficient", "0.5", "--grid", "0", "1", "1"], "given together"),
        (["--evaluate"], "add --grid"),
        (["--coefficient", "0.5", "--grid", "0", "1", "1", "--evaluate"], "found --coefficient"),
        (["--bf16"], "has no effect without --evaluate"),
        (["--coefficients", "1", "1", "1"], "did you mean --coefficient?"),
    ],
)
def test_an_analogy_that_cannot_be_is_refused(words, reason, folder, tmp_path, program):
    paths = [folder / name for name in "abc"]
    done = program("analogy", "-a", *paths, "-p", tmp_path / "x", *words)
    assert (done.code, list(tmp_path.iterdir())) == (2, [])
    assert reason in done.err


def test_analogy_takes_three_modules(folder, tmp_path, program):
    done = program("analogy", "-a", folder / "a", folder / "b", "-p", tmp_path / "x")
    assert (done.code, "three: CLS TARGET_LM SOURCE_LM" in done.err) == (2, True)


def compose(pem, folder: Path, out: Path, expression: str, *words: object):
    bound = [f"{n}={folder / n}" for n in "abc" if n in expression]
    pairs = [word for pair in bound for word in ("--module", pair)]
    return pem("compose", expression, *pairs, "-p", out, *words)


@pytest.mark.parametrize("space", ["parameter", "delta"])
def test_compose_is_the_flat_combination(space, folder, tmp_path, pem):
    out = tmp_path / "x"
    done = compose(pem, folder, out, "0.6*a + 0.4*(b - c)", "--space", space)
    assert (done.code, done.err) == (0, "")
    modules = loaded(*(folder / n for n in "abc"))
    assert equal(library.load(out), library.combine(modules, [0.6, 0.4, -0.4], space=space))
    assert done.out.startswith(f"{out} = +0.6*a +0.4*b -0.4*c  (space {space}, head average")


def test_compose_agrees_with_python_operators(folder, tmp_path, pem):
    assert compose(pem, folder, tmp_path / "x", "-(2*a - b)/4").code == 0
    a, b = loaded(folder / "a", folder / "b")
    assert equal(library.load(tmp_path / "x"), -(2 * a - b) / 4)


def test_a_negation_inside_an_expression_is_linear_in_its_strength(folder, tmp_path, pem):
    assert compose(pem, folder, tmp_path / "x", "negate(a, 0.5)").code == 0
    a = library.load(folder / "a")
    assert equal(library.load(tmp_path / "x"), library.negate(a, 0.5))
    done = compose(pem, folder, tmp_path / "y", "b + negate(a, 0.5)", "--space", "delta")
    assert done.code == 0
    b = library.load(folder / "b")
    assert equal(library.load(tmp_path / "y"), library.combine([b, a], [1, -0.5], space="delta"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a + b", "--module", "a=x"], "no module named 'b'"),
        (["a", "--module", "a=x", "--module", "b=x"], "does not use; found b"),
        (["a", "--module", "a"], "expected NAME=DIR"),
        (["a", "--module", "../a=x"], "expected NAME=DIR"),
        (["a", "--module", "a=x", "--module", "a=y"], "given twice"),
        (["mean(a)", "--module", "mean=x"], "the name of a function"),
        (["a +* b", "--module", "a=x"], "expression, column 4"),
        (["a", "--module", "a=no/where"], "no/where: no such directory"),
    ],
)
def test_an_expression_that_cannot_be_is_refused(arguments, reason, tmp_path, pem):
    done = pem("compose", *arguments, "-p", tmp_path / "x")
    assert (done.code, list(tmp_path.iterdir())) == (2, [])
    assert reason in done.err


# --- whole models ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and three models m1, m2, m3 of one architecture."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "m1", "m2", "m3")):
        tiny("roberta", seed=seed).save_pretrained(root / name)
    return root


def weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def is_head(name: str) -> bool:
    return name.startswith("classifier.")


@pytest.mark.parametrize("as_reference", [True, False])
def test_whole_models_are_summed(as_reference, models, tmp_path, program):
    paths = (models / "m1", models / "m2")
    words = ("-m", *paths, "--full_merge", "true") if as_reference else ("-a", *paths, "-c", "fft")
    done = program("merge", *words, "-p", tmp_path / "m", "--search_step", 30, 70)
    assert (done.code, done.err) == (0, "")
    a, b, out = weights(paths[0]), weights(paths[1]), weights(tmp_path / "m")
    assert out.keys() == a.keys()
    for name in out:
        expected = 0.3 * a[name] + 0.7 * b[name]
        torch.testing.assert_close(out[name], expected, rtol=0, atol=1e-6)
    assert "+0.3*m1 +0.7*m2  (space parameter, head average, error against the update" in done.out


def test_weights_that_do_not_sum_to_one_need_the_base(models, tmp_path, program):
    command = (
        "merge",
        "-a",
        models / "m1",
        models / "m2",
        "-p",
        tmp_path / "m",
        "--coefficients",
        1,
        1,
    )
    refused = program(*command, "--merge_head")
    assert refused.code == 2
    assert "--model BASE" in refused.err
    done = program(*command, "-m", models / "base", "--merge_head")
    assert (done.code, done.err) == (0, "")
    base, a, b, out = (
        weights(p) for p in (models / "base", models / "m1", models / "m2", tmp_path / "m")
    )
    for name in out:
        total = (a[name] + b[name]) / 2 if is_head(name) else a[name] + b[name] - base[name]
        torch.testing.assert_close(out[name], total, rtol=0, atol=2e-6)


def test_negation_and_analogy_of_whole_models(models, tmp_path, program):
    base, *rest = (weights(models / n) for n in ("base", "m1", "m2", "m3"))
    m = ("-m", models / "base")
    done = program("negation", "-a", models / "m1", "-p", tmp_path / "n", "--strength", 0.4, *m)
    assert (done.code, done.err) == (0, "")
    paths = [models / n for n in ("m1", "m2", "m3")]
    done = program(
        "analogy", "-a", *paths, "-p", tmp_path / "x", "-c", "fft", "--coefficient", 0.8, *m
    )
    assert (done.code, done.err) == (0, "")
    negated, moved = weights(tmp_path / "n"), weights(tmp_path / "x")
    for name in negated:
        if not is_head(name):
            a, b, c = (t[name] for t in rest)
            torch.testing.assert_close(
                negated[name], base[name] - 0.4 * (a - base[name]), rtol=0, atol=2e-6
            )
            torch.testing.assert_close(
                moved[name], base[name] + 0.8 * (a - base[name]) + 0.2 * (b - c), rtol=0, atol=2e-6
            )
        else:
            a, b, c = (t[name] for t in rest)
            assert torch.equal(negated[name], a)
            averaged = (0.8 * a + 0.2 * b + 0.2 * c) / 1.2
            torch.testing.assert_close(moved[name], averaged, rtol=0, atol=2e-6)


# --- labels and inspect ---


def test_labels_are_the_shortest_that_differ():
    assert labels(["x/a", "y/b/"]) == ["a", "b"]
    assert labels(["x/best", "y/best"]) == ["x/best", "y/best"]
    assert labels(["x/best", "y/best", "z/init"]) == ["x/best", "y/best", "init"]
    assert labels(["x/a", "x/a"]) == ["a", "a"]
    assert labels(["x/a", "y/b"], ["rte", "mnli"]) == ["rte", "mnli"]


def test_inspect_tells_kind_rank_and_whether_modules_combine(folder, pem):
    done = pem("inspect", "-a", folder / "a", folder / "wide")
    assert done.code == 0
    assert "r                4" in done.out
    assert "parameter space: no" in done.out
    assert "delta space: yes" in done.out
    one = json.loads(pem("inspect", "-a", folder / "i", "--json").out)
    assert (one["kind"], one["head"], one["model_type"]) == ("ia3", True, "roberta")


# --- what is opened ---

FOLLOWED = {
    "merge": "merge -a {a} {b} -p OUT --coefficients 0.3 0.7",
    "merge, points": "merge -a {a} {b} -p OUT --grid 0 0.5 1",
    "detoxify": "detoxify -a {a} {b} -p OUT",
    "compose": "compose a-0.5*b --module a={a} --module b={b} -p OUT",
    "compare": "compare {a} {b}",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", FOLLOWED.values(), ids=FOLLOWED)
def test_a_file_is_opened_once_and_the_modules_of_a_sum_are_compared_once(words, folder, tmp_path):
    command = words.format(a=folder / "a", b=folder / "b").replace("OUT", str(tmp_path / "out"))
    child = pem_process.call(follow.main, command.split(), tmp_path / "log")
    assert child.wait() == 0, child.text()
    seen = json.loads(child.log.read_text().splitlines()[-1])
    assert seen["exit"] == 0
    read = {Path(path).name for path in seen["opened"]}
    assert {"adapter_config.json", "adapter_model.safetensors", "pem.json"} <= read
    assert set(seen["opened"].values()) <= {1}
    if not words.startswith("comp"):  # each part of an expression, and each pair, is one sum
        assert seen["calls"]["check_compatible"] <= 1
