"""An installed wheel has the programs and the experiment scripts, without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pem_composition as pem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(repository, tmp_path_factory) -> Path:
    """The folder that a wheel was installed into; nothing is built inside the repository."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", out, "build",
             "--build-base", out / "build",
             "bdist_wheel", "-b", out / "files", "-d", out]  # fmt: skip
    subprocess.run(build, cwd=repository, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
               "--disable-pip-version-check", "--target", out / "installed", wheel]  # fmt: skip
    subprocess.run(install, check=True, capture_output=True)
    return out / "installed"


@pytest.fixture
def run(installed, tmp_path):
    """Start an installed script in a folder of its own, with the wheel's package."""

    def start(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, installed / "bin" / name, *arguments]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return start


def test_scripts_are_the_programs_of_the_repository(run, repository, tmp_path):
    for program in ("merge", "negation", "analogy"):
        done = run(f"pem-{program}", "-a", "nowhere", "-p", "out")
        assert done.returncode == 2 and done.stderr.startswith(f"pem-{program}: error: ")
        assert run(f"pem-{program}", "--help").stdout.startswith(f"usage: pem-{program} ")
    halves = [repository / "examples" / name for name in ("half-0", "half-1")]
    assert run("pem-merge", "-a", *halves, "-p", "sum", "--search_step", 30, 70).returncode == 0
    a, b = map(pem.load, halves)
    written, expected = pem.load(tmp_path / "sum").tensors, (0.3 * a + 0.7 * b).tensors
    assert written.keys() == expected.keys()
    assert all(written[key].equal(expected[key]) for key in written)


def test_experiments_run_from_the_folder_that_pem_exps_writes(run, repository, installed, tmp_path):
    assert run("pem", "exps", ".").returncode == 0

    def files(folder: Path) -> dict[str, bytes]:
        found = (p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__")
        return {str(p.relative_to(folder)): p.read_bytes() for p in found}

    assert files(tmp_path / "exps") == files(repository / "exps")
    again = run("pem", "exps", ".")
    assert again.returncode == 2 and "exps: the output exists" in again.stderr
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(installed), "DRY_RUN": "1"}
    script = "exps/composition_for_unlearning/run_all.sh"
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0 and "-m pem_composition negation" in done.stdout, done.stderr
