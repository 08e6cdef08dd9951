"""Nothing in the library calls what could run code from a file: read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from support.sources import REPOSITORY, nodes

LOADERS = frozenset(
    {
        *("eval", "exec", "compile", "__import__"),
        *("pickle.load", "pickle.loads", "torch.load", "numpy.load", "np.load", "joblib.load"),
        *("dill.load", "dill.loads", "cloudpickle.load", "yaml.load", "yaml.unsafe_load"),
        *("marshal.loads", "shelve.open", "os.system", "os.popen", "pandas.read_pickle"),
        *("load_state", "load_state_dict_from_url", "evaluate.load", "dcp.load"),
    }
)


def every_node() -> Iterator[tuple[Path, ast.AST]]:
    """Of the package, and of the programs beside it."""
    programs = {p: list(ast.walk(ast.parse(p.read_text()))) for p in REPOSITORY.glob("*.py")}
    return ((path, node) for path, found in (nodes() | programs).items() for node in found)


def dotted(node: ast.expr) -> str:
    """``numpy.load``; what is no name stands for itself as nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(call: ast.Call) -> Iterator[str]:
    """What a call does that may run code from a file or a shell."""
    name = dotted(call.func)
    if name in LOADERS or name.rpartition(".")[2] in ("load_state", "read_metadata"):
        yield name
    for keyword in call.keywords:
        if keyword.arg in ("shell", "trust_remote_code"):
            value = ast.unparse(keyword.value)
            if value != "False":
                yield f"{keyword.arg}={value}"


def test_no_loader_that_runs_code_is_called() -> None:
    calls = [(path, node) for path, node in every_node() if isinstance(node, ast.Call)]
    assert len(calls) > 1000
    found = [f"{path}:{call.lineno}: {said}" for path, call in calls for said in offences(call)]
    assert found == []


def test_the_one_unpickler_is_the_restricted_one() -> None:
    users = {
        path.name
        for path, node in every_node()
        if isinstance(node, ast.Import) and "pickle" in {alias.name for alias in node.names}
    }
    assert users == {"pickles.py"}
