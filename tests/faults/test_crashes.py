"""Killed, without space, or beside another writer: an output is complete or absent, codes right."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from faults import workers
from support import pem_process

import pem_composition as library
from pem_composition import cli

pytestmark = pytest.mark.slow


def work(*words: str) -> str:
    """Run a scenario of workers.py here and give what it printed."""
    here = Path.cwd()
    child = pem_process.call(workers.main, [here, *words], here.with_name("log"))
    assert child.wait() == 0, child.text()
    return child.log.read_text()


def weights(out: Path) -> bytes:
    """The weights of a complete output, whose checksums are right; else fails."""
    header = library.checkpoint.inspect_header(out)
    library.load(out, base="base" if header.kind == "full" else None)
    return header.weights.read_bytes()


def temporaries(here: Path) -> list[Path]:
    """What killed writers left beside their outputs."""
    return [p for p in here.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", ["module", "model"])
def test_kill_9_at_random_moments_of_merging_leaves_complete_outputs_only(here, kind):
    """Also where an old output is replaced: then it is the old or the new one."""
    work("kill", kind, "50")
    new = list(here.glob(f"{kind}-new-*"))
    assert new, "no output was finished"
    assert temporaries(here), "no writer was interrupted"
    expected = weights(here / f"{kind}-0.25")
    assert all(weights(out) == expected for out in new)
    assert weights(here / f"{kind}-over") in (expected, weights(here / f"{kind}-0.75"))


@pytest.mark.parametrize("inputs", ["-a good bad", "-a m1 m2 --full_merge"])
def test_no_space_is_exit_3_in_one_line_and_the_old_output_stays(here, inputs):
    work("space", *inputs.split())
    assert temporaries(here) == []


@pytest.mark.parametrize("how", ["new", "over"])
def test_of_writers_at_the_same_moment_one_wins_and_the_others_are_told(here, how):
    said = work("race", how).splitlines()
    codes = [int(line.split()[-1]) for line in said if line.startswith("exit code")]
    assert (codes.count(0), codes.count(2)) == ((15, 45) if how == "new" else (60, 0))
    refusals = [line for line in said if "error: " in line]
    assert len(refusals) == codes.count(2)
    assert all("the output exists" in line for line in refusals)
    for out in here.glob("race*"):
        weights(out)
    assert temporaries(here) == []


def test_a_full_disk_is_exit_3_in_one_line_and_the_old_output_stays(here, capsys):
    """Where mounting is allowed, a file system of 64 kB."""
    disk = here / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        words = ["merge", "-a", "good", "-p", "disk/out", "--head", "none"]
        assert cli.main(words) == 0
        kept = {p.name: p.read_bytes() for p in (disk / "out").iterdir()}
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
        capsys.readouterr()
        assert cli.main([*words, "--overwrite", "--coefficients", "2"]) == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "disk/out: No space left on device; free" in error
        assert {p.name: p.read_bytes() for p in (disk / "out").iterdir()} == kept
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
