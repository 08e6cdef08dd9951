"""Nothing in the library calls what could run code from a file: read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = [*(REPOSITORY / "pem_composition").rglob("*.py"), *REPOSITORY.glob("*.py")]
LOADERS = frozenset(
    {
        *("eval", "exec", "compile", "__import__"),
        *("pickle.load", "pickle.loads", "torch.load", "numpy.load", "np.load", "joblib.load"),
        *("dill.load", "dill.loads", "cloudpickle.load", "yaml.load", "yaml.unsafe_load"),
        *("marshal.loads", "shelve.open", "os.system", "os.popen", "pandas.read_pickle"),
        *("load_state", "load_state_dict_from_url", "evaluate.load", "dcp.load"),
    }
)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Dotted name and node of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_loader_that_runs_code_is_called(path: Path) -> None:
    for name, node in calls(path):
        assert name not in LOADERS, f"line {node.lineno}: {name}"
        assert name.rpartition(".")[2] not in ("load_state", "read_metadata"), name
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg == "shell":
                assert value == "False"
            if keyword.arg == "trust_remote_code":
                assert value == "False", f"line {node.lineno}"


def test_the_one_unpickler_is_the_restricted_one() -> None:
    users = {p.name for p in SOURCES if "pickle" in {
        alias.name for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.Import) for alias in node.names}}  # fmt: skip
    assert users == {"pickles.py"}
