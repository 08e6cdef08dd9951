"""What the README and the guide say can be done: their commands parse, and the first ones run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import pem_composition
from pem_composition import cli, offline
from pem_composition.cli import parser

TOUR = ("minilm", "rotten_tomatoes")
DOCUMENTS = ("README.md", "docs/guide.md")
PROGRAMS = ("merge", "negation", "analogy")
# Flags whose value is a folder that the command writes.
WRITES = ("-p", "--output_dir", "--save_path")


def commands(text: str) -> Iterator[list[str]]:
    """Words after `pem` of every indented command line; a program at the root is its subcommand."""
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        words = shlex.split(line, comments=True) if re.match(r" {4}(pem|python) ", line) else []
        if words[:1] == ["pem"]:
            yield words[1:]
        elif words:
            yield [words[1].removesuffix(".py"), *words[2:]]


def names(tree: ast.AST) -> dict[str, ast.AST]:
    """Classes and functions that a module or a class defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {x.name: x for x in ast.iter_child_nodes(tree) if isinstance(x, kinds)}


def test_what_the_equations_name_is_there(repository: Path) -> None:
    text = (repository / "docs" / "equations.md").read_text()
    # Only the last two columns: functions and tests.
    cells = (
        row.removesuffix(" |").split(" | ")[-2:] for row in text.splitlines() if row[:2] == "| "
    )
    found = re.findall(r"`([\w/]+(?:/|\.py)[\w:]*|tests/\w+)`", " ".join(map(" ".join, cells)))
    assert len(found) > 100
    for place in found:
        path, *inner = place.split("::")
        root = repository if path.startswith("tests/") else repository / "pem_composition"
        assert (root / path).exists(), place
        node: ast.AST = ast.parse((root / path).read_text()) if inner else ast.Module([], [])
        for name in inner:
            assert name in names(node), place
            node = names(node)[name]
    assert not re.search(r"`(test_\w+|\w+\.py: \w+)`", text), "a name without its path"


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_of_a_document_is_understood(repository: Path, name: str) -> None:
    found = list(commands((repository / name).read_text()))
    assert len(found) > 15
    for words in found:
        module = cli.load(words[0])
        parser.parse(module.Config, words[1:], words[0])


def test_no_line_of_the_readme_replaces_or_misses_a_folder(repository: Path) -> None:
    written: set[str] = set()
    for words in commands((repository / "README.md").read_text()):
        outputs = {words[i + 1] for i, word in enumerate(words) if word in WRITES}
        if words[0] == "convert":
            outputs = {words[2]}
        named = {m for word in words for m in re.findall(r"(?:^|=)(runs/[\w-]+)", word)} - outputs
        assert named <= written, f"{' '.join(words)}: nothing writes {named - written}"
        assert not outputs & written, f"{' '.join(words)}: {outputs & written} is there already"
        written |= outputs


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_read_of_a_split_is_written_by_it(repository: Path, name: str) -> None:
    parts: dict[str, set[str]] = {}
    for words in commands((repository / name).read_text()):
        if words[0] == "split":
            given = parser.parse(cli.load("split").Config, words[1:], "split")
            names = ["half-0", "half-1", "all", "test"]
            names += ["validation"] if given.validation_size else []
            parts[str(given.output_dir)] = {f"{part}.jsonl" for part in names}
        for folder, written in parts.items():
            read = {Path(w).name for w in words if Path(w).parent == Path(folder)}
            assert read <= written, f"{' '.join(words)}: {read - written} of {folder}"
    assert parts


@pytest.mark.slow
def test_the_first_commands_run(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the two modules in `examples`, without a base model."""
    shutil.copytree(repository / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    text = (repository / "README.md").read_text()
    for title in ("One adapter from many, exactly", "Compose"):
        for words in commands(section(text, title)):
            assert cli.main(words) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
    (block,) = re.findall(r"```python\n(.*?)```", section(text, "Compose"), re.DOTALL)
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("+0.3*half-0 +0.7*half-1\n")
    # Exact to the rounding of float32.
    assert "certificate" in (tmp_path / "runs/exact/pem.json").read_text()


def test_the_site_has_every_page_and_every_public_name(repository: Path) -> None:
    """``mkdocs build --strict`` (extra docs) checks the links; that every page is there, we do."""
    named = set(
        re.findall(r": ([\w/]+\.md)$", (repository / "mkdocs.yml").read_text(), re.MULTILINE)
    )
    pages = repository / "docs"
    assert named == {str(page.relative_to(pages)) for page in pages.rglob("*.md")}
    listed = re.findall(r"^::: ([\w.]+)$", (pages / "api.md").read_text(), re.MULTILINE)
    homes = {f"pem_composition.{home}.{name}" for name, home in pem_composition._HOMES.items()}
    assert set(listed) == homes and len(listed) == len(homes)


@pytest.mark.slow
def test_the_tour_runs_and_keeps_its_figure(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """The notebook's cells, on fewer rows, where its model and rows are at hand."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    if any(not row.fetched for row in offline.listing() if row.name in TOUR):
        pytest.skip(f"needs {' and '.join(TOUR)} in the cache: pem offline get NAME")
    cells = json.loads((repository / "examples" / "tour.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    (tmp_path / "examples").symlink_to(repository / "examples")
    monkeypatch.chdir(tmp_path)
    source = "\n".join("".join(cell["source"]) for cell in code)
    exec(compile(source.replace("max_eval_samples 200", "max_eval_samples 8"), "tour", "exec"), {})
    assert (tmp_path / "runs/tour/sweep/report.html").is_file()
