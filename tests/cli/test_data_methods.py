"""pem fisher, pem gram, merge.py -w fisher, regmean and ssr, pem learn: from files to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import own_heads
from support.sweep_by_hand import run

import pem_composition as library
from pem_composition.arithmetic.statistics import fingerprint
from pem_composition.checkpoint import statistics_files
from pem_composition.errors import CheckpointError, IncompatibleModules

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> own_heads.Bench:
    return own_heads.make(tmp_path_factory.mktemp("bench"))


def compute(bench: own_heads.Bench, what: str, place: int, out: Path, *words: object) -> int:
    task = bench.tasks[place]
    return run(
        what, "--model_name_or_path", bench.base, "--adapter", bench.modules[place],
        "--task_name", task, "--validation_file", bench.rows[task, "validation"],
        "--split", "validation", "--output_dir", out, *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(bench, tmp_path_factory) -> dict[str, list[Path]]:
    """Directories of the Fisher and the Gram files of the three modules."""
    folder = tmp_path_factory.mktemp("files")
    made: dict[str, list[Path]] = {"fisher": [], "gram": []}
    for what, place in ((w, p) for w in made for p in range(3)):
        made[what].append(folder / f"{what}-{place}")
        assert compute(bench, what, place, made[what][-1], "--max_samples", 8) == 0
    return made


def test_a_file_says_what_it_belongs_to(bench, files):
    for what, paths in files.items():
        for path, module in zip(paths, bench.modules, strict=True):
            found = statistics_files.read(path, what)
            assert found.module == fingerprint(library.load(module))
            assert (found.n, found.facts["split"]) == (8, "validation")
            assert found.facts["task"] == module.name
            assert len(found.facts["rows"]) == 64
            assert load_file(path / f"{what}.safetensors").keys() == found.tensors.keys()


def test_fisher_files_have_the_modules_tensors_and_its_head(bench, files):
    for path, place in zip(files["fisher"], bench.modules, strict=True):
        module = library.load(place)
        found = statistics_files.read(path, "fisher").tensors
        assert {n: t.shape for n, t in found.items()} == {
            n: t.shape for n, t in module.tensors.items()
        }
        assert all(float(t.max()) > 0 for t in found.values())


def test_merging_by_fisher_is_the_weighted_average(bench, files, tmp_path, capsys):
    shares = (0.5, 0.2, 0.3)
    words = [
        "-p",
        tmp_path / "out",
        "-w",
        "fisher",
        "--head",
        "per-task",
        "--coefficients",
        *shares,
    ]
    assert run("merge", "-a", *bench.modules, *words, "-f", *files["fisher"]) == 0
    assert "space parameter" in capsys.readouterr().out
    merged = library.load(tmp_path / "out")
    modules = [library.load(p) for p in bench.modules]
    weights = [statistics_files.read(p, "fisher").tensors for p in files["fisher"]]
    for name, tensor in merged.adapter_tensors().items():
        above = below = 0.0
        for c, m, f in zip(shares, modules, weights, strict=True):
            values = [f[n].double().numpy().ravel() for n in m.adapter_tensors()]
            least = 1e-6 * np.concatenate(values).mean()
            w = c * np.maximum(f[name].double().numpy(), least)
            above, below = above + w * m.tensors[name].double().numpy(), below + w
        np.testing.assert_allclose(tensor, above / below, rtol=1e-5, atol=1e-7)


def test_merging_by_regmean_is_nearest_to_the_modules_outputs(bench, files, tmp_path):
    words = ["-p", tmp_path / "out", "-w", "regmean", "--setting", "off_diagonal=1"]
    words += ["--head", "per-task"]
    assert run("merge", "-a", *bench.modules, *words, "-f", *files["gram"]) == 0
    merged = library.load(tmp_path / "out")
    modules = [library.load(p) for p in bench.modules]
    grams = [statistics_files.read(p, "gram").tensors for p in files["gram"]]
    assert merged.provenance.sources
    for layer in merged.layers:
        dense = [update(m, layer) for m in modules]
        G = [g[f"{layer}.gram"].double().numpy() for g in grams]

        def cost(change: np.ndarray, dense=dense, G=G) -> float:
            gaps = [change - d for d in dense]
            return sum(np.einsum("oi,ij,oj->", e, g, e) for e, g in zip(gaps, G, strict=True))

        found = update(merged, layer)
        best = cost(found)
        draw = np.random.default_rng(0)
        steps = [1e-2 * np.linalg.norm(found) * draw.normal(size=found.shape) / found.size**0.5
                 for _ in range(5)]  # fmt: skip
        assert all(cost(found + step) > best for step in steps)
        assert best < cost(sum(dense) / 3)


def test_ssr_needs_what_the_factors_see_of_the_inputs_and_no_more(bench, files, tmp_path, capsys):
    """A G A^T of the Gram files of the same rows, in whatever order the others were named."""
    seen = []
    for place in range(3):
        others = [m for i, m in enumerate(bench.modules) if i != place]
        seen.append(tmp_path / f"seen-{place}")
        words = ("--max_samples", 8, "--merge_with", *(others[::-1] if place else others))
        assert compute(bench, "gram", place, seen[-1], *words) == 0
    modules = [library.load(p) for p in bench.modules]
    first = statistics_files.read(seen[0], "subspace")
    gram = statistics_files.read(files["gram"][0], "gram")
    for layer in modules[0].layers:
        A = torch.cat([m.tensors[f"{layer}.lora_A"] for m in modules])
        expected = A @ gram.tensors[f"{layer}.gram"] @ A.mT
        close = 1e-5 * float(expected.abs().max())
        found = first.tensors[f"{layer}.subspace"]
        torch.testing.assert_close(found, expected, rtol=0, atol=close)
    words = ["-w", "ssr", "--head", "per-task", "-p"]
    assert run("merge", "-a", *bench.modules, *words, tmp_path / "out", "-f", *seen) == 0
    again = ("merge", "-a", *bench.modules[::-1], *words, tmp_path / "turned", "-f", *seen[::-1])
    assert run(*again) == 0
    merged, turned = (library.load(tmp_path / n) for n in ("out", "turned"))
    for layer in merged.layers:
        found = update(merged, layer)
        np.testing.assert_allclose(update(turned, layer), found, atol=1e-5 * np.abs(found).max())
    two = ("merge", "-a", *bench.modules[:2], *words, tmp_path / "no", "-f", *seen[:2])
    capsys.readouterr()
    assert run(*two) == 2
    assert "was computed for other modules than these" in capsys.readouterr().err


def update(module: library.PEM, layer: str) -> np.ndarray:
    A, B = (module.tensors[f"{layer}.lora_{x}"].double().numpy() for x in "AB")
    return module.config.scaling(layer) * B @ A


def test_statistics_of_another_module_are_refused(bench, files, tmp_path, capsys):
    swapped = [files["fisher"][i] for i in (1, 0, 2)]
    words = ["-p", tmp_path / "out", "-w", "fisher", "-f"]
    assert run("merge", "-a", *bench.modules, *words, *swapped) == 2
    assert "does not belong to mnli" in capsys.readouterr().err
    assert run("merge", "-a", *bench.modules, *words, *files["fisher"][:2]) == 2
    assert "one file per module is needed; found 2, expected 3" in capsys.readouterr().err
    assert run("merge", "-a", *bench.modules, *words, *files["gram"]) == 2
    assert "no fisher file" in capsys.readouterr().err
    assert run("merge", "-a", *bench.modules, "-p", tmp_path / "out", "-w", "regmean") == 2
    assert "make them with pem gram" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_python_takes_statistics_as_well(bench, files):
    modules = [library.load(p) for p in bench.modules[:2]]
    own = [statistics_files.read(p, "gram") for p in files["gram"][:2]]
    merged = library.combine(modules, [1, 1], method="regmean", statistics=own, head="none")
    assert merged.provenance.certificate.total < 1e-6
    assert merged.config.r == 8
    small = library.combine(modules, [1, 1], method="regmean", statistics=own, head="none", rank=3)
    assert small.config.r == 3 and small.provenance.certificate.total > 1e-3
    with pytest.raises(IncompatibleModules, match="takes no statistics"):
        library.combine(modules, [1, 1], statistics=own)


def test_damaged_statistics_are_refused(files, tmp_path):
    original = files["fisher"][0] / "fisher.safetensors"
    tensors = load_file(original)
    plain = tmp_path / "fisher.safetensors"
    save_file(tensors, plain)
    with pytest.raises(CheckpointError, match="says not which module it belongs to"):
        statistics_files.read(plain, "fisher")
    found = statistics_files.read(original, "fisher")
    name = min(tensors)
    broken = {**found.tensors, name: -found.tensors[name]}
    statistics_files.write(
        statistics_files.Statistics("fisher", broken, found.module, 8), tmp_path / "negative"
    )
    with pytest.raises(CheckpointError, match="has negative entries"):
        statistics_files.read(tmp_path / "negative", "fisher")
    plain.write_bytes(original.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        statistics_files.read(plain, "fisher")


def test_a_module_that_does_not_answer_the_task_is_refused(bench, tmp_path, capsys):
    words = [
        "--model_name_or_path",
        bench.base,
        "--adapter",
        bench.modules[1],
        "--split",
        "validation",
    ]
    rows = bench.rows["mnli", "validation"]
    out = tmp_path / "out"
    code = run(
        "fisher", *words, "--task_name", "mnli", "--validation_file", rows, "--output_dir", out
    )
    assert code == 2
    assert "its head does not answer task mnli" in capsys.readouterr().err
    assert not out.exists()


# --- pem learn ---


def learn(bench: own_heads.Bench, out: Path, *words: object) -> dict:
    flags = (*bench.flags(), "--head", "per-task", "--max_steps", 5, "--learning_rate", 0.05)
    assert run("learn", *flags, "-p", out, *words) == 0
    return json.loads((out / "learned.json").read_text())


def test_learned_coefficients_are_a_module_and_a_recipe(bench, tmp_path, capsys):
    record = learn(bench, tmp_path / "out")
    assert "stsb is a regression, which has no entropy; left out" in capsys.readouterr().out
    values = np.array(record["coefficients"])
    assert values.shape == (3, 4) and values.min() >= 0 and values.max() <= 1
    assert len(record["history"]) == 5
    merged = library.load(tmp_path / "out")
    modules = [library.load(p) for p in bench.modules]
    for place, layer in enumerate(record["layers"]):
        expected = sum(c * update(m, layer) for c, m in zip(values[:, place], modules, strict=True))
        np.testing.assert_allclose(update(merged, layer), expected, rtol=1e-4, atol=1e-6)
    again = tmp_path / "again"
    assert run("compose", "--config", tmp_path / "out" / "recipe.yaml", "-p", again) == 0
    other = library.load(again)
    assert all(torch.equal(t, other.tensors[n]) for n, t in merged.tensors.items())


def test_a_recipe_names_each_module_s_own_layers_and_the_dtype(bench, tmp_path):
    module = library.load(bench.modules[1])
    left = module.layers[:-1]
    tensors = {n: t for n, t in module.tensors.items() if not n.startswith(module.layers[-1])}
    smaller = replace(module, tensors=tensors, config=replace(module.config, target_modules=left))
    smaller.save(tmp_path / bench.modules[1].name)
    paths = [*bench.modules]
    paths[1] = tmp_path / bench.modules[1].name
    learn(replace(bench, modules=tuple(paths)), tmp_path / "out", "--dtype", "bfloat16")
    again = tmp_path / "again"
    assert run("compose", "--config", tmp_path / "out" / "recipe.yaml", "-p", again) == 0
    files = [load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", again)]
    assert files[0].keys() == files[1].keys()
    assert all(t.dtype == torch.bfloat16 for t in files[0].values())
    assert all(torch.equal(t, files[1][n]) for n, t in files[0].items())


def test_cat_learns_shares_from_labels(bench, tmp_path, capsys):
    record = learn(bench, tmp_path / "out", "--method", "cat", "--per", "module", "--rank", 4)
    values = np.array(record["coefficients"])
    assert values.shape == (3, 1)
    np.testing.assert_allclose(values.sum(0), 1, rtol=1e-6)
    assert np.abs(values - 1 / 3).max() > 1e-3
    assert library.load(tmp_path / "out").config.r == 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--space", "parameter"], "coefficients are learned in delta space"),
        (["--method", "lorahub"], "invalid choice: 'lorahub'"),
        (["--learning_rate", "0"], "--learning_rate: cannot be used"),
        (["--head", "average"], "need different heads"),
    ],
)
def test_what_cannot_be_learned_is_refused(words, reason, bench, tmp_path, capsys):
    flags = [*bench.flags(), "-p", tmp_path / "out"]
    head = [] if "--head" in words else ["--head", "per-task"]
    assert run("learn", *flags, *head, *words) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
