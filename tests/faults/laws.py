"""What damaged input may do: be refused in one line, or give the numbers that the files hold.

Each target damages one file of a module or model at random, runs ``pem merge`` and ``pem inspect``
on it, and compares what comes out with an independent reading of the same files.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from faults import mutations as m
from faults import oracle, world
from safetensors.torch import load_file, save_file

from pem_composition import cli
from pem_composition.arithmetic import expression, trees
from pem_composition.errors import PEMError

REFUSED, SAME, OTHER = "refused", "same", "other numbers, truly read"
SECONDS = 2.0  # of processor time for one example


class Target(NamedTuple):
    """A file to damage, and the law for what then comes out."""

    name: str
    law: Callable[[Path, Random], str]


def pem(*words: str) -> tuple[int, str]:
    """Exit code and message of a program, which must be a line if there is one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    message = err.getvalue()
    assert code in (0, 2), message
    assert message.count("\n") == (code != 0), message
    assert message.strip().isprintable() and len(message) < 5000, message
    return code, message


def merged(root: Path, folder: str, *words: str) -> bool:
    """True if the module was taken; else refused in a line that names it, and nothing is left."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    before = sorted(p.name for p in root.iterdir())
    inspected, _ = pem("inspect", "-a", str(root / folder), "--json")
    code, message = pem("merge", "-a", str(root / folder), "-p", str(out), *words)
    assert inspected == 0 or code == 2, "read what inspect refuses"
    if code:
        assert str(root / folder) in message or "combination: " in message, message
        assert sorted(p.name for p in root.iterdir()) == before
    assert not (root / "executed").exists()
    return code == 0


def damaged(path: Path, rng: Random, change: m.Change) -> bool:
    """Change a file in place; True if that made it another file."""
    original = path.read_bytes()
    changed = change(rng, original)
    path.write_bytes(changed)
    return changed != original


@contextlib.contextmanager
def copied(root: Path, folder: str):
    """A copy of a directory to be damaged."""
    target = root / "damaged"
    shutil.copytree(root / folder, target)
    try:
        yield target
    finally:
        shutil.rmtree(target)


def same_tensors(a: Path, b: Path) -> bool:
    """Equal tensors, whatever their dtype on disk."""
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[n].float(), y[n].float()) for n in x)


# --- the laws ---


def foreign_weights(root: Path, rng: Random) -> str:
    """Without a record: refused, or the very tensors that the safetensors library reads."""
    with copied(root, "bad") as folder:
        damaged(folder / world.WEIGHTS, rng, m.change_safetensors)
        if not merged(root, "damaged"):
            return REFUSED
        assert same_tensors(root / "out" / world.WEIGHTS, folder / world.WEIGHTS)
        return SAME if same_tensors(folder / world.WEIGHTS, root / "bad" / world.WEIGHTS) else OTHER


def recorded_weights(root: Path, rng: Random) -> str:
    """With a record: any change of any bit is refused."""
    with copied(root, "ours") as folder:
        change = m.change_safetensors if rng.randrange(2) else m.flip_bit
        changed = damaged(folder / world.WEIGHTS, rng, change)
        taken = merged(root, "damaged")
        assert taken != changed
        return SAME if taken else REFUSED


def foreign_config(root: Path, rng: Random) -> str:
    """Refused, or the update that the config's numbers give with these tensors."""
    with copied(root, "bad") as folder:
        damaged(folder / world.CONFIG, rng, m.change_json)
        if not merged(root, "damaged"):
            return REFUSED
        found = oracle.updates(root / "out")
        oracle.close(found, oracle.updates(folder))
        return SAME if oracle.distance(found, oracle.updates(root / "bad")) < 1e-6 else OTHER


def recorded_config(root: Path, rng: Random) -> str:
    """With a record: any change of the config is refused."""
    with copied(root, "ours") as folder:
        changed = damaged(folder / world.CONFIG, rng, m.change_json)
        taken = merged(root, "damaged")
        assert taken != changed
        return SAME if taken else REFUSED


def record(root: Path, rng: Random) -> str:
    """Whatever pem.json says, the numbers are those of the files."""
    with copied(root, "ours") as folder:
        damaged(folder / "pem.json", rng, m.change_json)
        if not merged(root, "damaged"):
            return REFUSED
        assert same_tensors(root / "out" / world.WEIGHTS, root / "ours" / world.WEIGHTS)
        return SAME


def pickle_stream(root: Path, rng: Random) -> str:
    """A torch file with a damaged pickle: refused, or what torch reads where torch reads it."""
    with copied(root, "pickled") as folder:
        path = folder / world.BIN
        with zipfile.ZipFile(path) as archive:
            entries = {i.filename: archive.read(i) for i in archive.infolist()}
        name = next(n for n in entries if n.endswith("data.pkl"))
        entries[name] = m.change_pickle(rng, entries[name])
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in entries.items():
                archive.writestr(entry, data)
        return _as_torch(root, folder)


def pickle_file(root: Path, rng: Random) -> str:
    """A torch file with damaged bytes: the same."""
    with copied(root, "pickled") as folder:
        damaged(folder / world.BIN, rng, m.change_bytes)
        return _as_torch(root, folder)


def _as_torch(root: Path, folder: Path) -> str:
    if not merged(root, "damaged"):
        return REFUSED
    found = load_file(root / "out" / world.WEIGHTS)
    try:
        exact = torch.load(folder / world.BIN, weights_only=True)
    except Exception:  # torch refuses more than it needs to; ours has checked sizes and sums
        exact = found
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[n], exact[n].float()) for n in exact)
    original = load_file(root / "bad" / world.WEIGHTS)
    same = original.keys() == found.keys() and all(
        torch.equal(found[n], original[n]) for n in found
    )
    return SAME if same else OTHER


def reference_layout(root: Path, rng: Random) -> str:
    """A module in the reference layout: refused, or the numbers its config and file give."""
    with copied(root, "reference") as folder:
        file = rng.choice(("adapter_config.json", "head_config.json"))
        damaged(folder / file, rng, m.change_json)
        if not merged(root, "damaged"):
            return REFUSED
        found, exact = oracle.updates(root / "out"), oracle.updates(root / "bad")
        raw = json.loads((folder / "adapter_config.json").read_text())["config"]
        scale = raw["alpha"] / raw["r"] / (6 / 4)
        oracle.close(found, {n: scale * value for n, value in exact.items()})
        return SAME if scale == 1 else OTHER


def model_files(root: Path, rng: Random) -> str:
    """A sharded model whose index or config is damaged: refused, or the same numbers."""
    with copied(root, "sharded") as folder:
        file = rng.choice(("model.safetensors.index.json", "config.json"))
        damaged(folder / file, rng, m.change_json)
        if not merged(root, "damaged", "--full_merge"):
            return REFUSED
        assert same_tensors(root / "out" / "model.safetensors", root / "m1" / "model.safetensors")
        return SAME


def some_text(root: Path, rng: Random) -> str:
    """An expression: refused, or the value that Python gives it."""
    text = m.some_expression(rng)
    try:
        tree = expression.parse(text)
    except PEMError as error:
        assert "\n" not in str(error)
        return REFUSED
    assert expression.parse(str(tree)) == tree, text
    if not all(isinstance(node, trees.Leaf | trees.Negation) for node in trees.nodes(tree)):
        return SAME  # methods and layers mean nothing to numbers
    point = dict.fromkeys(trees.names(tree), 1.0) | {"a": 2.0, "b": -3.0, "c": 0.7}
    exact = _python_value(text, point)
    for space in ("parameter", "delta"):
        value = trees.evaluate(tree, point, Numbers(), space)
        assert exact is None or not math.isfinite(exact) or math.isclose(
            value, exact, rel_tol=1e-9, abs_tol=1e-9 * _size(tree, point)
        ), text  # fmt: skip
    return SAME


class Numbers:
    """What nodes do to numbers in the place of modules."""

    def combine(self, values, weights, space, rank, *, final):
        return sum(w * v for w, v in zip(weights, values, strict=True))

    def negate(self, value, strength, *, final):
        return -strength * value


def _size(tree: trees.Sum, point: dict[str, float]) -> float:
    """Sum of the magnitudes of all terms, which rounding is measured by."""
    total = 0.0
    for c, node in tree.terms:
        leaf = isinstance(node, trees.Leaf)
        inner = abs(point[node.name]) if leaf else abs(node.strength) * _size(node.sum, point)
        total += abs(c) * inner
    return total


def _python_value(text: str, point: dict[str, float]) -> float | None:
    """The value by Python's own grammar, None where that has no such sentence."""
    calls = {"negate": lambda value, strength=1.0: -strength * value,
             "mean": lambda *values: sum(values) / len(values)}  # fmt: skip
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval")
        allowed = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Call,
                   ast.operator, ast.unaryop, ast.expr_context)  # fmt: skip
        assert all(isinstance(node, allowed) for node in ast.walk(tree)), text
        return float(eval(compile(tree, "", "eval"), {"__builtins__": {}}, calls | point))
    except (SyntaxError, OverflowError):
        return None


TARGETS = (
    Target("weights", foreign_weights),
    Target("weights, recorded", recorded_weights),
    Target("config", foreign_config),
    Target("config, recorded", recorded_config),
    Target("pem.json", record),
    Target("pickle", pickle_stream),
    Target("torch file", pickle_file),
    Target("reference layout", reference_layout),
    Target("model files", model_files),
    Target("expression", some_text),
)


def prepare(root: Path) -> Path:
    """The modules and models that the targets damage."""
    world.build(root)
    for name in ("good", "wide", "rs", "late", "ia3", "ia3b", "base2", "gpt2", "m2"):
        shutil.rmtree(root / name)
    shutil.copytree(root / "bad", root / "pickled")
    held = load_file(root / "pickled" / world.WEIGHTS)
    torch.save(held, root / "pickled" / world.BIN)
    (root / "pickled" / world.WEIGHTS).unlink()
    pem("merge", "-a", str(root / "ours"), "-p", str(root / "reference"),
        "--format", "adapter-transformers")  # fmt: skip
    (root / "reference" / "pem.json").unlink()
    _shard(root)
    return root


def _shard(root: Path) -> None:
    """m1 in three files with an index."""
    shutil.copytree(root / "m1", root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    held = sorted(load_file(root / "m1" / "model.safetensors").items())
    table = {}
    for i in range(0, len(held), 20):
        part, name = dict(held[i : i + 20]), f"model-{i // 20 + 1:05d}-of-00003.safetensors"
        save_file(part, root / "sharded" / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))


def check(target: Target, root: Path, rng: Random) -> str:
    """One example: what came of it; fails if the law does not hold or it takes too long."""
    start = time.process_time()
    outcome = target.law(root, rng)
    assert time.process_time() - start < SECONDS
    return outcome
