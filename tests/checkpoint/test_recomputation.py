"""Rebuilding: every function of the library and every layout, bit for bit; and what breaks it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import random_module, tiny, write_modules

import pem_composition as library
from pem_composition.checkpoint import combine_full
from pem_composition.checkpoint.recomputation import rebuild
from pem_composition.errors import CheckpointError, UsageError
from pem_composition.module import PEM, analogy, combine, negate

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(
        tmp_path_factory.mktemp("modules"), "bert", {"base": 10, "m1": 11, "m2": 12}
    )


@pytest.fixture
def inputs(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(written, tmp_path / "in")
    return tmp_path / "in"


Made = Callable[..., PEM]
COMPOSITIONS: dict[str, tuple[str, Made, dict]] = {
    "sum": ("ab", lambda a, b: 0.3 * a + 0.7 * b, {}),
    "nested sum": ("abc", lambda a, b, c: 2 * (a - b) - (b + c) / 3, {}),
    "negation": ("a", lambda a: negate(a, 0.6), {}),
    "negation of a sum": ("abc", lambda a, b, c: negate(a - 0.5 * b, 0.4) + c, {}),
    "analogy": ("abc", lambda a, b, c: analogy(a, b, c, 0.8), {}),
    "ranks": (["a", "wide"], lambda a, b: combine([a, b], [1, -0.4], space="delta"), {}),
    "rank R": ("abc", lambda *m: combine(m, [1, 1, -1], space="delta", rank=3), {}),
    "delta of delta": (
        "abc",
        lambda a, b, c: combine(
            [combine([a, b], [1, 1], space="delta"), negate(c)], [0.1, 1 / 3], space="delta"
        ),
        {},
    ),
    "rounded": ("ab", lambda a, b: combine([a, b], [0.3, 0.7], dtype="bfloat16"), {}),
    "rounded when saved": ("ab", lambda a, b: a - b, {"dtype": "float16"}),
    "double": ("ab", lambda a, b: a - b, {"dtype": "float64"}),
    "(IA)^3": ("ij", lambda a, b: 0.3 * a + 0.7 * b - negate(a, 2), {}),
    "a method": ("abc", lambda *m: combine(m, [1, 1, 0.5], method="ties",
                                           settings={"density": 0.3}, rank=5), {}),
    "a seeded method": ("ab", lambda a, b: combine([a, b], [1, 1], method="dare_ties",
                                                   settings={"seed": 7}, rank=4), {}),
    "an expression with a method and layers": (
        "abc",
        lambda a, b, c: library.compose(
            '0.5*ties(a, 0.5*b, form=core) + layers(c, "*.layer.0.*", 0.2)',
            {"a": a, "b": b, "c": c}, rank=6, dtype="bfloat16",
        ),
        {},
    ),
    "another program's sum": ("ab", lambda a, b: combine([a, b], [1, 1], method="peft_linear"), {}),
    "detoxification": ("ab", lambda a, b: library.detoxify(a, b, 0.3), {}),
    "the reference's detoxification": (
        "ab", lambda a, b: library.detoxify(a, b, 0.3, form="reference"), {},
    ),
    "last head": ("ab", lambda a, b: combine([a, b], [1, 1], head="last"), {}),
    "heads apart": ("ab", lambda a, b: combine([a, b], [1, 1], head="per-task"), {}),
    "one head": ("ab", lambda a, b: combine([a, b], [1, 1], head="concat"), {}),
    "one of the heads": (
        "ab", lambda a, b: combine([a, b], [1, 1], head="per-task").with_head("b"), {},
    ),
    "a head of an input": ("ab", lambda a, b: a + combine([a, b], [1, 1], head="concat")
                           .with_head("b"), {}),
    "reference layout": (
        "ij", lambda a, b: combine([a, b], [0.3, 0.7], head="none"),
        {"format": "adapter-transformers", "dtype": "float16"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_what_was_composed_is_composed_again_bit_for_bit(
    name: str, written: Path, tmp_path: Path
) -> None:
    used, make, form = COMPOSITIONS[name]
    if name == "reference layout":  # output scaling is what that layout can hold
        folder = Path(tmp_path)
        for seed, own in enumerate(used):
            module = random_module(tiny("bert"), "ia3", seed=seed, placement="reference")
            module.save(folder / own)
        modules = [library.load(folder / n) for n in used]
    else:
        modules = [library.load(written / n) for n in used]
    make(*modules).save(tmp_path / "out", **form)
    found = rebuild(tmp_path / "out")
    assert found.differences == ()
    assert found.equal
    assert {s.name for s, _ in found.inputs} == set(used)
    expected = {WEIGHTS} if "format" not in form else {"pytorch_adapter.bin"}
    assert expected <= set(found.files)


def test_golden_modules_of_the_reference_are_rebuilt_in_its_layout(
    shared: Path, tmp_path: Path
) -> None:
    golden = shared / "golden" / "adapter_transformers"
    a, b = (library.load(golden / f"gpt2_lora_{i}" / f"task{i}") for i in (1, 2))
    combine([a, b], [0.3, 0.7]).save(tmp_path / "a_b", format="adapter-transformers")
    assert rebuild(tmp_path / "a_b").equal
    (tmp_path / "a_b").rename(tmp_path / "renamed")  # the name is in its keys
    assert rebuild(tmp_path / "renamed").equal


@pytest.mark.parametrize("coefficients", [[0.3, 0.7], [1.0, -0.4]])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_whole_models_are_rebuilt(
    coefficients: list[float], dtype: str | None, inputs: Path, tmp_path: Path
) -> None:
    models = [inputs / "m1", inputs / "m2"]
    combine_full(models, coefficients, tmp_path / "m", base=inputs / "base", dtype=dtype)
    assert rebuild(tmp_path / "m").equal
    (inputs / "base").rename(tmp_path / "moved")
    if sum(coefficients) != 1:
        with pytest.raises(CheckpointError, match="no base model here"):
            rebuild(tmp_path / "m")
    assert rebuild(tmp_path / "m", base=tmp_path / "moved").equal


def test_a_whole_model_as_a_module_is_rebuilt(inputs: Path, tmp_path: Path) -> None:
    modules = [library.load(inputs / n, base=inputs / "base") for n in ("m1", "m2")]
    library.save(modules[0] + 0.5 * negate(modules[1]), tmp_path / "m", base=inputs / "base")
    assert rebuild(tmp_path / "m").equal


def test_a_composition_of_compositions_on_disk_is_rebuilt_step_by_step(
    inputs: Path, tmp_path: Path
) -> None:
    a, b, c = (library.load(inputs / n) for n in "abc")
    (a - 0.5 * b).save(tmp_path / "step")
    negate(library.load(tmp_path / "step") + c, 0.3).save(tmp_path / "last")
    found = rebuild(tmp_path / "last")
    assert found.equal
    assert [s.name for s, _ in found.inputs] == ["step", "c"]
    assert rebuild(tmp_path / "step").equal


def test_files_beside_an_input_do_not_change_it(inputs: Path, tmp_path: Path) -> None:
    negate(library.load(inputs / "a")).save(tmp_path / "out")
    for name in ("optimizer.bin", "other.safetensors", "all_results.json", "README.md"):
        (inputs / "a" / name).write_text("x")
    assert rebuild(tmp_path / "out").equal


# --- inputs that are not what they were ---


@pytest.fixture
def merged(inputs: Path, tmp_path: Path) -> Path:
    a, b = library.load(inputs / "a"), library.load(inputs / "b")
    (0.3 * a + 0.7 * b).save(tmp_path / "out")
    return tmp_path / "out"


def test_a_missing_input_is_named_and_can_be_relocated(merged: Path, inputs: Path) -> None:
    (inputs / "b").rename(inputs / "elsewhere")
    with pytest.raises(CheckpointError, match=r"input b: is missing.*--module b=DIR"):
        rebuild(merged)
    assert rebuild(merged, modules={"b": str(inputs / "elsewhere")}).equal
    with pytest.raises(CheckpointError, match=r"input b: has changed: the weights in .*/c"):
        rebuild(merged, modules={"b": str(inputs / "c")})
    with pytest.raises(UsageError, match="no input of that name; found a, b"):
        rebuild(merged, modules={"x": str(inputs / "c")})


def test_inputs_that_moved_together_with_the_output_are_found(
    merged: Path, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(merged, inputs / "out")
    inputs.rename(tmp_path / "moved")
    assert rebuild(tmp_path / "moved" / "out").equal


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json"])
def test_a_changed_input_is_named(file: str, merged: Path, inputs: Path) -> None:
    path = inputs / "a" / file
    if file == WEIGHTS:
        tensors = load_file(path)
        tensors[next(iter(tensors))][0, 0] += 1
        save_file(tensors, path)
    else:
        path.write_text(path.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    (inputs / "a" / "pem.json").unlink()
    what = "the weights" if file == WEIGHTS else "configuration or head"
    with pytest.raises(CheckpointError, match=f"input a: has changed: {what} in"):
        rebuild(merged)


def test_an_input_in_memory_has_to_be_named(inputs: Path, tmp_path: Path) -> None:
    model = tiny("bert")
    a, b = (random_module(model, seed=s, head_seed=s) for s in (1, 2))
    (a + b).save(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"input lora1: was in memory only"):
        rebuild(tmp_path / "out")
    places = {"lora1": str(inputs / "a"), "lora2": str(inputs / "b")}
    assert rebuild(tmp_path / "out", modules=places).equal


# --- outputs that are not what the recipe gives ---


def test_a_changed_value_is_found_with_its_size(merged: Path) -> None:
    tensors = load_file(merged / WEIGHTS)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    tensors[name][1, 2] += 0.25
    save_file(tensors, merged / WEIGHTS)
    (found,) = rebuild(merged).differences
    assert (found.file, found.tensor) == (WEIGHTS, name)
    assert found.largest == pytest.approx(0.25)
    expected = 0.25 / float(torch.linalg.norm(load_file(merged / WEIGHTS)[name]))
    assert found.relative == pytest.approx(expected, rel=0.1)


def test_other_differences_are_named(merged: Path) -> None:
    tensors = load_file(merged / WEIGHTS)
    first, second, *_ = tensors
    tensors["extra"] = tensors.pop(first)
    tensors[second] = tensors[second].bfloat16()
    save_file(tensors, merged / WEIGHTS)
    config = json.loads((merged / "adapter_config.json").read_text())
    (merged / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    record = json.loads((merged / "pem.json").read_text())
    record["certificate"]["total"] *= 0.5
    (merged / "pem.json").write_text(json.dumps(record))
    found = {(d.file, d.tensor): d.what for d in rebuild(merged).differences}
    assert found[(WEIGHTS, "extra")] == "in the directory only"
    assert found[(WEIGHTS, first)] == "in the recipe only"
    assert "BF16" in found[(WEIGHTS, second)]
    assert found[("adapter_config.json", None)] == "other values of lora_alpha"
    assert found[("pem.json", None)].startswith("certificate ")
    (merged / WEIGHTS).unlink()
    assert (WEIGHTS, "missing in the directory") in [
        (d.file, d.what) for d in rebuild(merged).differences
    ]


def test_other_settings_are_another_module(merged: Path) -> None:
    record = json.loads((merged / "pem.json").read_text())
    record["recipe"]["settings"]["coefficients"] = [0.7, 0.3]
    (merged / "pem.json").write_text(json.dumps(record))
    assert not rebuild(merged).equal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "exec"}, "another version of this library wrote it; found exec"),
        ({"function": "negate"}, "found negate"),
        ({"settings": {"coefficients": [1, 1], "magic": 3}}, "found combine with magic"),
    ],
)
def test_a_recipe_that_this_version_does_not_know_is_refused(
    change: dict, message: str, merged: Path
) -> None:
    record = json.loads((merged / "pem.json").read_text())
    record["recipe"] |= change
    (merged / "pem.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=message):
        rebuild(merged)


def test_what_has_no_recipe_is_refused_with_the_reason(
    merged: Path, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no record of how it was made"):
        rebuild(inputs / "a")
    library.load(merged).save(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=f"a copy of .*: pem rebuild {merged}$"):
        rebuild(tmp_path / "copy")
    module = library.load(inputs / "a")
    trained = replace(module.provenance, training={"flags": {"seed": 1}})
    replace(module, provenance=trained).save(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="a module that was trained"):
        rebuild(tmp_path / "trained")
    record = json.loads((merged / "pem.json").read_text())
    (merged / "pem.json").write_text(json.dumps(record | {"recipe": None, "format_version": 1}))
    assert library.load(merged).kind == "lora"
    with pytest.raises(CheckpointError, match="a record without a recipe"):
        rebuild(merged)
    (merged / "pem.json").unlink()
    with pytest.raises(CheckpointError, match=r"no pem.json"):
        rebuild(merged)
    with pytest.raises(CheckpointError, match="no such directory"):
        rebuild(tmp_path / "nowhere")


def test_a_record_of_the_first_version_is_still_read(merged: Path) -> None:
    path = merged / "pem.json"
    record = json.loads(path.read_text())
    for key in ("recipe", "written", "heads"):
        del record[key]
    for source in record["sources"]:
        del source["content"], source["license"]
    path.write_text(json.dumps(record | {"format_version": 1}))
    module = library.load(merged)
    assert module.provenance.notes[-1] == "out was made as +0.3*a +0.7*b in parameter space"
