"""``run_all.sh --slurm``: the list of jobs, what each waits for, jobs that are stopped."""

from __future__ import annotations

import itertools
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm import Slurm

REPOSITORY = Path(__file__).resolve().parents[1]
EXPS = REPOSITORY / "exps"
HALVES = EXPS / "composition_for_distribution_generalization"
SMALL = {
    "composition_for_distribution_generalization/run_all.sh": {"tasks": "rte", "SEEDS": "1 2"},
    "composition_for_multitasking/run_all.sh": {"methods": "lora fft", "SEEDS": "1"},
    "composition_for_multitasking/initialisation_study.sh": {"SEEDS": "1"},
    "composition_for_domain_transfer/run_all.sh": {"methods": "lora", "SEEDS": "1 2"},
    "composition_for_domain_transfer/initialisation_study.sh": {"SEEDS": "1"},
    "composition_for_unlearning/run_all.sh": {"methods": "lora fft", "SEEDS": "1 2"},
    "composition_of_many_tasks/run_all.sh": {
        "tasks": "rte sst2", "modules": "lora:4", "SEEDS": "1 2", "learned": "nsc adamerging",
    },
    "composition_for_instruction_detoxification/run_all.sh": {"SEEDS": "1 2"},
}  # fmt: skip

# Stands in for every program: fails unless what it reads is there, and where another process is
# writing the same; a signal ends it with 75.
PROGRAM = """
import fcntl, itertools, os, signal, sys, time
words = sys.argv[1:]
if os.environ.get("FAIL", "no word") in " ".join(words):
    sys.exit(3)
out, flags = os.environ["OUT"] + "/", ("--output_dir", "--save_path", "--output_file")
writes = [value for flag, value in itertools.pairwise(words) if flag in flags]
def own(path):
    return any(path == w or path.startswith(w + "/") for w in writes)
for path in words:
    if path.startswith(out) and not own(path):
        if not os.path.exists(path) and not os.path.exists(os.path.dirname(path) + "/done"):
            sys.exit("not there: " + path)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: os._exit(75))
locks = []
for path in writes:
    os.makedirs(path, exist_ok=True)
    locks.append(open(path + "/lock", "w"))
    fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
time.sleep(0.05)
for path in writes:
    names = ("train.jsonl", "test.jsonl", "toxic.jsonl", "all_results.json")
    for name, text in (("done", "\\0".join(words)), *((name, "") for name in names)):
        with open(path + "/" + name, "w") as file:
            file.write(text)
"""


@pytest.fixture
def cluster(tmp_path):
    return Slurm(tmp_path)


def python(folder: Path) -> str:
    """An interpreter that runs the helpers of the scripts, and PROGRAM for all else."""
    path, program = folder / "python", folder / "program.py"
    program.write_text(PROGRAM)
    path.write_text(
        f'#!/bin/bash\ncase "$2" in exps.*) exec {shlex.quote(sys.executable)} "$@";; esac\n'
        f'exec {shlex.quote(sys.executable)} -ES {shlex.quote(str(program))} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def run(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)} | variables
    return subprocess.run(
        ["bash", str(script), *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def planned(printed: str, out: Path) -> dict[str, str]:
    """What the commands of a dry run write, as ``written`` finds it."""
    found = {}
    for words in map(shlex.split, printed.splitlines()):
        for flag, value in itertools.pairwise(words[3:]):
            if flag in ("--output_dir", "--save_path", "--output_file"):
                found[f"{Path(value).relative_to(out)}/done"] = "\0".join(words[1:])
    return dict(sorted(found.items()))


def written(out: Path) -> dict[str, str]:
    """Every output, and the command that wrote it."""
    return {str(p.relative_to(out)): p.read_text() for p in sorted(out.rglob("done"))}


def submitted(cluster: Slurm, script: str, out: Path, *flags: str, **variables: str) -> list[str]:
    """Submit a script; the lines of its list, of which the first is a comment."""
    done = run(EXPS / script, "--slurm", *flags, OUT=str(out), PATH=cluster.path, **variables)
    assert done.returncode == 0, done.stderr
    (path,) = (p for p in (out / "jobs").iterdir() if p.is_file())
    return path.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_jobs_that_are_stopped_at_any_moment_write_what_the_script_writes(
    script, cluster, tmp_path
):
    variables = SMALL[script] | {"PYTHON": python(tmp_path)}
    out = tmp_path / "o p"
    done = run(EXPS / script, OUT=str(out), DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    expected = planned(done.stdout, out)
    lines = submitted(cluster, script, out, **variables)
    cluster.run(nodes=4, stops=12, draw=random.Random(script))
    said = {p.name: p.read_text() for p in (out / "logs" / "slurm").iterdir()}
    states = {f"{t.array}_{t.index}": t.state for t in cluster.tasks}
    assert set(states.values()) == {"COMPLETED"}, (states, said, cluster.signalled)
    assert sorted(t.index for t in cluster.tasks) == list(range(1, len(lines)))
    assert written(out) == expected


def waits(cluster: Slurm) -> dict[str, set[str]]:
    """For each submitted line the lines that it waits for, as Slurm was told."""
    cluster._look()
    return {t.index: {i for _, i in t.after} for t in cluster.tasks}


@pytest.mark.slow
def test_a_sweep_waits_for_its_own_modules_and_a_table_for_its_sweeps(cluster, tmp_path):
    lines = submitted(
        cluster, "composition_for_distribution_generalization/run_all.sh", tmp_path / "o",
        "--partition", "gpu", tasks="rte sst2", methods="lora", SEEDS="1 2",
    )  # fmt: skip
    words = [dict(w.split("=", 1) for w in shlex.split(line) if "=" in w) for line in lines]
    after = waits(cluster)
    kinds = {"split": 0, "train": 0, "merge": 0, "table": 0}
    for number, line in enumerate(lines[1:], 1):
        own, named = words[number], [words[n] | {"line": lines[n]} for n in after[number]]
        if "split_data.sh" in line:
            kinds["split"] += 1
            assert named == []
        elif "_run_glue.sh" in line:
            kinds["train"] += 1
            assert [n["task_name"] for n in named] == [own["task_name"]]
        elif "_merge.sh" in line:
            kinds["merge"] += 1
            trained = [n for n in named if "half" in n]
            assert sorted(n["half"] for n in trained) == ["0", "1", "all"]
            assert {(n["seed"], n["task_name"]) for n in trained} == {
                (own["seed"], own["task_name"])
            }
        else:
            kinds["table"] += 1
            assert {n["seed"] for n in named} == {"1", "2"}
            assert all("_merge.sh" in n["line"] for n in named)
    assert kinds == {"split": 2, "train": 12, "merge": 4, "table": 2}
    calls = [shlex.split(call) for call in cluster.calls() if call.startswith("sbatch")]
    assert all(call[call.index("--partition") + 1] == "gpu" for call in calls)


def test_the_list_holds_every_value_and_no_secret(cluster, tmp_path):
    name = "composition_for_unlearning/trainadapter.sh"
    lines = submitted(
        cluster, name, tmp_path / "o p", model_name_or_path="a model", max_steps="7",
        OPENAI_API_KEY="secret", extra_flags="--bf16\n--data_seed 3",
    )  # fmt: skip
    assert len(lines) == 2 and "secret" not in lines[1]
    told = subprocess.run(
        ["bash", "-c", f'child() {{ printf "%s\\0" "$@"; }}; {lines[1]}'], capture_output=True,
        text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    assert told[0] == f"exps/{name}"
    given = dict(word.split("=", 1) for word in told[1:-1])
    assert given["extra_flags"] == "--bf16\n--data_seed 3"
    assert (given["model_name_or_path"], given["max_steps"]) == ("a model", "7")
    assert (given["OUT"], given["PYTHON"]) == (str(tmp_path / "o p"), sys.executable)


def test_a_dry_run_of_a_submission_submits_nothing(cluster, tmp_path):
    script = EXPS / "composition_for_unlearning/run_all.sh"
    done = run(script, "--slurm", "--time", "9", DRY_RUN="1", SEEDS="1 2", methods="lora",
               OUT=str(tmp_path / "o"), PATH=cluster.path)  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and cluster.calls() == []
    assert not (tmp_path / "o").exists()
    first, second, third, last = (x for x in done.stdout.splitlines() if x.startswith("sbatch"))
    assert "--time 9" in first and "--dependency" not in first
    assert "--dependency=afterok:A1_1 " in second and "--dependency=afterok:A1_2 " in third
    assert "--dependency=afterok:A2_3:A3_4 " in last


@pytest.mark.slow
def test_what_cannot_be_submitted_leaves_nothing_behind(cluster, tmp_path):
    script, out = EXPS / "composition_for_unlearning/run_all.sh", {"OUT": str(tmp_path / "o")}
    done = run(script, "--slurm", **out, PATH=cluster.path, methods="lroa")
    assert done.returncode == 2 and "found 'lroa'" in done.stderr
    done = run(script, "--slurm", **out, PATH=cluster.path, max_step="1")
    assert done.returncode == 2 and "did you mean max_steps?" in done.stderr
    assert cluster.calls() == []
    done = run(script, "--slurm", "--refuse-me", **out, PATH=cluster.path, SEEDS="1")
    assert done.returncode == 3 and "found sbatch: error: no such flag" in done.stderr
    assert cluster.calls()[-1] == "scancel 1"
    (tmp_path / "queue").write_text("7_[1-3]\n")
    done = run(script, "--slurm", **out, PATH=cluster.path, SEEDS="1")
    assert done.returncode == 2 and "found jobs 7_[1-3]" in done.stderr
    (cluster.bin / "sbatch").unlink()
    done = run(script, "--slurm", **out, PATH=cluster.path, SEEDS="1")
    assert done.returncode == 2 and "sbatch is not found" in done.stderr


@pytest.mark.slow
def test_a_job_whose_module_failed_never_starts_and_the_others_do(cluster, tmp_path):
    submitted(
        cluster, "composition_for_unlearning/run_all.sh", tmp_path / "o", FAIL="--seed 1 ",
        PYTHON=python(tmp_path),
        methods="lora", SEEDS="1 2",
    )  # fmt: skip
    cluster.run()
    states = {t.index: t.state for t in cluster.tasks}
    assert sorted(states.values()) == ["COMPLETED", "COMPLETED", "FAILED 3", "X", "X"]


def test_the_last_task_of_an_array_gives_itself_back_and_no_other(tmp_path, cluster):
    """Its SLURM_JOB_ID is the number of the whole array."""
    code = f"source {shlex.quote(str(EXPS / 'common.sh'))}; step x bash -c 'exit 75'"
    subprocess.run(
        ["bash", "-c", code], check=False, capture_output=True,
        env={"PATH": cluster.path, "OUT": str(tmp_path), "PYTHON": sys.executable,
             "SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "3"},
    )  # fmt: skip
    assert cluster.calls() == ["scontrol requeue 36_3"]
