"""A signal at any moment of any program ends it with 75, or it is finished first."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import slurm, sweep_data, unlearning_data
from support.tiny_models import random_module, tiny, write_causal

from pem_composition import signals
from pem_composition.cli import parser
from pem_composition.errors import EXIT_PREEMPTED, Preempted
from pem_composition.safe_files import atomic_directory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SENT = (signal.SIGUSR1, signal.SIGTERM)
MOMENTS = 2
NUMBERS = ("score", "loss", "mean", "perplexity", "sha256")

PROGRAMS = {
    "split": "split --train_file rows.jsonl --share 0.5 --output_dir out",
    "merge": "merge -a a b -p out",
    "init": "init --objective causal_lm --model_name_or_path base --output_dir out",
    "whole": "negation -a base -m tuned -p out --strength 0.5",
}
SCORED = "--model_name_or_path cls/base --task_name mnli --validation_file cls/dev.jsonl"
RESUMED = {
    "sweep": f"sweep -a cls/half1 cls/half2 -p out --grid 0 0.5 1 {SCORED}",
    "unlearning": "negation -a lm/module -p out --grid 0 0.5 1 --evaluate "
    "--model_name_or_path lm/base --prompt_file lm/prompts.jsonl --num_samples 2 "
    "--max_new_tokens 4 --judge lm/judge --perplexity_file lm/text.raw --window 16 --stride 8",
    "report": "report -r known -p out",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, two modules, two models, and a stand-in for scontrol that records its calls."""
    folder = tmp_path_factory.mktemp("signals")
    rows = [f'{{"text": "word {i}", "label": {i % 2}}}\n' for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(rows))
    torch.manual_seed(0)
    for seed, name in enumerate("ab"):
        random_module(tiny("roberta"), seed=seed).save(folder / name)
    for name in ("base", "tuned"):
        write_causal(folder / name, "gpt2", ["some words of a text"] * 5, seed=len(name))
    slurm.Slurm(folder)
    return folder


def start(place: Path, command: str) -> subprocess.Popen[str]:
    """A job's batch shell that runs one step; returns when the step begins."""
    script = (
        f"source {ROOT}/exps/common.sh; cd {place}; step x $PYTHON -m pem_composition {command}"
    )
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OUT": str(place / "log"),
        "SLURM_JOB_ID": "4711",
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        ["bash", "-c", script], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_job_is_finished_or_given_back(place, name):
    """What a requeued job then writes is what it writes without a signal."""
    out, calls = place / "out", place / "calls"
    began = time.monotonic()
    whole = start(place, PROGRAMS[name])
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    seconds = time.monotonic() - began
    expected = set(contents(out))
    draw = random.Random(name)
    for _ in range(MOMENTS):
        subprocess.run(["rm", "-rf", out, calls], check=True)
        process = start(place, PROGRAMS[name])
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(draw.choice(SENT))
        _, said = process.communicate()
        assert process.returncode in (0, EXIT_PREEMPTED), said
        assert calls.exists() == (process.returncode == EXIT_PREEMPTED)
        assert [p for p in place.iterdir() if p.name.startswith(".")] == []
        assert set(contents(out)) in (set(), expected)
    subprocess.run(["rm", "-rf", out, calls], check=True)


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on(place, name):
    """Signals at random moments of one run after another: the last one ends with the whole."""
    if not (place / "cls").exists():
        sweep_data.make(place / "cls")
        unlearning_data.make(place / "lm")
        assert start(place, RESUMED["sweep"].replace("-p out", "-p known")).wait() == 0
    out, calls = place / "out", place / "calls"
    subprocess.run(["rm", "-rf", out, calls], check=True)
    began = time.monotonic()
    whole = start(place, RESUMED[name])
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    seconds = time.monotonic() - began
    expected = scores(out)
    subprocess.run(["rm", "-rf", out, calls], check=True)
    draw = random.Random(name)
    for _ in range(MOMENTS):
        calls.unlink(missing_ok=True)
        process = start(place, RESUMED[name])
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(draw.choice(SENT))
        _, said = process.communicate()
        assert process.returncode in (0, EXIT_PREEMPTED), said
        assert calls.exists() == (process.returncode == EXIT_PREEMPTED)
    last = start(place, RESUMED[name])
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert scores(out) == expected
    subprocess.run(["rm", "-rf", out, calls], check=True)


def scores(out: Path) -> dict[str, object]:
    """Names of what was written, and every measured number by the key of its result."""
    results = out / "results.jsonl"
    records = [json.loads(line) for line in results.open()] if results.exists() else []
    measured = {r["key"]: {k: r.get(k) for k in NUMBERS} for r in records if "key" in r}
    return {"files": set(contents(out)), "measured": measured}


@pytest.fixture(autouse=True)
def nothing_is_ignored() -> Iterator[None]:
    """A suite that was started in the background ignores SIGINT, perhaps SIGHUP."""
    ignored = [s for s in signals.SIGNALS if signal.getsignal(s) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda n: n.name)
def test_a_signal_leaves_no_temporary_directory_and_the_output_as_it_was(tmp_path, number, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def body() -> int:
        with atomic_directory(tmp_path / "out", overwrite=True) as folder:
            (folder / "new").touch()
            os.kill(os.getpid(), number)
        raise AssertionError("never reached")

    before = {s: signal.getsignal(s) for s in signals.SIGNALS}
    assert parser.guarded(body, "pem x") == EXIT_PREEMPTED
    assert {s: signal.getsignal(s) for s in signals.SIGNALS} == before
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]
    error = capsys.readouterr().err
    assert error.startswith(f"pem x: error: {number.name}: stopped") and error.count("\n") == 1


@pytest.mark.parametrize("declared", [True, False])
def test_between_the_two_renames_a_signal_waits(tmp_path, declared, monkeypatch):
    """The program's own output ends the run; after another one there may be more to do."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        result = rename(self, target)
        os.kill(os.getpid(), signal.SIGUSR1)
        return result

    def body() -> int:
        if declared:
            signals.current().finish_after(out)
        with atomic_directory(out, overwrite=True) as folder:
            (folder / "new").touch()
            monkeypatch.setattr(Path, "rename", interrupted)
        monkeypatch.setattr(Path, "rename", rename)
        return 0

    assert parser.guarded(body, "pem x") == (0 if declared else EXIT_PREEMPTED)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_parts_that_go_on_after_errors_do_not_go_on_after_a_signal():
    def body() -> int:
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception:  # as around a trial that failed
                continue
        return 0

    assert not issubclass(Preempted, Exception)
    assert parser.guarded(body, "pem x") == EXIT_PREEMPTED


def test_a_signal_that_a_destructor_swallows_is_asked_for_again():
    class Closing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(100):
                pass

    def body() -> int:
        held = Closing()
        del held
        time.sleep(60)
        return 0

    assert parser.guarded(body, "pem x") == EXIT_PREEMPTED


def test_a_library_that_makes_another_error_of_it_changes_nothing():
    """pybind11 says TypeError where the conversion of an argument was interrupted."""

    def body() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise TypeError("incompatible function arguments") from None
        return 0

    assert parser.guarded(body, "pem x") == EXIT_PREEMPTED


def test_what_a_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert parser.guarded(lambda: os.kill(os.getpid(), signal.SIGHUP) or 0, "pem x") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_has_seen_enough_gets_no_trace(place):
    command = f"{sys.executable} -m pem_composition methods | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode in (0, 141)
