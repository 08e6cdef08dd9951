"""Nothing in the library calls what could run code from a file: read from its source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

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


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def offences(call: ast.Call) -> Iterator[str]:
    """What a call does that may run code from a file or a shell."""
    name = ast.unparse(call.func)
    if name in LOADERS or name.rpartition(".")[2] in ("load_state", "read_metadata"):
        yield name
    for keyword in call.keywords:
        value = ast.unparse(keyword.value)
        if keyword.arg in ("shell", "trust_remote_code") and value != "False":
            yield f"{keyword.arg}={value}"


def test_no_loader_that_runs_code_is_called() -> None:
    calls = [
        (path, node)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 1000
    found = [f"{path}:{call.lineno}: {said}" for path, call in calls for said in offences(call)]
    assert found == []


def test_the_one_unpickler_is_the_restricted_one() -> None:
    users = {
        path.name
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and "pickle" in {alias.name for alias in node.names}
    }
    assert users == {"pickles.py"}
