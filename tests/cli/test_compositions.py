"""What the reference programs computed, reproduced through the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pem_composition as library

TOLERANCE = 1e-6  # float32 sums in another order


def inputs(shared: Path, setting: str, count: int) -> list[Path]:
    folder = shared / "golden" / "adapter_transformers"
    return [folder / f"{setting}_{i}" / f"task{i}" for i in range(1, count + 1)]


def raw(folder: Path) -> dict[str, torch.Tensor]:
    """Adapter and head tensors of a reference directory, without the adapter's name in the keys."""
    out = {}
    for file in ("pytorch_adapter.bin", "pytorch_model_head.bin"):
        for key, value in torch.load(folder / file, weights_only=True).items():
            parts = key.split(".")
            for place in ("loras", "heads"):
                if place in parts:
                    parts[parts.index(place) + 1] = "NAME"
            out[".".join(parts)] = value
    return out


def assert_same_keys(found: Path, expected: Path) -> None:
    """Equal key by key in the reference layout."""
    ours, theirs = raw(found), raw(expected)
    assert ours.keys() == theirs.keys()
    assert all((ours[k] - theirs[k]).abs().max() <= TOLERANCE for k in ours)


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Equal as modules, heads included."""
    ours, theirs = library.load(found), library.load(expected)
    a, b = ours.tensors, theirs.tensors
    assert a.keys() == b.keys()
    assert any(name.endswith((".lora_A", ".ia3")) for name in a)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert replace(ours.config, extra={}) == replace(theirs.config, extra={})


@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
@pytest.mark.parametrize("setting", ["roberta_lora", "roberta_ia3", "gpt2_lora", "gpt2_ia3"])
def test_merge_reproduces_the_reference_program(setting, layout, shared, tmp_path, program):
    a, b = inputs(shared, setting, 2)
    done = program(
        "merge",
        "-a",
        a,
        b,
        "-t",
        "a",
        "b",
        "-p",
        tmp_path,
        "--search_step",
        0.3,
        0.7,
        "--merge_head",
        "true",
        "--merge_way",
        "simple",
        "--format",
        layout,
    )
    assert (done.code, done.err) == (0, "")
    expected = shared / "golden" / "adapter_transformers" / f"merged_{setting}" / "a_b"
    assert_same_tensors(tmp_path / "a_b", expected)
    if layout == "adapter-transformers":
        assert_same_keys(tmp_path / "a_b", expected)


@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
@pytest.mark.parametrize("setting", ["roberta_lora", "roberta_ia3", "gpt2_lora", "gpt2_ia3"])
def test_negation_reproduces_the_reference_program(setting, layout, shared, tmp_path, program):
    (a,) = inputs(shared, setting, 1)
    done = program("negation", "-a", a, "-p", tmp_path / "n", "--format", layout)
    assert (done.code, done.err) == (0, "")
    expected = shared / "golden" / "adapter_transformers" / f"negated_{setting}" / "task1"
    assert_same_tensors(tmp_path / "n", expected)


@pytest.mark.parametrize("layout", ["peft", "adapter-transformers"])
@pytest.mark.parametrize(
    "weights", [("--search_step", 0.4, 0.6), ("--search_step", 40, 60), ("--coefficient", 0.4)]
)
@pytest.mark.parametrize("setting", ["t5_lora", "t5_ia3"])
def test_analogy_reproduces_the_reference_program(
    setting, weights, layout, shared, tmp_path, program
):
    words = ["-t", "a", "b", "c", "-p", tmp_path, "--format", layout, *weights]
    done = program("analogy", "-a", *inputs(shared, setting, 3), *words)
    assert (done.code, done.err) == (0, "")
    expected = shared / "golden" / "adapter_transformers" / f"analogy_{setting}" / "a_b_c"
    assert_same_tensors(tmp_path / "a_b_c", expected)
    if layout == "adapter-transformers":
        assert_same_keys(tmp_path / "a_b_c", expected)


@pytest.mark.slow
def test_the_program_at_the_root_is_the_same_program(shared, tmp_path, repository):
    a, b = inputs(shared, "roberta_lora", 2)
    out = tmp_path / "m"
    command = [
        sys.executable,
        repository / "merge.py",
        "-a",
        a,
        b,
        "-p",
        out,
        "--search_step",
        "30",
        "70",
        "--merge_head",
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"{out} = +0.3*task1 +0.7*task2  (space parameter, head average, error against"
    )
    assert_same_tensors(
        out, shared / "golden" / "adapter_transformers" / "merged_roberta_lora" / "a_b"
    )
