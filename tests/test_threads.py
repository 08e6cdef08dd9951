"""OpenMP's own account of how long its threads wait, in our programs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.training_bench import REPOSITORY, environment

from pem_composition import threads


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_the_threads_of_a_program_sleep_soon(tmp_path):
    halves = [str(REPOSITORY / "examples" / f"half-{i}") for i in (0, 1)]
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "merge.py"), "-a", *halves, "-p", str(tmp_path / "out")],
        env=environment() | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    assert re.search(rf"{threads.SPIN} = '{threads.ROUNDS}'", run.stderr), run.stderr


@pytest.mark.parametrize("name", threads.WAITING)
def test_what_the_user_says_of_waiting_stays(name):
    given = {name: "7"}
    threads.share_processors(given)
    assert given == {name: "7"}
