"""Every program: help and refusals are light, one line, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys

import pytest

from pem_composition import cli
from pem_composition.cli import parser
from pem_composition.errors import REQUIREMENTS, UsageError, install, installed

# What keeps an answer from coming in half a second; scripts/benchmarks/first_answer.py measures it.
HEAVY = ("torch", "transformers", "datasets", "sklearn", "scipy", "numpy", "matplotlib")
ROOT = ("merge.py", "negation.py", "analogy.py")


COMMANDS = [[name, "--help"] for name in ROOT]
COMMANDS += [["-m", "pem_composition", "--help"]]
COMMANDS += [["-m", "pem_composition", name, "--help"] for name in cli.SUBCOMMANDS]
REFUSED = [
    ["merge.py", "-a", "no/such", "nowhere", "-p", "out"],
    ["merge.py", "-a", "x", "-p", "out", "--coeficients", "1"],
    ["negation.py", "-a", "x", "-p", "out", "--strength", "nan"],
    ["negation.py", "-a", "x", "-p", "out", "--grid", "0", "0.1", "1", "--evaluate"],
    ["negation.py", "-a", "x", "-p", "out", "--max_ppl_increase", "3%"],
    ["analogy.py", "-a", "x", "y", "-p", "out"],
    ["-m", "pem_composition", "mrege"],
    ["-m", "pem_composition", "compose", "a*b", "-p", "out"],
    ["-m", "pem_composition", "inspect", "-a", "nowhere"],
    ["-m", "pem_composition", "offline", "get"],
    ["-m", "pem_composition", "report", "-r", "nowhere"],
    ["-m", "pem_composition", "sweep", "-a", "x", "y", "-p", "out"],
    *(["-m", "pem_composition", name, "--model_name_or_path", "m"]
      for name in ("train", "init", "evaluate")),
    *(["-m", "pem_composition", "evaluate", "--model_name_or_path", model, "--adapter", module,
       "--task_name", "rotten_tomatoes", "--validation_file", "nowhere.jsonl"]
      for model in ("./no/such", "examples") for module in ("no/such", "examples/half-0")),
    *(["-m", "pem_composition", name, "--model_name_or_path", "examples", "--adapter", module,
       "--task_name", "rotten_tomatoes", "--train_file", "nowhere.jsonl", "--output_dir", "out"]
      for name in ("fisher", "gram", "refit") for module in ("no/such", "examples/half-0")),
    *(["-m", "pem_composition", name, "--model_name_or_path", "./no/such", "--adapter",
       "examples/half-0", "--task_name", "rotten_tomatoes", "--train_file", "README.md",
       "--output_dir", "out"] for name in ("fisher", "gram", "refit")),
    ["-m", "pem_composition", "generate", "--model_name_or_path", "m", "--prompt", "a",
     "--output_file", "out"],
    ["-m", "pem_composition", "learn", "--model_name_or_path", "examples", "--method", "cat",
     "--task_name", "rotten_tomatoes", "-a", "examples/half-0", "no/such", "-p", "out"],
]  # fmt: skip


# Runs each command of a list in one new interpreter; what is heavy and new in memory is told.
RUN = """
import contextlib, io, json, runpy, sys
done = []
for command in json.loads(sys.argv[1]):
    out, err, before = io.StringIO(), io.StringIO(), set(sys.modules)
    module = command[0] == "-m"
    sys.argv = command[module:]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    done.append([code, out.getvalue(), err.getvalue(), sorted(set(sys.modules) - before)])
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def answers(repository):
    """Exit code, output, errors and imported modules of each command."""
    commands = [*COMMANDS, *REFUSED]
    words = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=repository, check=True)
    return dict(zip(map(" ".join, commands), json.loads(done.stdout), strict=True))


@pytest.mark.slow
def test_the_answers_come_without_what_takes_long_to_import(answers):
    assert "argparse" in answers[" ".join(COMMANDS[0])][3]
    for command, (code, _, _, modules) in answers.items():
        assert {name.split(".")[0] for name in modules} & set(HEAVY) == set(), command
        assert code == (0 if command.endswith("--help") else 2), command


@pytest.mark.slow
@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_a_refusal_is_one_line_on_stderr(command, answers, repository):
    _, out, err, _ = answers[" ".join(command)]
    assert out == "" and err.count("\n") == 1 and " error: " in err
    assert not (repository / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_changes_no_outcome(closed, repository, tmp_path):
    inputs = [str(repository / "examples" / name) for name in ("half-0", "half-1")]
    for inside, code in ((inputs, 0), ([*inputs, "nowhere"], 2)):
        out = tmp_path / str(code)
        command = shlex.join([sys.executable, "merge.py", "-a", *inside, "-p", str(out)])
        done = subprocess.run(
            f"{command} {closed}", shell=True, cwd=repository, capture_output=True, text=True
        )
        assert done.returncode == code and "Traceback" not in done.stderr
        assert (out / "adapter_model.safetensors").is_file() is (code == 0)


def test_a_link_to_nothing_is_said_to_be_one(tmp_path, pem):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "adapter_config.json").write_text("{}")
    (tmp_path / "module" / "adapter_model.safetensors").symlink_to(tmp_path / "gone")
    loops = [tmp_path / "loop", tmp_path / "loop"]
    for words in (["merge", "-a", *loops, "-p", tmp_path / "out"], ["compare", *loops]):
        code, _, error = pem(*words)
        assert code == 2 and "loop: a symbolic link to nothing; expected a directory" in error
    code, _, error = pem("inspect", tmp_path / "loop")
    assert code == 2 and "loop: a symbolic link to nothing; expected a directory" in error
    assert "did you mean" not in error
    code, _, error = pem("inspect", tmp_path / "module")
    assert code == 2 and "adapter_model.safetensors (a link to nothing), expected" in error


def test_the_overview_names_every_subcommand(pem):
    done = pem("--help")
    assert done.code == 0
    for name in cli.SUBCOMMANDS:
        line = next(text for text in done.out.splitlines() if text.strip().startswith(f"{name} "))
        assert cli.load(name).HELP in line
        assert name == cli.load(name).NAME


def test_a_mistyped_subcommand_meets_a_suggestion(pem):
    done = pem("mrege", "-a", "x")
    assert (done.code, done.out) == (2, "")
    assert done.err == "pem: error: mrege: unknown subcommand; did you mean merge?\n"


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_help_describes_every_flag(name, pem):
    done = pem(name, "--help")
    assert done.code == 0
    module = cli.load(name)
    for field in dataclasses.fields(module.Config):
        assert field.metadata.get("help"), field.name
        flag = field.metadata.get("flag", field.name)
        assert field.metadata.get("positional") or f"--{flag}" in done.out
    assert "examples:" in done.out


def test_remedies_ask_for_what_setup_names_of_optional_packages(repository):
    text = (repository / "setup.py").read_text(encoding="utf-8")
    for package, wanted in REQUIREMENTS.items():
        assert all(f'"{requirement}"' in text for requirement in wanted)
        words = shlex.split(install(package))
        assert words == [sys.executable, "-m", "pip", "install", *wanted]


def test_a_folder_of_the_name_of_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()  # as the logs of wandb in ./wandb
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("no_such_tracker")
    assert installed("torch") and not installed("no_such_package")


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    tracker, tmp_path, monkeypatch
):
    for package in (tracker, "tensorboardX", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    words = ["--model_name_or_path", str(tmp_path), "--task_name", "rte", "--output_dir", "o"]
    with pytest.raises(UsageError, match=f"--report_to {tracker}: .* -m pip install {tracker}"):
        parser.parse(cli.load("train").Config, [*words, "--report_to", tracker], prog="train")


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("torch", ["merge", "-a", "examples/half-0", "examples/half-1", "-p", "out"]),
        ("yaml", ["compose", "a", "--module", "a=examples/half-0", "-p", "out"]),
    ],
)
def test_an_interpreter_without_the_packages_is_told_which_and_what_to_do(
    package, command, repository, tmp_path
):
    words = [sys.executable, "-S", "-m", "pem_composition", *command]  # -S: no site-packages
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert f" {package}: not installed for this Python; found {sys.executable}; " in done.stderr
    assert done.stderr.endswith(f"run {install(str(repository))}\n")
