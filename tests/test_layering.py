"""Who may import whom, every import counted wherever it stands; CONTRIBUTING.md has the picture."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.sources import PACKAGE, SOURCES, nodes, trees

NUMBERS = {
    "errors",
    "signals",
    "safe_files",
    "config",
    "arithmetic",
    "record",
    "module",
    "composition",
    "checkpoint",
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "network": set(),
    "same_texts": set(),
    "progress": set(),
    "threads": set(),
    "launch": set(),
    "config": {"errors"},
    "json_lines": {"errors", "safe_files"},
    "flag_declarations": {"errors"},
    "offline": {"errors", "same_texts"},
    "signals": {"errors"},
    "safe_files": {"errors", "signals"},
    "arithmetic": {"errors", "config", "record"},
    "record": {"errors"},
    "module": {"errors", "config", "arithmetic", "record"},
    "composition": {"errors", "config", "arithmetic", "record", "module"},
    "checkpoint": NUMBERS - {"checkpoint"} | {"_version", "network", "progress"},
    "adapters": NUMBERS,
    "tasks": {"errors", "same_texts", "offline", "network", "safe_files"},
    "evaluation": NUMBERS
    | {"progress", "same_texts", "offline", "json_lines", "adapters", "tasks", "network", "launch"}
    | {"flag_declarations"},
    "objectives": {"errors", "tasks", "evaluation"},
    "training": NUMBERS
    | {"offline", "adapters", "tasks", "evaluation", "objectives", "launch", "flag_declarations"},
    "merging": NUMBERS
    | {"progress", "launch", "adapters", "tasks", "evaluation", "objectives", "training"},
    "sweep": NUMBERS
    | {"adapters", "tasks", "evaluation", "objectives", "training", "merging", "report"}
    | {"json_lines", "progress", "launch"},
    "report": {"errors", "json_lines", "safe_files", "_version"},
    "endpoint": {"errors", "module", "checkpoint", "tasks", "evaluation", "sweep", "json_lines"},
    "cli": NUMBERS
    | {"offline", "adapters", "tasks", "evaluation", "training", "merging", "sweep", "report"}
    | {"objectives", "endpoint", "json_lines", "progress", "threads", "launch", "_version"}
    | {"flag_declarations"},
    "__main__": {"cli"},
    "__init__": NUMBERS | {"_version", "adapters"},  # the public names, for type checkers
}
# The one arrow that runs up and stays: PEM.save hands the module to the room that writes it.
DECLARED = {("module", "checkpoint")}
# Arrows that run up or close a circle today. The list may only shrink.
DEBTS: set[tuple[str, str]] = set()
# What may not grow: names that stand for two things, and imports inside functions.
MOST_IMPORTS_INSIDE_FUNCTIONS = 90
LIGHT = (
    "errors", "json_lines", "safe_files", "signals", "config", "record", "checkpoint", "cli",
    "flag_declarations",
    "offline", "report", "sweep", "endpoint", "__init__",
)  # fmt: skip
# Files of those rooms that programs import when they begin to compute.
IMPORTED_LATE = {"sweep/studies.py", "endpoint/client.py", "report/leaderboard.py"}
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


FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES
}  # dotted names below the package; the root is __init__
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
IMPORTS = ast.Import | ast.ImportFrom
Edge = tuple[str, str]


def imported_files(path: Path) -> Iterator[str]:
    """Files of the package imported anywhere in a file: in functions and for types, too."""
    for node in nodes()[path]:
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            root, _, below = module.partition(".")
            if root == "pem_composition":
                inner = f"{below}.{name}".removeprefix(".")
                yield inner if inner in FILES else below or "__init__"


@functools.cache
def edges() -> set[Edge]:
    return {
        (name, other)
        for name, path in FILES.items()
        for other in imported_files(path)
        if other != name
    }


def room_of(name: str) -> str:
    return name.partition(".")[0]


def upward(arrows: Iterable[Edge]) -> set[Edge]:
    """Arrows that the table does not have."""
    return {
        (a, b)
        for a, b in arrows
        if room_of(a) != room_of(b) and room_of(b) not in MAY_IMPORT[room_of(a)]
    }


def circle(arrows: Iterable[Edge]) -> list[str] | None:
    """The files of one circle, if there is any."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for a, b in arrows:
        sorter.add(a, b)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_a_file_imports_only_the_rooms_below_its_own():
    assert upward(edges()) - DECLARED - DEBTS == set()


def test_the_offline_room_has_one_door():
    """Models and data by package name can move out of the package without a change elsewhere."""
    inner = {(a, b) for a, b in edges() if b.startswith("offline.") and room_of(a) != "offline"}
    assert inner == set()


def test_the_table_of_rooms_has_no_circle():
    assert circle((a, b) for a, below in MAY_IMPORT.items() for b in below) is None


def test_no_files_import_each_other_in_a_circle():
    assert circle(edges() - DECLARED - DEBTS) is None


@pytest.mark.parametrize("edge", sorted(DEBTS | DECLARED), ids=" -> ".join)
def test_a_debt_that_was_paid_is_taken_off_the_list(edge):
    assert edge in edges()
    assert edge in upward(edges()) or circle(edges() - DECLARED - DEBTS | {edge})


def twice(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def test_no_name_stands_for_two_things():
    classes = twice(
        node.name
        for found in nodes().values()
        for node in found
        if isinstance(node, ast.ClassDef) and node.name != "Config"  # one for each program
    )
    files = twice(path.name for path in SOURCES if not path.name.startswith("__"))
    assert (classes, files) == ([], [])


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node that stand in no function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from at_import(child)


def test_no_more_imports_stand_inside_functions():
    """Write them at the top; a program defers one import, the one of what it runs."""
    everywhere = sum(isinstance(node, IMPORTS) for found in nodes().values() for node in found)
    outside = sum(isinstance(node, IMPORTS) for t in trees().values() for node in at_import(t))
    assert 0 < everywhere - outside <= MOST_IMPORTS_INSIDE_FUNCTIONS


def test_third_party_packages_stay_in_their_layer():
    first, anywhere = set(), set()
    for path, tree in trees().items():
        unit, name = unit_of(path), str(path.relative_to(PACKAGE))
        if unit in LIGHT and name not in IMPORTED_LATE:
            found = {n.split(".")[0] for n in imports(tree, inside_functions=False)}
            first |= {(name, package) for package in found & HEAVY}
        if unit in NUMBERS:
            found = {n.split(".")[0] for n in imports(tree, inside_functions=True)}
            anywhere |= {(name, package) for package in found & (HEAVY - {"torch"})}
    assert first == set()
    assert anywhere == set()


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


@pytest.mark.slow
def test_the_numbers_layer_needs_torch_alone(repository):
    code = (
        "import pem_composition as pem\n"
        "pem.PEM, pem.combine, pem.compose, pem.negate, pem.analogy, pem.load, pem.save\n"
        "import pem_composition.arithmetic.algebra, pem_composition.arithmetic.delta\n"
    )
    assert loaded_after(code, repository) <= {"torch"}
