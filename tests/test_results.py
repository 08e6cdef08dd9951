"""The docs' tables and figures are those of the rows in results/, and rows lead back to runs."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pem_composition import cli
from pem_composition.cli import common, parser

TOLD = json.loads((Path(__file__).parents[1] / "results" / "tables.json").read_text())
REPRODUCIBLE = [name for name, table in TOLD.items() if "command" in table]
NAMED_BY = {"forms": ("module", "set")}  # columns that name a line, where not by row and task


def parted(label: str) -> tuple[str, str]:
    """The folder and the line that a label names: ``lora/merge, 1/T each`` is of ``lora``."""
    folder = re.match(r"(?:[^ /]+/)*", label)[0]
    return folder.rstrip("/"), label.removeprefix(folder)


@pytest.fixture(scope="module")
def results(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts"))
        return importlib.import_module("results")


def test_every_table_is_on_its_page_as_the_rows_say(results):
    shown = []
    for page in results.pages():
        text = page.read_text(encoding="utf-8")
        assert text == results.written(text), f"{page}: run python scripts/results.py write"
        shown += [(m["name"], page.stem) for m in results.BLOCK.finditer(text)]
    assert sorted(shown) == sorted((name, table["page"]) for name, table in results.TABLES.items())


def test_rows_have_names_of_their_own_and_every_value_is_shown_or_drawn_or_run(results):
    for name in results.TABLES:
        rows = results.rows_of(name)
        assert rows and len({row["name"] for row in rows}) == len(rows)
        assert all(row["name"].startswith(f"{name}/") for row in rows)
        used = set(re.findall(r"\{(\w+)", str(results.TABLES[name])))
        used |= set(re.findall(r"'(\w+)'", str(results.TABLES[name].get("figure", ""))))
        assert set().union(*rows) - used <= {"table", "name", "cells"}, name


def test_figures_are_drawn_from_the_rows_of_today(results):
    for name in (n for n, table in results.TABLES.items() if "figure" in table):
        text = (results.FIGURES / f"{name}.svg").read_text(encoding="utf-8")
        assert f"rows {results.digest(name)}" in text, "run python scripts/results.py write"


@pytest.mark.slow
@pytest.mark.parametrize("table", REPRODUCIBLE)
def test_the_command_of_a_row_writes_where_its_values_are_taken_from(
    table, results, repository, tmp_path
):
    row = results.rows_of(table)[-1]
    if table == "utility" and find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval ([harness])")
    assert results.folder_of(row)
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(repository), "DRY_RUN": "1"}
    data = {"GLUE": "glue", "CIVIL_COMMENTS": "c.jsonl", "REVIEWS": "reviews", "PAIRS": "pairs"}
    data |= {"ALPACA": "a.jsonl", "RTP": "p.jsonl", "TEXTS": "t.jsonl", "OUT": str(tmp_path)}
    command = results.command_of(row)
    variables |= {n: v for n, v in data.items() if f"${n}" in command or n == "OUT"}
    says = 'pem() { printf "%q " "$PYTHON" -m pem_composition "$@"; echo; }'
    code = f"{says}; {command}"
    done = subprocess.run(
        ["bash", "-euc", code], cwd=repository, env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {}
    commands = map(shlex.split, done.stdout.splitlines())
    for words in (words[3:] for words in commands if words[:2] == [sys.executable, "-m"]):
        config = parser.parse(cli.load(words[0]).Config, words[1:], words[0])
        made[str(getattr(config, "save_path", ""))] = config
    labels = {results.filled(label, row) for label, *_ in results.TABLES[table]["fields"].values()}
    for label in labels:
        folder, name = parted(label)
        path = f"{tmp_path}/{results.folder_of(row)}"
        if longer := folder and f"{path}/{folder}" not in made:  # two modules of one name
            folder, name = "", label
        if f" {path}/table.csv" in done.stdout:  # no program of the package writes it
            continue
        config = made[f"{path}{folder and '/'}{folder}"]
        # Lines of the table that are no merge are named as the modules are.
        module = re.split("[ ,]", name)[0]
        if longer or re.search(r"half-\d|-cls-s\d+$", module):
            also = [config.reference_module] if config.reference_module else []
            assert module in common.labels([*config.adapters, *also])


def test_values_that_are_taken_from_a_run_are_those_of_its_table(results, tmp_path):
    for table in REPRODUCIBLE:
        row = results.rows_of(table)[-1]
        fields = results.TABLES[table]["fields"]
        known = {f: v for f, v in fields.items() if row.get(f) is not None}
        lines: dict[str, dict[str, float]] = {}
        for field, (label, column, *scale) in known.items():
            value = row[field] / (scale[0] if scale else 1)
            lines.setdefault(results.filled(label, row), {})[column] = value
        named, part = NAMED_BY.get(table, ("row", "task"))
        columns = [named, part, *{c: None for line in lines.values() for c in line}]
        run = tmp_path / table
        for folder in {parted(label)[0] for label in lines}:
            (run / folder).mkdir(parents=True, exist_ok=True)
            with (run / folder / "table.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                for label, line in lines.items():
                    own, whole = parted(label)
                    name, _, task = whole.partition(" @ ")
                    if own == folder:
                        writer.writerow({named: name, part: task} | line)
        taken = results.taken(row, run)
        assert taken == pytest.approx({field: row[field] for field in known})
        assert results.compared(row, taken)[1]
        first = next(f for f in known if not f.endswith("_se"))
        assert not results.compared(row, taken | {first: taken[first] + 1})[1]


def test_a_score_may_differ_by_the_error_that_its_run_has(results, tmp_path):
    row = results.row_of("halves/minilm-sst2-ia-3-42")
    for error, near in (("0.014", True), ("0.001", False)):
        (tmp_path / "table.csv").write_text(
            f"row,score,standard_error\nia3-half-0-s42,{row['half_0'] + 0.01},{error}\n"
        )
        assert results.compared(row, results.taken(row, tmp_path, errors=True))[1] is near
        assert set(results.taken(row, tmp_path)) == {"half_0"}


def test_a_reader_that_has_seen_enough_gets_no_trace(repository):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "scripts/results.py", "list"], cwd=repository, stdout=write,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == "" and done.returncode == -signal.SIGPIPE
