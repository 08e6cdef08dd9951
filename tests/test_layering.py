"""Who may import whom: CONTRIBUTING.md has the picture; imports inside functions are free."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pem_composition"

NUMBERS = {"errors", "config", "arithmetic", "recipe", "module", "composition", "checkpoint"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "offline": {"errors"},
    "arithmetic": {"errors", "config"},
    "recipe": {"errors"},
    "module": {"errors", "config", "arithmetic", "recipe"},
    "composition": {"errors", "config", "arithmetic", "recipe", "module"},
    "checkpoint": {"errors", "config", "arithmetic", "recipe", "module"},
    "adapters": NUMBERS,
    "tasks": {"errors", "offline"},
    "evaluation": NUMBERS | {"offline", "adapters", "tasks"},
    "training": NUMBERS | {"offline", "adapters", "tasks", "evaluation"},
    "merging": NUMBERS | {"adapters", "tasks", "evaluation", "training"},
    "sweep": NUMBERS | {"adapters", "tasks", "evaluation", "training", "merging", "report"},
    "report": {"errors"},
    "endpoint": {"errors", "tasks", "evaluation", "sweep"},
    "cli": NUMBERS
    | {"offline", "adapters", "tasks", "evaluation", "training", "merging", "sweep", "report"}
    | {"endpoint"},
    "__main__": {"cli"},
    "__init__": set(),
}
LIGHT = (
    "errors", "config", "recipe", "checkpoint", "cli", "offline", "report", "sweep", "endpoint",
    "__init__",
)  # fmt: skip
HEAVY = {
    "torch", "transformers", "datasets", "sklearn", "scipy", "evaluate", "peft", "accelerate",
    "openai", "bitsandbytes", "optuna", "cmaes", "matplotlib",
}  # fmt: skip


def unit_of(path: Path) -> str:
    """The top-level name below the package: a module or a folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Absolute dotted names imported below ``node``, those for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, inside_functions=inside_functions)


SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_module_imports_only_the_layers_below_it(path):
    unit = unit_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        name.split(".")[1]
        for name in imports(tree, inside_functions=False)
        if name.startswith("pem_composition.")
    }
    known = used & MAY_IMPORT.keys()  # the rest are names of the package root
    assert known - MAY_IMPORT[unit] - {unit} == set()


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_third_party_packages_stay_in_their_layer(path):
    unit = unit_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = {name.split(".")[0] for name in imports(tree, inside_functions=False)}
    anywhere = {name.split(".")[0] for name in imports(tree, inside_functions=True)}
    if unit in LIGHT:
        assert at_import & HEAVY == set()
    if unit in NUMBERS:
        assert anywhere & (HEAVY - {"torch"}) == set()


def test_the_programs_at_the_root_are_thin(repository):
    for program in ("merge.py", "negation.py", "analogy.py"):
        text = (repository / program).read_text(encoding="utf-8")
        names = set(imports(ast.parse(text), inside_functions=True))
        assert {n.split(".")[0] for n in names} & HEAVY == set()
        assert len(text.splitlines()) <= 70


def loaded_after(code: str, repository: Path) -> set[str]:
    """Heavy packages that are in memory after running ``code`` in a new interpreter."""
    report = f"import sys; print(*(sys.modules.keys() & {HEAVY!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=repository,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_costs_no_torch(repository):
    assert loaded_after("import pem_composition", repository) == set()


def test_every_subcommand_is_imported_without_torch(repository):
    code = (
        "from pem_composition import cli, offline\n"
        "for name in cli.SUBCOMMANDS:\n    cli.load(name)\n"
    )
    assert loaded_after(code, repository) == set()


def test_the_numbers_layer_needs_torch_alone(repository):
    code = (
        "import pem_composition as pem\n"
        "pem.PEM, pem.combine, pem.compose, pem.negate, pem.analogy, pem.load, pem.save\n"
        "import pem_composition.arithmetic.algebra, pem_composition.arithmetic.delta\n"
    )
    assert loaded_after(code, repository) <= {"torch"}
