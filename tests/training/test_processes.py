"""Two processes train to the losses of one with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import pem_process
from support.training_bench import REPOSITORY, argv_of, environment, ranks

from pem_composition.cli import main
from pem_composition.errors import UsageError
from pem_composition.training import processes, runs
from pem_composition.training.preparation import ModuleWeights

pytestmark = pytest.mark.slow

LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
QUIET = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "lora_dropout": 0.0,
    "max_steps": 30,
    "eval_steps": 15,
    "logging_steps": 1,
}


def test_accelerate_launch_with_two_cpu_processes_equals_one_process(bench):
    """203 rows do not divide by 16: each epoch's last batch is incomplete and shared unevenly."""
    flags = bench.flags("two", **QUIET, per_device_train_batch_size=8)
    argv = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    run = subprocess.run(
        [*launch, "-m", "pem_composition", "train", *argv],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("eval_auc") == 3, "one process prints: two evaluations and the summary"
    one = runs.run(bench.config("one", **QUIET, per_device_train_batch_size=16)).output_dir
    logs = [
        json.loads((f / "trainer_state.json").read_text())["log_history"]
        for f in (one, bench.folder / "two")
    ]
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        first, second = ([e[name] for e in log if name in e] for log in logs)
        assert len(first) == len(second) > 0
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), name
    names = [sorted(p.name for p in f.iterdir()) for f in (one, bench.folder / "two")]
    assert names[0] == names[1]


def train_with_a_slow_reader(words: list[str]) -> int:
    """``pem train`` whose second process reads the best step late, and notes when it did."""
    read, publish = ModuleWeights.read, ModuleWeights.publish
    notes = Path(os.environ["NOTES"])

    def late(self: ModuleWeights, path: Path) -> None:
        time.sleep(int(os.environ["RANK"]))
        read(self, path)
        (notes / f"read-{os.environ['RANK']}").write_text(str(time.monotonic()))

    def told(self: ModuleWeights, *given: Any) -> None:
        (notes / "published").write_text(str(time.monotonic()))
        publish(self, *given)

    ModuleWeights.read, ModuleWeights.publish = late, told  # in this process alone
    return main(words)


def test_all_have_read_the_best_step_before_the_first_one_publishes(bench, tmp_path):
    """Publishing moves the checkpoints for a moment."""
    changes = QUIET | {"max_steps": 6, "eval_steps": 3}
    words = argv_of(bench.flags("late", **changes, per_device_train_batch_size=8))
    children = [
        pem_process.call(
            train_with_a_slow_reader, words, bench.folder / f"late-{rank['RANK']}.log",
            variables=rank | {"NOTES": str(tmp_path)},
        )
        for rank in ranks()
    ]  # fmt: skip
    assert [child.wait() for child in children] == [0, 0], children[1].text()[-2000:]
    read, published = (float((tmp_path / n).read_text()) for n in ("read-1", "published"))
    assert read <= published


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launches_that_shard_the_parameters_are_refused(bench, name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UsageError, match=r"shards what pem train saves whole.*--fsdp"):
        runs.run(bench.config("sharded"))
    assert not (bench.folder / "sharded").exists()


def test_a_launcher_that_starts_too_few_processes_is_noticed():
    launch = [
        "python",
        "/venv/bin/accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "pem_composition",
    ]
    assert processes.missing_workers(LAUNCHED, launch) == 2
    assert processes.missing_workers(LAUNCHED, [*launch[:4], "--num_processes=3"]) == 3
    assert processes.missing_workers(LAUNCHED | {"WORLD_SIZE": "2"}, launch) == 0
    assert processes.missing_workers({"MASTER_ADDR": "node1"}, launch) == 0
    assert processes.missing_workers(LAUNCHED, ["bash"]) == 0
    with pytest.raises(UsageError, match=r"--num_processes N.*torchrun"):
        processes.missing_workers(LAUNCHED, launch[:4])


def test_a_failed_worker_ends_the_group_with_its_code():
    code = "import os, sys, time; time.sleep(3600) if os.environ['RANK'] == '0' else sys.exit(3)"
    call = f"print(processes.run_workers(2, {[sys.executable, '-c', code]!r}))"
    script = f"from pem_composition.training import processes; {call}"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        check=True,
        timeout=240,
    )
    assert run.stdout == "3\n"


def test_the_command_of_a_parent_may_hold_names_that_are_not_utf8():
    code = "from pem_composition.training.processes import parent_command as p; print(ascii(p()))"
    words = ["sh", "-c", f'{sys.executable} -c "{code}"; true', b"caf\xe9"]
    run = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    assert "'caf\\udce9'" in run.stdout
